//! Every family a second time, as a plain candle-nn module: a second opinion.
//!
//! ```text
//! decoder       Qwen3, Qwen2, Llama
//! t5            encoder-decoders
//! hstu          HSTU in its three variants
//! verify        the engine beside its reference on random prompts
//! verify_hstu   the same for HSTU, on random requests
//! ```
//!
//! Place in the flow: tests and `beamline inspect --verify` ask it; nothing that serves does. One request
//! at a time, no cache, no batches, on any candle device, in single or double precision.
//!
//! Invariant: nothing here uses a kernel, a layout or an executor of the engine. It shares only what was
//! read of config.json, and the tensors.

mod decoder;
mod hstu;
mod t5;
pub mod verify;
pub mod verify_hstu;

use std::collections::HashMap;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{RmsNorm, VarBuilder};

use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;

pub use decoder::DecoderReference;
pub use hstu::{HstuLayers, HstuReference};
pub use t5::T5Reference;

/// A model of tokens that says what follows a context.
pub trait Reference {
    /// Logits of the token after a context, `[vocab_size]`, padding rows included. The context of an
    /// encoder-decoder is that of a request: the tokens of the encoder, then one that the decoder starts with.
    ///
    /// # Errors
    ///
    /// When candle fails.
    fn logits(&self, context: &[u32]) -> Result<Vec<f64>>;
}

/// The tensors of a checkpoint for candle-nn.
pub(crate) fn var_builder(
    tensors: &Tensors,
    names: impl Iterator<Item = String>,
    dtype: DType,
    device: &Device,
) -> std::result::Result<VarBuilder<'static>, ModelError> {
    let load = |name: String| Ok((name.clone(), tensors.load(&name)?));
    let loaded = names.map(load).collect::<std::result::Result<HashMap<_, _>, ModelError>>()?;
    Ok(VarBuilder::from_tensors(loaded, dtype, device))
}

/// `[tokens]` as indices.
fn indices(tokens: &[u32], device: &Device) -> Result<Tensor> {
    Tensor::new(tokens, device)
}

/// Root-mean-square norm in any type: candle's own kernel knows single precision at most.
fn norm(norm: &RmsNorm, x: &Tensor) -> Result<Tensor> {
    norm.forward_diff(x)
}

/// `[1, rows, heads * dim]` to `[1, heads, rows, dim]`.
fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, rows, width) = x.dims3()?;
    x.reshape((batch, rows, heads, width / heads))?.transpose(1, 2)?.contiguous()
}

/// Attention of all heads, `scores` being what is added to the products of queries and keys.
fn attention([q, k, v]: [&Tensor; 3], factor: f64, scores: Option<&Tensor>) -> Result<Tensor> {
    let products = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * factor)?;
    let products = match scores {
        Some(scores) => products.broadcast_add(scores)?,
        None => products,
    };
    let found = candle_nn::ops::softmax(&products, D::Minus1)?.matmul(v)?;
    let (batch, heads, rows, dim) = found.dims4()?;
    found.transpose(1, 2)?.reshape((batch, rows, heads * dim))
}

/// `[1, 1, rows, rows]`: 0 where a row may look, minus infinity where it may not.
fn causal_mask(rows: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let of = |row: usize, column: usize| if column <= row { 0.0 } else { f64::NEG_INFINITY };
    let mask: Vec<f64> = (0..rows).flat_map(|row| (0..rows).map(move |column| of(row, column))).collect();
    Tensor::from_vec(mask, (1, 1, rows, rows), device)?.to_dtype(dtype)
}

/// The last row of `[1, rows, vocab]`.
fn last_row(logits: &Tensor) -> Result<Vec<f64>> {
    let (_, rows, _) = logits.dims3()?;
    logits.narrow(1, rows - 1, 1)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}
