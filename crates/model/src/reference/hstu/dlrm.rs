//! The production variant before its layers: `modules/dlrm_hstu.py` of generative-recommenders.
//!
//! ```text
//! x[i] = (content MLP + additional MLP + action MLP, or slot W + b) * scale
//!        + position[p_i] + time[b_i]
//! ```
//!
//! Rows are `slots | events | candidates`. Positions count back from the end of the history, times
//! from the query.

use std::collections::BTreeMap;

use candle_core::{Error, Module as _, Result, Tensor};
use candle_nn::{Embedding, VarBuilder};

use super::dlrm_head::DlrmHead;
use super::parts::SwishMlp;
use super::{Ends, factor, last, look_up, table};
use crate::families::hstu::config::{DlrmInput, DlrmOutput, StackConfig, TimeClamp};
use crate::families::hstu::inputs::Request;

/// Tables, MLPs and head of a model that ranks.
#[derive(Debug)]
pub(super) struct Dlrm {
    input: DlrmInput,
    tables: BTreeMap<String, Embedding>,
    /// Of the item, of its additional features, of the action.
    mlps: [SwishMlp; 3],
    /// `[actions, action_dim]`, and `[1, actions * action_dim]` for candidates.
    actions: [Tensor; 2],
    /// `[slots, embedding_dim, model_dim]` and `[slots, model_dim]`.
    slots: Option<[Tensor; 2]>,
    positions: Embedding,
    times: Embedding,
    highest_time: usize,
    scale: f64,
    item_features: Vec<String>,
    head: DlrmHead,
}

impl Dlrm {
    pub(super) fn new(
        input: &DlrmInput,
        output: &DlrmOutput,
        stack: &StackConfig,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let (width, from, bits) = (stack.model_dim, input.embedding_dim, input.action_weights.len());
        let tables = vb.pp("_embedding_collection.embeddings");
        let tables = input.tables.iter().map(|entry| {
            Ok((entry.name.clone(), table(entry.rows, from, &tables.pp(&entry.name), "weight")?))
        });
        let before = vb.pp("_hstu_transducer._input_preprocessor");
        let mlp = |name: &str, inputs: usize| {
            SwishMlp::new([inputs, input.hidden_dim, width], input.norm_eps, true, &before.pp(name))
        };
        let encoder = before.pp("_action_encoder");
        let slots: usize = input.contextual.iter().map(|feature| feature.slots).sum();
        let slots = (slots > 0).then(|| -> Result<_> {
            let weights = before.get((slots, from, width), "_batched_contextual_linear_weights")?;
            Ok([weights, before.get((slots, width), "_batched_contextual_linear_bias")?])
        });
        let places = vb.pp("_hstu_transducer._positional_encoder");
        Ok(Self {
            tables: tables.collect::<Result<_>>()?,
            mlps: [
                mlp("_content_embedding_mlp", from)?,
                mlp("_additional_embedding_mlp", from * (input.features.len() - 1))?,
                mlp("_action_embedding_mlp", bits * input.action_dim)?,
            ],
            actions: [
                encoder.get((bits, input.action_dim), "_action_embedding_table")?,
                encoder.get((1, bits * input.action_dim), "_target_action_embedding_table")?,
            ],
            slots: slots.transpose()?,
            positions: table(input.position.rows, width, &places, "_position_embeddings_weight")?,
            times: table(input.time.rows, width, &places, "_timestamp_embeddings_weight")?,
            highest_time: match input.time.clamp {
                TimeClamp::Rows => input.time.rows - 1,
                TimeClamp::ModelDim => (width - 1).min(input.time.rows - 1),
            },
            scale: factor(input.position.scale, stack),
            item_features: output.item_tower.features.clone(),
            head: DlrmHead::new(output, [width, from], vb)?,
            input: input.clone(),
        })
    }

    fn table(&self, name: &str) -> Result<&Embedding> {
        self.tables.get(name).ok_or_else(|| Error::Msg(format!("no table {name}")))
    }

    /// Embeddings of a feature, of the events and then the candidates, `[events + candidates,
    /// embedding_dim]`.
    fn embedded(&self, feature: usize, request: &Request) -> Result<Tensor> {
        let (events, candidates) = (&request.events, &request.candidates);
        let ids = match feature {
            0 => [&events.items, &candidates.items],
            _ => [&events.additional[feature - 1], &candidates.additional[feature - 1]],
        };
        let ids = ids.into_iter().flatten().map(|&id| id as usize);
        look_up(self.table(&self.input.features[feature].table)?, ids)
    }

    /// Events and candidates, `[events + candidates, model_dim]`.
    fn tokens(&self, request: &Request) -> Result<Tensor> {
        let [done, target] = &self.actions;
        let [content, additional, action] = &self.mlps;
        let item = self.embedded(0, request)?;
        let others = (1..self.input.features.len()).map(|feature| self.embedded(feature, request));
        let others = others.collect::<Result<Vec<_>>>()?;
        let others = match others.is_empty() {
            true => Tensor::zeros((item.dim(0)?, 1), item.dtype(), item.device())?,
            false => Tensor::cat(&others, 1)?,
        };
        let of_event = |actions: &u32| {
            let bits = self.input.action_weights.iter().map(|bit| u32::from(actions & bit != 0));
            let bits = Tensor::from_iter(bits, done.device())?.to_dtype(done.dtype())?.unsqueeze(1)?;
            done.broadcast_mul(&bits)?.reshape((1, ()))
        };
        let actions = request.events.actions.iter().map(of_event);
        let actions = actions.chain(request.candidates.items.iter().map(|_| Ok(target.clone())));
        let actions = Tensor::cat(&actions.collect::<Result<Vec<_>>>()?, 0)?;
        content.forward(&item)? + additional.forward(&others)? + action.forward(&actions)?
    }

    /// Contextual slots, each a row `[1, model_dim]`. One that is empty is its bias.
    fn contextual(&self, request: &Request, tokens: usize) -> Result<Vec<Tensor>> {
        let Some([weights, biases]) = &self.slots else { return Ok(Vec::new()) };
        let mut rows = Vec::new();
        for (feature, ids) in self.input.contextual.iter().zip(&request.contextual) {
            for slot in 0..feature.slots {
                let bias = biases.narrow(0, rows.len(), 1)?;
                rows.push(match ids.get(slot).filter(|_| tokens >= feature.min_tokens) {
                    None => bias,
                    Some(&id) => {
                        let x = look_up(self.table(&feature.table)?, [id as usize])?;
                        (x.matmul(&weights.get(rows.len())?)? + bias)?
                    }
                });
            }
        }
        Ok(rows)
    }
}

impl Ends for Dlrm {
    fn rows(&self, request: &Request) -> Result<Tensor> {
        let tokens = self.tokens(request)?;
        let mut rows = self.contextual(request, tokens.dim(0)?)?;
        let (slots, events) = (rows.len(), request.events.items.len());
        rows.push(tokens);
        let x = Tensor::cat(&rows, 0)?;
        let (count, end) = (x.dim(0)?, slots + events);
        let positions = (0..count).map(|row| match row < slots {
            true => row,
            false => end - row.min(end) + slots,
        });
        let positions = positions.map(|position| position.min(self.input.position.rows - 1));
        // Slots have the time 0, candidates that of the query.
        let times = std::iter::repeat_n(0, slots).chain(request.events.times.iter().copied());
        let ages = times.map(|time| request.query_time - time).chain(std::iter::repeat_n(0, count - end));
        // trunc(sqrt(max(age, 1e-6) / divisor)), at most the highest. In single precision, as
        // trained.
        let bucket = |age: i64| ((age as f32).max(1e-6) / self.input.time.divisor as f32).sqrt() as usize;
        let buckets = ages.map(|age| bucket(age).min(self.highest_time));
        ((x * self.scale)? + look_up(&self.positions, positions)?)? + look_up(&self.times, buckets)?
    }

    fn outputs(&self, states: &Tensor, request: &Request) -> Result<Tensor> {
        let candidates = request.candidates.items.len();
        let features = self.item_features.iter().map(|name| {
            let feature = self.input.features.iter().position(|feature| &feature.name == name);
            let feature = feature.ok_or_else(|| Error::Msg(format!("no feature {name}")))?;
            last(&self.embedded(feature, request)?, candidates)
        });
        let items = Tensor::cat(&features.collect::<Result<Vec<_>>>()?, 1)?;
        self.head.forward(&last(states, candidates)?, &items, request.query_time)
    }
}
