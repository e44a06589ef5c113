//! config.json of a decoder: which architecture, which sizes.
//!
//! Every field that the computation depends on is read with its exact type and range, in nested blocks
//! as well. A field that is present and wrong is an error that names it, and never takes a default. A
//! field that is absent takes the default of transformers for its architecture, and a note says so.
//! [`known`] decides about all other fields. No key may be given twice.
//!
//! ```text
//! architecture  which one, and its defaults
//! fields        one object, read strictly
//! read          all fields
//! known         fields that are not read: harmless, refused, or warned about
//! rope          the rotary embedding, in both spellings
//! ```

mod architecture;
mod fields;
mod known;
mod read;
mod rope;

use serde_json::Value;

pub use self::architecture::Architecture;
pub(crate) use self::fields::{Bounds, Fields, shown};
pub(crate) use self::known::{Known, check as check_known};
pub(crate) use self::read::default_note;
use super::json;
use super::note::Note;
use crate::error::ModelError;

/// Largest value accepted for any size, so that products of two sizes cannot overflow.
pub(crate) const MAX_SIZE: usize = 1 << 24;
/// A decoder of the Llama family tree.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Architecture that config.json names.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads of a layer.
    pub heads: usize,
    /// Key-value heads of a layer; they divide the query heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the output matrix, padding rows included.
    pub vocab_size: usize,
    /// Positions the model was made for.
    pub max_positions: usize,
    /// Epsilon of the norms.
    pub rms_norm_eps: f32,
    /// Rotary embedding of queries and keys.
    pub rope: Rope,
    /// Whether the output matrix is the embedding table.
    pub tied_head: bool,
    /// Whether query, key and value have a bias.
    pub qkv_bias: bool,
    /// Whether the attention output has a bias.
    pub output_bias: bool,
    /// Whether the feed-forward layers have a bias.
    pub mlp_bias: bool,
    /// Whether queries and keys are normalised per head.
    pub qk_norm: bool,
}

/// Rotary embedding: base and scaling, named as in the `rope_type` of transformers.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling for long contexts.
    pub scaling: RopeScaling,
}

/// How the frequencies are scaled.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All positions divided by a factor.
    Linear {
        /// Divisor of all positions.
        factor: f64,
    },
    /// Llama 3: low frequencies divided, high ones kept, smooth between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
        /// Context length before scaling.
        original: f64,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        /// Factor by which the context is extended.
        factor: f64,
        /// Context length before scaling.
        original: f64,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided.
        beta_slow: f64,
        /// Multiplies cosine and sine.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded outward to whole dimensions.
        truncate: bool,
    },
}

impl Config {
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
        let architecture = Architecture::of(&object).map_err(ModelError::Config)?;
        let mut fields = Fields::of("", &object);
        let config = Self::read_fields(architecture, &mut fields, notes);
        let mut problems = fields.problems();
        problems.extend(check_known(&object, &known::DECODER, notes));
        match (config, problems.is_empty()) {
            (Some(config), true) => Ok(config),
            _ => Err(ModelError::Config(problems.join("; "))),
        }
    }

    /// Positions that a row attends to with as many multiplications as the rest of the row takes. For
    /// one layer this is the number of weights over twice the width of all query heads: once for the
    /// scores, once for the values.
    pub fn pairs_per_row(&self) -> u64 {
        let [hidden, inner, queries, keys] = [
            self.hidden_size,
            self.intermediate_size,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        ]
        .map(|size| size as u64);
        let weights = hidden * (2 * queries + 2 * keys + 3 * inner);
        (weights / (2 * queries)).max(1)
    }
}

impl Rope {
    /// Frequencies before they are scaled.
    pub(super) fn unscaled_frequencies(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2).map(|i| self.theta.powf(-2.0 * i as f64 / head_dim as f64)).collect()
    }

    /// Frequencies of the `head_dim / 2` pairs, in radians per position, and the factor on cosine and sine.
    ///
    /// Definitions as in transformers' `modeling_rope_utils`.
    pub fn frequencies(&self, head_dim: usize) -> (Vec<f64>, f64) {
        let plain = self.unscaled_frequencies(head_dim).into_iter();
        match self.scaling {
            RopeScaling::Default => (plain.collect(), 1.0),
            RopeScaling::Linear { factor } => (plain.map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low, high, original } => {
                let scaled = plain.map(|frequency| {
                    let wavelength = std::f64::consts::TAU / frequency;
                    if wavelength < original / high {
                        frequency
                    } else if wavelength > original / low {
                        frequency / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                });
                (scaled.collect(), 1.0)
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate } => {
                // The pair that makes `rotations` turns over the original context.
                let pair = |rotations: f64| {
                    head_dim as f64 * (original / (rotations * std::f64::consts::TAU)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let scaled = plain.enumerate().map(|(i, frequency)| {
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    frequency / factor * divided + frequency * (1.0 - divided)
                });
                (scaled.collect(), attention_factor)
            }
        }
    }
}
