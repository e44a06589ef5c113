//! config.json: which architecture, which sizes.
//!
//! Both current spellings are read: `rope_theta` and `rope_scaling` at the top, or `rope_parameters`. A field that
//! would change the arithmetic in a way this build does not implement is an error, never ignored.

use serde::Deserialize;
use serde_json::Value;

use super::note::Note;
use super::{Described, Expected};
use crate::error::ModelError;
use crate::families::qwen::expected_tensors;

/// Largest value accepted for any size, so that products of sizes cannot overflow.
const MAX_SIZE: usize = 1 << 24;

/// A decoder of the Llama family tree.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Architecture.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the output matrix, padding rows included.
    pub vocab_size: usize,
    /// Positions the model was made for.
    pub max_positions: usize,
    /// Epsilon of the norms.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
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

/// What `architectures` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Qwen3ForCausalLM.
    Qwen3,
    /// Qwen2ForCausalLM.
    Qwen2,
    /// LlamaForCausalLM.
    Llama,
}

impl Architecture {
    /// The name in config.json.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
        }
    }
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
        /// The factor.
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
        /// Context extension.
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

#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    architectures: Vec<String>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    #[serde(default)]
    use_sliding_window: bool,
    #[serde(default)]
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
}

impl Described for Config {
    fn read(json: &str, _notes: &mut Vec<Note>) -> Result<Self, ModelError> {
        Self::parse(json)
    }

    fn expected(&self) -> Expected {
        let optional = if self.tied_head { vec!["lm_head.weight"] } else { Vec::new() };
        Expected { shapes: expected_tensors(self), optional }
    }
}

impl Config {
    /// Parses config.json.
    ///
    /// # Errors
    ///
    /// When a field is missing or contradictory, or asks for something that is not implemented.
    pub fn parse(json: &str) -> Result<Self, ModelError> {
        let error = |reason: String| ModelError::Config(reason);
        let value: Value = serde_json::from_str(json).map_err(|e| error(e.to_string()))?;
        let architecture = match value["architectures"]
            .as_array()
            .and_then(|a| a.first())
            .and_then(Value::as_str)
        {
            Some("Qwen3ForCausalLM") => Architecture::Qwen3,
            Some("Qwen2ForCausalLM") => Architecture::Qwen2,
            Some("LlamaForCausalLM") => Architecture::Llama,
            Some(other) => {
                return Err(error(format!(
                    "architecture {other:?} is not served; known are Qwen3ForCausalLM, Qwen2ForCausalLM and \
                     LlamaForCausalLM"
                )));
            }
            None => return Err(error("`architectures` is missing".into())),
        };
        let raw: Raw = serde_path_to_error::deserialize(value).map_err(|e| error(e.to_string()))?;
        if raw.architectures.len() != 1 {
            return Err(error("`architectures` names more than one".into()));
        }
        let act = raw.hidden_act.as_deref().unwrap_or("silu");
        if act != "silu" {
            return Err(error(format!("hidden_act {act:?} is not implemented, only \"silu\"")));
        }
        if raw.quantization_config.is_some() {
            return Err(error("quantised checkpoints are not served; bring f32, bf16 or f16 weights".into()));
        }
        let sliding = raw.layer_types.iter().flatten().any(|kind| kind != "full_attention");
        if raw.use_sliding_window || sliding {
            return Err(error("sliding-window attention is not implemented".into()));
        }
        let sizes = [
            ("hidden_size", raw.hidden_size),
            ("intermediate_size", raw.intermediate_size),
            ("num_hidden_layers", raw.num_hidden_layers),
            ("num_attention_heads", raw.num_attention_heads),
            ("num_key_value_heads", raw.num_key_value_heads.unwrap_or(1)),
            ("head_dim", raw.head_dim.unwrap_or(1)),
            ("vocab_size", raw.vocab_size),
            ("max_position_embeddings", raw.max_position_embeddings),
        ];
        if let Some((name, size)) = sizes.into_iter().find(|&(_, size)| size == 0 || size > MAX_SIZE) {
            return Err(error(format!("{name} is {size}, expected 1 to {MAX_SIZE}")));
        }
        let heads = raw.num_attention_heads;
        let kv_heads = raw.num_key_value_heads.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(error(format!("{heads} attention heads cannot share {kv_heads} key-value heads")));
        }
        if raw.head_dim.is_none() && !raw.hidden_size.is_multiple_of(heads) {
            return Err(error(format!("hidden_size {} is not a multiple of {heads} heads", raw.hidden_size)));
        }
        let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / heads);
        if !head_dim.is_multiple_of(2) {
            return Err(error(format!("head_dim {head_dim} is odd, rotary embedding needs pairs")));
        }
        if !(raw.rms_norm_eps.is_finite() && raw.rms_norm_eps >= 0.0) {
            return Err(error(format!("rms_norm_eps is {}", raw.rms_norm_eps)));
        }
        let rope = Rope::parse(&raw)?;
        let attention_bias = raw.attention_bias.unwrap_or(false);
        Ok(Self {
            architecture,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads,
            kv_heads,
            head_dim,
            vocab_size: raw.vocab_size,
            max_positions: raw.max_position_embeddings,
            rms_norm_eps: raw.rms_norm_eps as f32,
            rope,
            tied_head: raw.tie_word_embeddings.unwrap_or(false),
            qkv_bias: architecture == Architecture::Qwen2 || attention_bias,
            output_bias: architecture != Architecture::Qwen2 && attention_bias,
            mlp_bias: architecture == Architecture::Llama && raw.mlp_bias.unwrap_or(false),
            qk_norm: architecture == Architecture::Qwen3,
        })
    }

    /// Bytes of keys and values per context position in single precision.
    pub fn kv_bytes_per_position(&self) -> usize {
        self.layers * self.kv_heads * self.head_dim * 2 * 4
    }
}

impl Rope {
    fn parse(raw: &Raw) -> Result<Self, ModelError> {
        let error = |reason: String| ModelError::Config(reason);
        let parameters =
            raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref()).filter(|value| !value.is_null());
        let number = |name: &str| parameters.and_then(|p| p.get(name)).and_then(Value::as_f64);
        let theta = number("rope_theta").or(raw.rope_theta).unwrap_or(10_000.0);
        if !(theta.is_finite() && theta > 0.0) {
            return Err(error(format!("rope_theta is {theta}")));
        }
        let kind = parameters
            .and_then(|p| p.get("rope_type").or_else(|| p.get("type")))
            .map_or(Some("default"), Value::as_str)
            .ok_or_else(|| error("rope_type is not a string".into()))?;
        if parameters.is_some_and(|p| p.as_object().is_none_or(|o| o.values().any(Value::is_object))) {
            return Err(error("rope parameters per layer type are not implemented".into()));
        }
        let positive = |name: &str, default: Option<f64>| {
            number(name)
                .or(default)
                .filter(|value| value.is_finite() && *value > 0.0)
                .ok_or_else(|| error(format!("rope type {kind:?} needs a positive {name}")))
        };
        let positions = raw.max_position_embeddings as f64;
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: positive("factor", None)? },
            "llama3" => RopeScaling::Llama3 {
                factor: positive("factor", None)?,
                low: positive("low_freq_factor", None)?,
                high: positive("high_freq_factor", None)?,
                original: positive("original_max_position_embeddings", Some(positions))?,
            },
            "yarn" => {
                let original = positive("original_max_position_embeddings", Some(positions))?;
                let factor = positive("factor", Some(positions / original))?;
                RopeScaling::Yarn {
                    factor,
                    original,
                    beta_fast: positive("beta_fast", Some(32.0))?,
                    beta_slow: positive("beta_slow", Some(1.0))?,
                    attention_factor: yarn_attention_factor(factor, &number)?,
                    truncate: parameters
                        .and_then(|p| p.get("truncate"))
                        .and_then(Value::as_bool)
                        .unwrap_or(true),
                }
            }
            other => {
                return Err(error(format!(
                    "rope type {other:?} is not served; known are default, linear, llama3 and yarn. Types whose \
                     frequencies change with the length of the request (dynamic, longrope) cannot share cached keys"
                )));
            }
        };
        Ok(Self { theta, scaling })
    }

    /// Frequencies of the `head_dim / 2` pairs, in radians per position, and the factor on cosine and sine.
    ///
    /// Definitions as in transformers' `modeling_rope_utils`.
    pub fn frequencies(&self, head_dim: usize) -> (Vec<f64>, f64) {
        let plain = (0..head_dim / 2).map(|i| self.theta.powf(-2.0 * i as f64 / head_dim as f64));
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

/// YaRN's factor on cosine and sine: given, or from the extension and the `mscale` fields.
fn yarn_attention_factor(factor: f64, number: &impl Fn(&str) -> Option<f64>) -> Result<f64, ModelError> {
    let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let value = match (number("attention_factor"), number("mscale"), number("mscale_all_dim")) {
        (Some(given), _, _) => given,
        (None, Some(scale), Some(all)) if scale != 0.0 && all != 0.0 => mscale(scale) / mscale(all),
        _ => mscale(1.0),
    };
    if value.is_finite() && value > 0.0 {
        Ok(value)
    } else {
        Err(ModelError::Config(format!("YaRN attention factor is {value}")))
    }
}
