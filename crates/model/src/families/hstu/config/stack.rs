//! The layers: the same fields in all variants.

use beamline_compute::cpu::mask::Mask;
use beamline_compute::cpu::time_buckets::{TIME_BUCKETS, TIME_DIVISOR};
use serde::Deserialize;

use super::checks::{MAX_SIZE, epsilon, in_range, nullable, positive, require, size};
use super::{Scale, Variant};

/// Constants of the layers.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StackConfig {
    /// Width of the residual stream, D.
    pub model_dim: usize,
    /// Number of layers.
    pub layers: usize,
    /// Number of heads, H.
    pub heads: usize,
    /// Width of a query and key, dqk.
    pub key_dim: usize,
    /// Width of a value and of a head of u, dv.
    pub value_dim: usize,
    /// Norm of the layer's input.
    pub input_norm: LayerNormConfig,
    /// Whether the uvqk projection has a bias.
    pub uvqk_bias: bool,
    /// How the uvqk weight lies in the file; its outputs are u, v, q, k, each head by head.
    pub uvqk_layout: Layout,
    /// What passes SiLU after the projection.
    pub silu: SiluScope,
    /// Factor of the inner product of query and key.
    pub logit_scale: Scale,
    /// Divisor of the attention: a constant of the checkpoint, whatever the length of a history.
    pub attention_divisor: f64,
    /// Relative bias of position and time, or null.
    #[serde(deserialize_with = "nullable")]
    pub relative_bias: Option<RelativeBiasConfig>,
    /// Who sees whom.
    pub mask: MaskConfig,
    /// Norm of the attention's output.
    pub output_norm: OutputNormConfig,
    /// What the output projection reads.
    pub output_parts: OutputParts,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// How the output weight lies in the file.
    pub output_layout: Layout,
    /// Whether the layer's input is added to its output.
    pub residual: bool,
}

/// A layer norm.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerNormConfig {
    /// Whether it has weight and bias.
    pub affine: bool,
    /// Epsilon of the norm.
    pub eps: f64,
}

/// Norm of the attention's output.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputNormConfig {
    /// Over all heads, or over each.
    pub kind: NormKind,
    /// Whether it has weight and bias; over each head these are one number per head.
    pub affine: bool,
    /// Epsilon of the norm.
    pub eps: f64,
}

/// Over what a norm goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// All heads together.
    Layer,
    /// Each head by itself.
    Group,
}

/// Order of the dimensions of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// Input dimension first: `[inputs, outputs]`.
    InOut,
    /// Output dimension first: `[outputs, inputs]`.
    OutIn,
}

/// What passes SiLU after the uvqk projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SiluScope {
    /// All four: u, v, q and k.
    Uvqk,
    /// The gate u only.
    U,
    /// None of the four.
    None,
}

/// What the output projection reads, with u, a the attention's output, and n its norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputParts {
    /// The gated norm, `u * n`.
    Gated,
    /// `[u, a, u * n]`: the raw output.
    ConcatRaw,
    /// `[u, n, u * n]`: the normed output.
    ConcatNormed,
}

impl OutputParts {
    /// How many times the width of all values.
    pub fn count(self) -> usize {
        match self {
            Self::Gated => 1,
            Self::ConcatRaw | Self::ConcatNormed => 3,
        }
    }
}

/// Relative bias of position and time.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelativeBiasConfig {
    /// Positions N; there are 2N - 1 differences.
    pub positions: usize,
    /// Highest time bucket; there is one weight more.
    pub time_buckets: usize,
    /// Divisor of the logarithm. The thresholds of the buckets are those of 0.301.
    pub time_divisor: f64,
}

/// Who sees whom: see [`Mask`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskConfig {
    /// Contextual rows that see the whole context; 0 where they are but the beginning of a causal sequence.
    pub contextual_len: usize,
    /// `max_attn_len`; 0 for none.
    pub max_attention_len: usize,
    /// `min_full_attn_seq_len`; 0 for none.
    pub min_full_attention_len: usize,
}

impl From<MaskConfig> for Mask {
    fn from(config: MaskConfig) -> Self {
        Self {
            contextual: config.contextual_len,
            window: config.max_attention_len,
            full_tail: config.min_full_attention_len,
        }
    }
}

impl StackConfig {
    /// Positions that a row attends to with as many multiplications as the rest of the row takes. For
    /// one layer this is the number of weights over the widths of all keys, for the scores, plus those
    /// of all values. The activation of a pair costs about as much again.
    pub fn pairs_per_row(&self) -> u64 {
        let [dim, keys, values, parts] =
            [self.model_dim, self.heads * self.key_dim, self.values(), self.output_parts.count()]
                .map(|size| size as u64);
        let weights = dim * (2 * values + 2 * keys + parts * values);
        (weights / (2 * (keys + values))).max(1)
    }

    /// Width of the attention's output: all values.
    pub fn values(&self) -> usize {
        self.heads * self.value_dim
    }

    /// Width of all keys.
    pub fn keys(&self) -> usize {
        self.heads * self.key_dim
    }

    /// Width of the uvqk projection's output.
    pub fn uvqk(&self) -> usize {
        2 * (self.values() + self.keys())
    }

    /// Checks what must hold of the layers of a variant.
    ///
    /// # Errors
    ///
    /// What does not hold, in words.
    pub fn check(&self, variant: Variant) -> Result<(), String> {
        size("stack.model_dim", self.model_dim)?;
        in_range("stack.layers", self.layers, 4096)?;
        in_range("stack.heads", self.heads, 4096)?;
        in_range("stack.key_dim", self.key_dim, 4096)?;
        in_range("stack.value_dim", self.value_dim, 4096)?;
        epsilon("stack.input_norm.eps", self.input_norm.eps)?;
        epsilon("stack.output_norm.eps", self.output_norm.eps)?;
        self.logit_scale.check("stack.logit_scale")?;
        positive("stack.attention_divisor", self.attention_divisor).map_err(|error| {
            format!(
                "{error}: it is a constant of the checkpoint (scaling_seqlen, or the longest sequence of training); \
                 the length of a batch would make an answer depend on what shares it"
            )
        })?;
        let mask = self.mask;
        for (name, value) in [
            ("stack.mask.contextual_len", mask.contextual_len),
            ("stack.mask.max_attention_len", mask.max_attention_len),
            ("stack.mask.min_full_attention_len", mask.min_full_attention_len),
        ] {
            require(value <= MAX_SIZE, &format!("{name} is {value}, more than {MAX_SIZE}"))?;
        }
        if let Some(bias) = self.relative_bias {
            size("stack.relative_bias.positions", bias.positions)?;
            in_range("stack.relative_bias.time_buckets", bias.time_buckets, TIME_BUCKETS - 1)?;
            require(
                bias.time_divisor == TIME_DIVISOR,
                &format!(
                    "stack.relative_bias.time_divisor is {}, only {TIME_DIVISOR} is implemented",
                    bias.time_divisor
                ),
            )?;
            require(Mask::from(mask).is_causal(), "stack.relative_bias needs a causal mask")?;
        }
        match variant {
            Variant::Research => {
                require(
                    (self.uvqk_layout, self.output_layout) == (Layout::InOut, Layout::OutIn),
                    "research checkpoints have stack.uvqk_layout \"in_out\" and stack.output_layout \"out_in\"",
                )?;
                require(
                    !self.input_norm.affine && !self.output_norm.affine && !self.uvqk_bias,
                    "research checkpoints have no tensors for affine norms or a uvqk bias",
                )
            }
            Variant::Dlrm => {
                require(
                    (self.uvqk_layout, self.output_layout) == (Layout::InOut, Layout::InOut),
                    "dlrm checkpoints have stack.uvqk_layout and stack.output_layout \"in_out\"",
                )?;
                require(
                    self.relative_bias.is_none() && !self.output_bias,
                    "dlrm checkpoints have no tensors for a relative bias or an output bias",
                )
            }
            Variant::Nvidia => {
                require(
                    self.uvqk_layout == self.output_layout,
                    "nvidia checkpoints have one layout: both \"in_out\" (fused) or both \"out_in\" (inference)",
                )?;
                require(
                    self.relative_bias.is_none() && !self.output_bias,
                    "nvidia checkpoints have no tensors for a relative bias or an output bias",
                )
            }
        }
    }
}
