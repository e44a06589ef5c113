//! Qwen3, Qwen2 and Llama in candle-nn. Equations as in transformers.

use candle_core::{DType, Device, Module as _, Result, Tensor};
use candle_nn::rotary_emb::rope_slow;
use candle_nn::{Embedding, Linear, RmsNorm, VarBuilder, embedding, linear_b, rms_norm};

use super::{Reference, attention, causal_mask, indices, last_row, norm, split_heads, var_builder};
use crate::checkpoint::config::Config;
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;
use crate::families::decoder::expected_tensors;

/// A decoder: weights, and the shapes that its equations need.
#[derive(Debug)]
pub struct DecoderReference {
    config: Config,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    dtype: DType,
    device: Device,
}

#[derive(Debug)]
struct Layer {
    input_norm: RmsNorm,
    /// Queries, keys, values, output.
    projections: [Linear; 4],
    qk_norms: Option<[RmsNorm; 2]>,
    mlp_norm: RmsNorm,
    /// Gate, up, down.
    mlp: [Linear; 3],
}

impl DecoderReference {
    /// Builds it from a checkpoint's tensors.
    ///
    /// # Errors
    ///
    /// When a tensor cannot be read.
    pub fn new(
        config: &Config,
        tensors: &Tensors,
        dtype: DType,
        device: &Device,
    ) -> std::result::Result<Self, ModelError> {
        let names = expected_tensors(config).into_keys();
        let vb = var_builder(tensors, names, dtype, device)?;
        let (width, vocab) = (config.hidden_size, config.vocab_size);
        let model = vb.pp("model");
        let embedding = embedding(vocab, width, model.pp("embed_tokens"))?;
        let head = match config.tied_head {
            true => Linear::new(embedding.embeddings().clone(), None),
            false => linear_b(width, vocab, false, vb.pp("lm_head"))?,
        };
        let layers = (0..config.layers)
            .map(|index| Layer::new(config, &model.pp("layers").pp(index)))
            .collect::<Result<_>>()?;
        Ok(Self {
            norm: rms_norm(width, f64::from(config.rms_norm_eps), model.pp("norm"))?,
            config: config.clone(),
            embedding,
            layers,
            head,
            dtype,
            device: device.clone(),
        })
    }

    /// Cosine and sine of every position, `[rows, head_dim / 2]`.
    fn rotation(&self, rows: usize) -> Result<[Tensor; 2]> {
        let (frequencies, scale) = self.config.rope.frequencies(self.config.head_dim);
        let of = |turn: fn(f64) -> f64| {
            let angles = (0..rows).flat_map(|row| frequencies.iter().map(move |f| row as f64 * f));
            let values: Vec<f64> = angles.map(|angle| turn(angle) * scale).collect();
            Tensor::from_vec(values, (rows, frequencies.len()), &self.device)?.to_dtype(self.dtype)
        };
        Ok([of(f64::cos)?, of(f64::sin)?])
    }
}

impl Layer {
    fn new(config: &Config, vb: &VarBuilder<'_>) -> Result<Self> {
        let (width, inner, eps) =
            (config.hidden_size, config.intermediate_size, f64::from(config.rms_norm_eps));
        let (query, key) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let attention = vb.pp("self_attn");
        let project = |name: &str, from, to, bias| linear_b(from, to, bias, attention.pp(name));
        let mlp = |name: &str, from, to| linear_b(from, to, config.mlp_bias, vb.pp("mlp").pp(name));
        let head_norm = |name: &str| rms_norm(config.head_dim, eps, attention.pp(name));
        Ok(Self {
            input_norm: rms_norm(width, eps, vb.pp("input_layernorm"))?,
            projections: [
                project("q_proj", width, query, config.qkv_bias)?,
                project("k_proj", width, key, config.qkv_bias)?,
                project("v_proj", width, key, config.qkv_bias)?,
                project("o_proj", query, width, config.output_bias)?,
            ],
            qk_norms: match config.qk_norm {
                true => Some([head_norm("q_norm")?, head_norm("k_norm")?]),
                false => None,
            },
            mlp_norm: rms_norm(width, eps, vb.pp("post_attention_layernorm"))?,
            mlp: [
                mlp("gate_proj", width, inner)?,
                mlp("up_proj", width, inner)?,
                mlp("down_proj", inner, width)?,
            ],
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        config: &Config,
        [cos, sin]: &[Tensor; 2],
        mask: &Tensor,
    ) -> Result<Tensor> {
        let [q, k, v, output] = &self.projections;
        let normed = norm(&self.input_norm, x)?;
        let turned = |projection: &Linear, heads: usize, which: usize| {
            let split = split_heads(&projection.forward(&normed)?, heads)?;
            let split = match &self.qk_norms {
                Some(norms) => norm(&norms[which], &split)?,
                None => split,
            };
            rope_slow(&split, cos, sin)
        };
        let (q, k) = (turned(q, config.heads, 0)?, turned(k, config.kv_heads, 1)?);
        let v = split_heads(&v.forward(&normed)?, config.kv_heads)?;
        let (k, v) = (repeated(&k, config.heads)?, repeated(&v, config.heads)?);
        let factor = 1.0 / (config.head_dim as f64).sqrt();
        let x = (x + output.forward(&attention([&q, &k, &v], factor, Some(mask))?)?)?;
        let [gate, up, down] = &self.mlp;
        let normed = norm(&self.mlp_norm, &x)?;
        let inner = (gate.forward(&normed)?.silu()? * up.forward(&normed)?)?;
        x + down.forward(&inner)?
    }
}

/// A key-value head for every query head: those of a group share one.
fn repeated(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, shared, rows, dim) = x.dims4()?;
    let grouped = x.unsqueeze(2)?.expand((batch, shared, heads / shared, rows, dim))?;
    grouped.reshape((batch, heads, rows, dim))
}

impl Reference for DecoderReference {
    fn logits(&self, context: &[u32]) -> Result<Vec<f64>> {
        let mut x = self.embedding.forward(&indices(context, &self.device)?)?.unsqueeze(0)?;
        let rotation = self.rotation(context.len())?;
        let mask = causal_mask(context.len(), self.dtype, &self.device)?;
        for layer in &self.layers {
            x = layer.forward(&x, &self.config, &rotation, &mask)?;
        }
        last_row(&self.head.forward(&norm(&self.norm, &x)?)?)
    }
}
