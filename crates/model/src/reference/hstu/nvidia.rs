//! NVIDIA's variant around its layers: `examples/hstu` of recsys-examples.
//!
//! ```text
//! x[i]        = row[i] * scale + position[min(i, context, positions - 1)]
//! prediction  = sigmoid or softmax of MLP(normalization(state of a candidate))
//! ```
//!
//! Rows are `contextual | item, action, item, action .. | candidates`.

use std::collections::BTreeMap;

use candle_core::{D, Error, Module as _, Result, Tensor};
use candle_nn::ops::{sigmoid, softmax};
use candle_nn::{Embedding, Linear, VarBuilder, linear_b};

use super::parts::Final;
use super::{Ends, factor, last, look_up, table};
use crate::families::hstu::config::{Activation, NvidiaInput, NvidiaOutput, Prediction, StackConfig};
use crate::families::hstu::inputs::Request;

/// Tables and head of NVIDIA's variant.
#[derive(Debug)]
pub(super) struct Nvidia {
    config: NvidiaInput,
    tables: BTreeMap<String, Embedding>,
    positions: Embedding,
    scale: f64,
    normalization: Final,
    head: Vec<Linear>,
    activation: Activation,
    prediction: Prediction,
}

impl Nvidia {
    pub(super) fn new(
        input: &NvidiaInput,
        output: &NvidiaOutput,
        stack: &StackConfig,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let width = stack.model_dim;
        let tables = vb.pp("_embedding_collection._data_parallel_embedding_collection.embeddings");
        let tables = input.tables.iter().map(|entry| {
            Ok((entry.name.clone(), table(entry.rows, width, &tables.pp(&entry.name), "weight")?))
        });
        let positions = "_hstu_block._preprocessor._positional_encoder._position_embeddings_weight";
        let inputs = [width].into_iter().chain(output.head.iter().copied());
        let head = inputs.zip(&output.head).enumerate().map(|(layer, (from, &to))| {
            linear_b(from, to, output.head_bias, vb.pp("_mlp._mlp").pp(2 * layer))
        });
        Ok(Self {
            tables: tables.collect::<Result<_>>()?,
            positions: table(input.position.rows, width, vb, positions)?,
            scale: factor(input.position.scale, stack),
            normalization: Final::new(output.normalization, vb)?,
            head: head.collect::<Result<_>>()?,
            activation: output.activation,
            prediction: output.prediction,
            config: input.clone(),
        })
    }
}

impl Ends for Nvidia {
    fn rows(&self, request: &Request) -> Result<Tensor> {
        let Request { events, contextual, candidates, .. } = request;
        let mut rows: Vec<(&String, u32)> = Vec::new();
        for (feature, ids) in self.config.contextual.iter().zip(contextual) {
            rows.extend(ids.iter().map(|&id| (&feature.table, id)));
        }
        for (event, &item) in events.items.iter().enumerate() {
            rows.push((&self.config.item_table, item));
            rows.extend(self.config.action_table.as_ref().map(|table| (table, events.actions[event])));
        }
        let context = rows.len();
        rows.extend(candidates.items.iter().map(|&item| (&self.config.item_table, item)));
        let row = |&(table, id): &(&String, u32)| {
            let table = self.tables.get(table).ok_or_else(|| Error::Msg(format!("no table {table}")))?;
            table.embeddings().get(id as usize)
        };
        let x = Tensor::stack(&rows.iter().map(row).collect::<Result<Vec<_>>>()?, 0)?;
        let highest = context.min(self.config.position.rows - 1);
        (x * self.scale)? + look_up(&self.positions, (0..rows.len()).map(|row| row.min(highest)))?
    }

    fn outputs(&self, states: &Tensor, request: &Request) -> Result<Tensor> {
        let mut x = self.normalization.forward(&last(states, request.candidates.items.len())?)?;
        for (index, layer) in self.head.iter().enumerate() {
            if index > 0 {
                x = match self.activation {
                    Activation::Relu => x.relu()?,
                    Activation::Gelu => x.gelu_erf()?,
                };
            }
            x = layer.forward(&x)?;
        }
        match self.prediction {
            Prediction::Sigmoid => sigmoid(&x),
            Prediction::Softmax => softmax(&x, D::Minus1),
        }
    }
}
