//! HSTU in its three published variants, in candle-nn: a second opinion of whole requests.
//!
//! ```text
//! research   tables of items and actions -> rows; users and items of unit length, or a token head
//! dlrm       features, actions and times -> rows
//! dlrm_head  user and item towers -> predictions
//! nvidia     tables of any feature -> rows; an MLP -> predictions
//! layers     the layers that stand between
//! pairs      who sees whom, and the relative bias
//! parts      norms and MLPs of all variants
//! ```
//!
//! Equations: Zhai et al. 2024, "Actions Speak Louder than Words", as in the code of
//! `meta-recsys/generative-recommenders` and `NVIDIA/recsys-examples`; `docs/HSTU.md` has them.
//!
//! Place in the flow: tests and `beamline inspect --verify` compare the engine with it.
//!
//! Invariant: a request is one sequence, its candidates behind its context; nothing is kept from
//! one request to the next.

mod dlrm;
mod dlrm_head;
mod layers;
mod nvidia;
mod pairs;
mod parts;
mod research;

use std::fmt;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Embedding, VarBuilder};

use self::dlrm::Dlrm;
use self::nvidia::Nvidia;
use self::research::Research;
use super::var_builder;
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;
use crate::families::hstu::config::{HstuConfig, NamedScale, Purpose, Scale, StackConfig, VariantConfig};
use crate::families::hstu::expected_tensors;
use crate::families::hstu::inputs::{Prepared, Request};

pub use layers::HstuLayers;

/// A model of the family `hstu`.
#[derive(Debug)]
pub struct HstuReference {
    ends: Box<dyn Ends>,
    ranks: bool,
    layers: HstuLayers,
}

/// What stands before and behind the layers of a variant.
trait Ends: fmt::Debug + Send + Sync {
    /// Rows before the first layer, `[context + candidates, model_dim]`.
    fn rows(&self, request: &Request) -> Result<Tensor>;

    /// Answers from the final states of all rows: see [`HstuReference::outputs`].
    fn outputs(&self, states: &Tensor, request: &Request) -> Result<Tensor>;
}

impl HstuReference {
    /// Builds it from a checkpoint's tensors.
    ///
    /// # Errors
    ///
    /// When a tensor cannot be read.
    pub fn new(
        config: &HstuConfig,
        tensors: &Tensors,
        dtype: DType,
        device: &Device,
    ) -> std::result::Result<Self, ModelError> {
        // A layer of no inputs has a weight without values.
        let names = expected_tensors(config).into_iter().filter(|(_, shape)| !shape.contains(&0));
        let vb = var_builder(tensors, names.map(|(name, _)| name), dtype, device)?;
        let (stack, variant) = (&config.stack, config.variant.variant());
        let ends: Box<dyn Ends> = match &config.variant {
            VariantConfig::Research(input, output) => Box::new(Research::new(input, output, stack, &vb)?),
            VariantConfig::Dlrm(input, output) => Box::new(Dlrm::new(input, output, stack, &vb)?),
            VariantConfig::Nvidia(input, output) => Box::new(Nvidia::new(input, output, stack, &vb)?),
        };
        let prefix = match &config.variant {
            VariantConfig::Research(..) => "_hstu._attention_layers",
            VariantConfig::Dlrm(..) => "_hstu_transducer._stu_module._stu_layers",
            VariantConfig::Nvidia(..) => "_hstu_block._attention_layers",
        };
        let ranks = config.purpose() == Purpose::Rank;
        Ok(Self { ends, ranks, layers: HstuLayers::new(stack, variant, &vb.pp(prefix))? })
    }

    /// What a model says of a request, by its head:
    ///
    /// ```text
    /// tokens    logits of the next token, [vocab_size]
    /// items     inner products with all items, [items]; the first is that behind the padding
    /// ranking   predictions of the candidates, [candidates, names]
    /// ```
    ///
    /// # Errors
    ///
    /// When candle fails.
    pub fn outputs(&self, request: &Prepared) -> Result<Vec<f64>> {
        let request = &request.request;
        if self.ranks && request.candidates.items.is_empty() {
            return Ok(Vec::new());
        }
        let rows = self.ends.rows(request)?;
        let context = rows.dim(0)? - request.candidates.items.len();
        let times: Vec<i64> = request.events.times.iter().copied().chain([request.query_time]).collect();
        let states = self.layers.forward(&rows, context, &times)?;
        self.ends.outputs(&states, request)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
    }
}

/// A factor in double precision.
fn factor(scale: Scale, stack: &StackConfig) -> f64 {
    match scale {
        Scale::Number(number) => number,
        Scale::Named(NamedScale::SqrtModelDim) => (stack.model_dim as f64).sqrt(),
        Scale::Named(NamedScale::InverseSqrtKeyDim) => (stack.key_dim as f64).sqrt().recip(),
    }
}

/// A table `[rows, width]`, by the full name of its tensor.
fn table(rows: usize, width: usize, vb: &VarBuilder<'_>, name: &str) -> Result<Embedding> {
    Ok(Embedding::new(vb.get((rows, width), name)?, width))
}

/// Rows of a table, `[ids, width]`.
fn look_up(table: &Embedding, ids: impl IntoIterator<Item = usize>) -> Result<Tensor> {
    let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
    table.embeddings().index_select(&Tensor::new(ids, table.embeddings().device())?, 0)
}

/// The last rows, `[count, model_dim]`.
fn last(states: &Tensor, count: usize) -> Result<Tensor> {
    states.narrow(0, states.dim(0)? - count, count)?.contiguous()
}
