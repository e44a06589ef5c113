//! The layers of HSTU, over one whole sequence `context | candidates`.
//!
//! ```text
//! u, v, q, k = split(norm(x) W (+ b)), with SiLU on all of them, on u, or on none
//! a          = mask * silu(scale * q.k + bias) / divisor  v
//! x          = (x +) parts(u, a, norm(a)) Wo (+ bo)
//! ```
//!
//! Zhai et al. 2024, equations 1 to 3.

use candle_core::{Module as _, Result, Tensor};
use candle_nn::{Linear, VarBuilder};

use super::factor;
use super::pairs::Pairs;
use super::parts::{Norm, weight};
use crate::families::hstu::config::{
    Layout, NormKind, OutputParts, RelativeBiasConfig, SiluScope, StackConfig, Variant,
};

/// All layers of a model.
#[derive(Debug)]
pub struct HstuLayers {
    config: StackConfig,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    input_norm: Norm,
    uvqk: Linear,
    /// Weights of distances in rows, `[2 * positions - 1]`, and of time buckets, `[time_buckets +
    /// 1]`.
    bias: Option<[Tensor; 2]>,
    output_norm: Norm,
    output: Linear,
}

impl HstuLayers {
    /// Takes the layers from tensors whose names begin with their numbers.
    ///
    /// # Errors
    ///
    /// When a tensor is missing or has another shape.
    pub fn new(config: &StackConfig, variant: Variant, vb: &VarBuilder<'_>) -> Result<Self> {
        let layer = |index: usize| Layer::new(config, variant, &vb.pp(index));
        Ok(Self { config: config.clone(), layers: (0..config.layers).map(layer).collect::<Result<_>>()? })
    }

    /// Final states `[rows, model_dim]` of rows of the same shape, of which the first `context` are
    /// no candidates. `times` are those of the rows and, last, of the query; they count where there
    /// is a relative bias.
    ///
    /// # Errors
    ///
    /// When candle fails.
    pub fn forward(&self, rows: &Tensor, context: usize, times: &[i64]) -> Result<Tensor> {
        let pairs = Pairs::new(&self.config, rows, context, times)?;
        self.layers.iter().try_fold(rows.clone(), |rows, layer| layer.forward(&rows, &self.config, &pairs))
    }
}

impl Layer {
    fn new(config: &StackConfig, variant: Variant, vb: &VarBuilder<'_>) -> Result<Self> {
        let fused = config.uvqk_layout == Layout::InOut;
        let [uvqk, uvqk_bias, input_norm, output_norm, output, output_bias] = match variant {
            Variant::Research => ["_uvqk", "", "", "", "_o.weight", "_o.bias"],
            Variant::Dlrm => {
                ["_uvqk_weight", "_uvqk_beta", "_input_norm_", "_output_norm_", "_output_weight", ""]
            }
            Variant::Nvidia => {
                let [uvqk, bias, output] = match fused {
                    true => ["_linear_uvqk_weight", "_linear_uvqk_bias", "_linear_proj_weight"],
                    false => ["_linear_uvqk.weight", "_linear_uvqk.bias", "_linear_proj.weight"],
                };
                [uvqk, bias, "_input_layernorm_", "_output_layernorm_", output, ""]
            }
        };
        let (width, values) = (config.model_dim, config.heads * config.value_dim);
        let columns = 2 * values + 2 * config.heads * config.key_dim;
        let parts = if config.output_parts == OutputParts::Gated { 1 } else { 3 };
        let linear = |sizes: [usize; 2], layout, name: &str, bias: Option<&str>| -> Result<Linear> {
            let bias = bias.map(|bias| vb.get(sizes[1], bias)).transpose()?;
            Ok(Linear::new(weight(sizes, layout, vb, name)?, bias))
        };
        let norm = |affine: bool, width, eps, name: &str| match affine {
            true => Norm::affine(width, eps, vb, name),
            false => Norm::plain(eps, vb),
        };
        let (before, after) = (config.input_norm, config.output_norm);
        let bias = vb.pp("_rel_attn_bias");
        Ok(Self {
            input_norm: norm(before.affine, width, before.eps, input_norm)?,
            uvqk: linear([width, columns], config.uvqk_layout, uvqk, config.uvqk_bias.then_some(uvqk_bias))?,
            bias: match config.relative_bias {
                None => None,
                Some(RelativeBiasConfig { positions, time_buckets, .. }) => {
                    Some([bias.get(2 * positions - 1, "_pos_w")?, bias.get(time_buckets + 1, "_ts_w")?])
                }
            },
            output_norm: match after.kind {
                NormKind::Layer => norm(after.affine, values, after.eps, output_norm)?,
                NormKind::Group => norm(after.affine, config.heads, after.eps, output_norm)?.of_heads()?,
            },
            output: linear(
                [parts * values, width],
                config.output_layout,
                output,
                config.output_bias.then_some(output_bias),
            )?,
        })
    }

    fn forward(&self, x: &Tensor, config: &StackConfig, pairs: &Pairs) -> Result<Tensor> {
        let (rows, heads) = (x.dim(0)?, config.heads);
        let [values, keys] = [heads * config.value_dim, heads * config.key_dim];
        let uvqk = self.uvqk.forward(&self.input_norm.forward(x)?)?;
        let part = |start: usize, width: usize, activated: bool| {
            let part = uvqk.narrow(1, start, width)?;
            if activated { part.silu() } else { part.contiguous() }
        };
        // `[rows, heads * dim]` to `[heads, rows, dim]`.
        let split = |part: Tensor| part.reshape((rows, heads, ()))?.transpose(0, 1)?.contiguous();
        let all = config.silu == SiluScope::Uvqk;
        let u = part(0, values, config.silu != SiluScope::None)?;
        let v = split(part(values, values, all)?)?;
        let q = split(part(2 * values, keys, all)?)?;
        let k = split(part(2 * values + keys, keys, all)?)?;
        let mut scores = (q.matmul(&k.t()?.contiguous()?)? * factor(config.logit_scale, config))?;
        if let (Some(weights), Some(places)) = (&self.bias, &pairs.bias) {
            for (weights, places) in weights.iter().zip(places) {
                scores = scores.broadcast_add(&weights.index_select(places, 0)?.reshape((rows, rows))?)?;
            }
        }
        let weights = (scores.silu()? / config.attention_divisor)?.broadcast_mul(&pairs.mask)?;
        let a = weights.matmul(&v)?.transpose(0, 1)?.contiguous()?;
        let flat = |x: &Tensor| x.reshape((rows, values));
        let normed = match config.output_norm.kind {
            NormKind::Layer => self.output_norm.forward(&flat(&a)?)?,
            NormKind::Group => flat(&self.output_norm.forward(&a)?)?,
        };
        let gated = (&u * &normed)?;
        let y = match config.output_parts {
            OutputParts::Gated => gated,
            OutputParts::ConcatRaw => Tensor::cat(&[&u, &flat(&a)?, &gated], 1)?,
            OutputParts::ConcatNormed => Tensor::cat(&[&u, &normed, &gated], 1)?,
        };
        let y = self.output.forward(&y)?;
        if config.residual { x + y } else { Ok(y) }
    }
}
