//! config.json of family `t5`: `T5ForConditionalGeneration`, as transformers writes it.
//!
//! Place in the flow: read when a checkpoint is opened; the tensors are checked against it, the model is
//! built from it.
//!
//! ```text
//! mod     the configuration, and what follows from it
//! read    all fields, read strictly
//! ```
//!
//! Invariant: a field that the computation depends on is read with its exact type and range, or refused
//! by its name.

mod read;

use beamline_compute::cpu::activation::Activation;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::pages::PageShape;
use beamline_compute::cpu::relative::bias::Buckets;
use serde_json::Value;

use self::read::KNOWN;
use crate::checkpoint::config::{Fields, check_known, shown};
use crate::checkpoint::json;
use crate::checkpoint::note::Note;
use crate::error::ModelError;

/// Most positions of a context: encoder tokens, and the row that the decoder starts with. T5 has
/// relative positions, so nothing in a checkpoint limits them (`n_positions` only cut the texts of
/// training). This bounds memory and time.
pub const MAX_POSITIONS: usize = 1 << 14;

pub(super) const ARCHITECTURE: &str = "T5ForConditionalGeneration";

/// An encoder and a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct T5Config {
    /// Width of the residual streams.
    pub d_model: usize,
    /// Width of a head.
    pub d_kv: usize,
    /// Width of the feed-forward layers.
    pub d_ff: usize,
    /// Heads of every attention.
    pub num_heads: usize,
    /// Layers of the encoder.
    pub encoder_layers: usize,
    /// Layers of the decoder.
    pub decoder_layers: usize,
    /// Buckets of relative positions, at least 4.
    pub buckets: usize,
    /// Distance from which on all positions share a bucket.
    pub max_distance: usize,
    /// Epsilon of the norms.
    pub layer_norm_epsilon: f32,
    /// Rows of the output matrix and of the embedding, padding rows included.
    pub vocab_size: usize,
    /// Activation of the feed-forward layers.
    pub activation: Activation,
    /// Whether a second product is multiplied with the activated one.
    pub gated: bool,
    /// Whether the output matrix is the embedding.
    pub tied_head: bool,
    /// Whether final states are multiplied by `d_model^-0.5` before the output matrix.
    pub scales_output: bool,
    /// The token that the decoder starts with, where config.json says it.
    pub decoder_start: Option<u32>,
    /// The padding token, where config.json says it.
    pub padding: Option<u32>,
}

impl T5Config {
    /// Parses config.json.
    ///
    /// # Errors
    ///
    /// When a field is missing, contradictory, misspelt or out of range, or asks for something that is
    /// not implemented. The message names every such field.
    pub fn parse(json: &str) -> Result<Self, ModelError> {
        Self::parse_with(json, &mut Vec::new())
    }

    /// The same, and notes what its author should know.
    pub(super) fn parse_with(json: &str, notes: &mut Vec<Note>) -> Result<Self, ModelError> {
        let value = json::parse(json).map_err(ModelError::Config)?;
        let Value::Object(object) = value else {
            return Err(ModelError::Config("is not a JSON object".into()));
        };
        let mut fields = Fields::of("", &object);
        check_architecture(&mut fields);
        let config = Self::read_fields(&mut fields, notes);
        let mut problems = fields.problems();
        problems.extend(check_known(&object, &KNOWN, notes));
        match (config, problems.is_empty()) {
            (Some(config), true) => Ok(config),
            _ => Err(ModelError::Config(problems.join("; "))),
        }
    }

    /// Width of all heads.
    pub fn inner(&self) -> usize {
        self.num_heads * self.d_kv
    }

    /// Most positions of a context, the decoder's first row included.
    pub fn max_positions(&self) -> usize {
        MAX_POSITIONS
    }

    /// Positions that a row attends to with as many multiplications as the rest of the row takes. It is
    /// that of an encoder row, which nearly all rows of a context are. The keys and values of a row for
    /// the decoder's layers count as the rest.
    pub fn pairs_per_row(&self) -> u64 {
        let [width, inner, feed, encoder, decoder] =
            [self.d_model, self.inner(), self.d_ff, self.encoder_layers, self.decoder_layers]
                .map(|size| size as u64);
        let products = if self.gated { 3 } else { 2 };
        let layers = encoder * width * (4 * inner + products * feed) + decoder * width * 2 * inner;
        (layers / (2 * inner * encoder)).max(1)
    }

    /// Relative positions of both stacks.
    pub fn relative(&self) -> Buckets {
        let Self { num_heads: heads, buckets: count, max_distance, .. } = *self;
        Buckets { heads, count, max_distance, positions: MAX_POSITIONS }
    }

    /// What a page holds: keys and values of the decoder's layers.
    pub fn page_shape(&self, format: KvFormat) -> PageShape {
        let Self { decoder_layers, num_heads, d_kv, .. } = *self;
        PageShape { format, layers: decoder_layers, heads: num_heads, key_dim: d_kv, value_dim: d_kv }
    }
}

/// `architectures` and `model_type` must name this family.
fn check_architecture(fields: &mut Fields<'_>) {
    let kind = fields.text("model_type");
    if let Some(kind) = kind.filter(|kind| *kind != "t5") {
        fields.problem(format!("model_type is {kind:?}, expected \"t5\""));
    }
    match fields.get("architectures") {
        None | Some(Value::Null) if kind.is_some() => {}
        Some(Value::Array(names)) if *names == [ARCHITECTURE] => {}
        Some(other) => {
            let problem = format!("architectures is {}, expected [{ARCHITECTURE:?}]", shown(other));
            fields.problem(problem);
        }
        None => fields.problem(format!("`architectures` is missing; expected [{ARCHITECTURE:?}]")),
    }
}

#[cfg(test)]
pub(in crate::families::t5) mod tests;
