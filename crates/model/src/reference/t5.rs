//! T5 in candle-nn (Raffel et al. 2020). Equations as in transformers.

use beamline_compute::cpu::activation::Activation;
use candle_core::{DType, Device, IndexOp as _, Module as _, Result, Tensor};
use candle_nn::{Embedding, Linear, RmsNorm, VarBuilder, embedding, linear_b, rms_norm};

use super::{Reference, attention, causal_mask, indices, last_row, norm, split_heads, var_builder};
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;
use crate::families::t5::config::T5Config;
use crate::families::t5::tensors::expected_tensors;

/// An encoder-decoder: weights, and the shapes that its equations need.
#[derive(Debug)]
pub struct T5Reference {
    config: T5Config,
    embedding: Embedding,
    encoder: Stack,
    decoder: Stack,
    head: Linear,
    dtype: DType,
    device: Device,
}

#[derive(Debug)]
struct Stack {
    blocks: Vec<Block>,
    /// `[buckets, heads]`, of the first block and for all.
    bias: Tensor,
    norm: RmsNorm,
    is_decoder: bool,
}

#[derive(Debug)]
struct Block {
    own: Attention,
    cross: Option<Attention>,
    mlp_norm: RmsNorm,
    /// One product, or two where the first gates the second; then the output.
    inner: Vec<Linear>,
    output: Linear,
}

#[derive(Debug)]
struct Attention {
    norm: RmsNorm,
    /// Queries, keys, values, output.
    projections: [Linear; 4],
}

impl T5Reference {
    /// Builds it from a checkpoint's tensors.
    ///
    /// # Errors
    ///
    /// When a tensor cannot be read.
    pub fn new(
        config: &T5Config,
        tensors: &Tensors,
        dtype: DType,
        device: &Device,
    ) -> std::result::Result<Self, ModelError> {
        let vb = var_builder(tensors, expected_tensors(config).into_keys(), dtype, device)?;
        let embedding = embedding(config.vocab_size, config.d_model, vb.pp("shared"))?;
        let head = match config.tied_head {
            true => Linear::new(embedding.embeddings().clone(), None),
            false => linear_b(config.d_model, config.vocab_size, false, vb.pp("lm_head"))?,
        };
        Ok(Self {
            encoder: Stack::new(config, &vb.pp("encoder"), config.encoder_layers, false)?,
            decoder: Stack::new(config, &vb.pp("decoder"), config.decoder_layers, true)?,
            config: config.clone(),
            embedding,
            head,
            dtype,
            device: device.clone(),
        })
    }
}

impl Stack {
    fn new(config: &T5Config, vb: &VarBuilder<'_>, layers: usize, is_decoder: bool) -> Result<Self> {
        let blocks = vb.pp("block");
        let first = blocks.pp(0).pp("layer").pp(0).pp("SelfAttention").pp("relative_attention_bias");
        Ok(Self {
            blocks: (0..layers)
                .map(|index| Block::new(config, &blocks.pp(index).pp("layer"), is_decoder))
                .collect::<Result<_>>()?,
            bias: first.get((config.buckets, config.num_heads), "weight")?,
            norm: rms_norm(config.d_model, f64::from(config.layer_norm_epsilon), vb.pp("final_layer_norm"))?,
            is_decoder,
        })
    }

    /// `[1, heads, rows, rows]`: what is added to the products of queries and keys.
    fn scores(&self, config: &T5Config, rows: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        let bucket = |row: usize, key: usize| bucket(key as i64 - row as i64, self.is_decoder, config);
        let buckets: Vec<u32> =
            (0..rows).flat_map(|row| (0..rows).map(move |key| bucket(row, key))).collect();
        let bias = self.bias.index_select(&Tensor::new(buckets, device)?, 0)?;
        let bias = bias.reshape((rows, rows, config.num_heads))?.permute((2, 0, 1))?.unsqueeze(0)?;
        match self.is_decoder {
            true => bias.broadcast_add(&causal_mask(rows, dtype, device)?),
            false => bias.contiguous(),
        }
    }

    fn forward(&self, config: &T5Config, x: Tensor, encoded: Option<&Tensor>) -> Result<Tensor> {
        let scores = self.scores(config, x.dim(1)?, x.dtype(), x.device())?;
        let mut x = x;
        for block in &self.blocks {
            x = block.own.forward(config, &x, None, Some(&scores))?;
            if let (Some(cross), Some(encoded)) = (&block.cross, encoded) {
                x = cross.forward(config, &x, Some(encoded), None)?;
            }
            x = block.feed_forward(config, &x)?;
        }
        norm(&self.norm, &x)
    }
}

impl Block {
    fn new(config: &T5Config, vb: &VarBuilder<'_>, is_decoder: bool) -> Result<Self> {
        let last = vb.pp(if is_decoder { 2 } else { 1 });
        let eps = f64::from(config.layer_norm_epsilon);
        let names: &[&str] = if config.gated { &["wi_0", "wi_1"] } else { &["wi"] };
        let dense = last.pp("DenseReluDense");
        let inner = |name: &&str| linear_b(config.d_model, config.d_ff, false, dense.pp(name));
        Ok(Self {
            own: Attention::new(config, &vb.pp(0), "SelfAttention")?,
            cross: match is_decoder {
                true => Some(Attention::new(config, &vb.pp(1), "EncDecAttention")?),
                false => None,
            },
            mlp_norm: rms_norm(config.d_model, eps, last.pp("layer_norm"))?,
            inner: names.iter().map(inner).collect::<Result<_>>()?,
            output: linear_b(config.d_ff, config.d_model, false, dense.pp("wo"))?,
        })
    }

    fn feed_forward(&self, config: &T5Config, x: &Tensor) -> Result<Tensor> {
        let normed = norm(&self.mlp_norm, x)?;
        let mut products = self.inner.iter().map(|product| product.forward(&normed));
        let Some(first) = products.next() else { return x + normed };
        let mut inner = activated(config.activation, &first?)?;
        if let Some(gated) = products.next() {
            inner = (inner * gated?)?;
        }
        x + self.output.forward(&inner)?
    }
}

impl Attention {
    fn new(config: &T5Config, vb: &VarBuilder<'_>, name: &str) -> Result<Self> {
        let (width, inner) = (config.d_model, config.num_heads * config.d_kv);
        let project = |part: &str, from, to| linear_b(from, to, false, vb.pp(name).pp(part));
        Ok(Self {
            norm: rms_norm(width, f64::from(config.layer_norm_epsilon), vb.pp("layer_norm"))?,
            projections: [
                project("q", width, inner)?,
                project("k", width, inner)?,
                project("v", width, inner)?,
                project("o", inner, width)?,
            ],
        })
    }

    /// `seen` is what keys and values are made of; the rows themselves where there is none.
    fn forward(
        &self,
        config: &T5Config,
        x: &Tensor,
        seen: Option<&Tensor>,
        scores: Option<&Tensor>,
    ) -> Result<Tensor> {
        let [q, k, v, output] = &self.projections;
        let normed = norm(&self.norm, x)?;
        let seen = seen.unwrap_or(&normed);
        let split = |product: &Linear, rows: &Tensor| split_heads(&product.forward(rows)?, config.num_heads);
        let (q, k, v) = (split(q, &normed)?, split(k, seen)?, split(v, seen)?);
        x + output.forward(&attention([&q, &k, &v], 1.0, scores)?)?
    }
}

fn activated(activation: Activation, x: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Relu => x.relu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Silu => x.silu(),
    }
}

/// The bucket of a distance, key minus query. A decoder sees what is behind only.
fn bucket(offset: i64, is_decoder: bool, config: &T5Config) -> u32 {
    let (mut first, mut count) = (0, config.buckets);
    let distance = if is_decoder {
        (-offset).max(0)
    } else {
        count /= 2;
        first = if offset > 0 { count } else { 0 };
        offset.abs()
    } as usize;
    let exact = count / 2;
    let within = if distance < exact {
        distance
    } else {
        let ratio = (distance as f32 / exact as f32).ln() / (config.max_distance as f32 / exact as f32).ln();
        (exact + (ratio * (count - exact) as f32) as usize).min(count - 1)
    };
    (first + within) as u32
}

impl Reference for T5Reference {
    fn logits(&self, context: &[u32]) -> Result<Vec<f64>> {
        let embedded = self.embedding.forward(&indices(context, &self.device)?)?.unsqueeze(0)?;
        let rows = context.len() - 1;
        let encoded = self.encoder.forward(&self.config, embedded.i((.., ..rows))?.contiguous()?, None)?;
        let start = embedded.i((.., rows..))?.contiguous()?;
        let mut x = self.decoder.forward(&self.config, start, Some(&encoded))?;
        if self.config.scales_output {
            x = (x * (self.config.d_model as f64).powf(-0.5))?;
        }
        debug_assert_eq!(x.dtype(), self.dtype);
        last_row(&self.head.forward(&x)?)
    }
}
