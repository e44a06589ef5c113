//! The research variant around its layers: `research/modeling/sequential` of
//! generative-recommenders.
//!
//! ```text
//! x[i]    = (item[id_i] with its action) * scale + position[i];  zero where id_i is padding
//! items   normalization(x[last]) . item / max(|item|, eps)
//! tokens  logit_scale * normalization(x[last]) . head[token]
//! ```

use candle_core::{Module as _, Result, Tensor};
use candle_nn::{Embedding, Linear, VarBuilder};

use super::parts::{Final, unit};
use super::{Ends, factor, last, look_up, table};
use crate::families::hstu::config::{
    Combine, ResearchActions, ResearchHead, ResearchInput, ResearchOutput, StackConfig,
};
use crate::families::hstu::inputs::Request;

/// Tables and head of the research variant.
#[derive(Debug)]
pub(super) struct Research {
    items: Embedding,
    actions: Option<(Embedding, Combine)>,
    positions: Embedding,
    scale: f64,
    padding: Option<u32>,
    normalization: Final,
    /// Items of unit length, or the tokens.
    head: Linear,
    logit_scale: f64,
}

impl Research {
    pub(super) fn new(
        input: &ResearchInput,
        output: &ResearchOutput,
        stack: &StackConfig,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let (count, width) = (input.num_items + 1, stack.model_dim);
        let items = match input.actions {
            Some(ResearchActions { combine: Combine::Concat, dim, .. }) => width - dim,
            _ => width,
        };
        let items = table(count, items, vb, "_embedding_module._item_emb.weight")?;
        let actions = input.actions.map(|ResearchActions { count, dim, combine, .. }| -> Result<_> {
            let name = match combine {
                Combine::Add => "_embedding_module._action_emb.weight",
                Combine::Concat => "_input_features_preproc._rating_emb.weight",
            };
            Ok((table(count, dim, vb, name)?, combine))
        });
        let (head, logit_scale) = match output.head {
            ResearchHead::Items { eps } => {
                // Padding is no item.
                let first = input.padding_id.map_or(0, |padding| padding as usize + 1);
                (unit(&items.embeddings().narrow(0, first, count - first)?, eps)?, 1.0)
            }
            ResearchHead::Tokens { vocab_size, tied: true, logit_scale, .. } => {
                (items.embeddings().narrow(0, 0, vocab_size)?, logit_scale)
            }
            ResearchHead::Tokens { vocab_size, tied: false, logit_scale, .. } => {
                (vb.get((vocab_size, width), "_token_head.weight")?, logit_scale)
            }
        };
        Ok(Self {
            items,
            actions: actions.transpose()?,
            positions: table(input.position.rows, width, vb, "_input_features_preproc._pos_emb.weight")?,
            scale: factor(input.position.scale, stack),
            padding: input.padding_id,
            normalization: Final::new(output.normalization, vb)?,
            head: Linear::new(head, None),
            logit_scale,
        })
    }
}

impl Ends for Research {
    fn rows(&self, request: &Request) -> Result<Tensor> {
        let events = &request.events;
        let items = look_up(&self.items, events.items.iter().map(|&item| item as usize))?;
        let x = match &self.actions {
            None => items,
            Some((actions, combine)) => {
                let actions = look_up(actions, events.actions.iter().map(|&action| action as usize))?;
                match combine {
                    Combine::Add => (items + actions)?,
                    Combine::Concat => Tensor::cat(&[items, actions], 1)?,
                }
            }
        };
        let x = ((x * self.scale)? + look_up(&self.positions, 0..events.items.len())?)?;
        let kept = events.items.iter().map(|&item| u32::from(self.padding != Some(item)));
        let kept = Tensor::from_iter(kept, x.device())?.to_dtype(x.dtype())?.unsqueeze(1)?;
        x.broadcast_mul(&kept)
    }

    fn outputs(&self, states: &Tensor, _request: &Request) -> Result<Tensor> {
        self.head.forward(&self.normalization.forward(&last(states, 1)?)?)? * self.logit_scale
    }
}
