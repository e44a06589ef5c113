//! Family `t5`: encoder-decoders of semantic IDs (TIGER, LETTER, GRID), as `T5ForConditionalGeneration`
//! (Raffel et al. 2020).
//!
//! ```text
//! config              config.json
//! tensors             names, shapes, memory
//! feed_forward        the last sublayer of every block
//! encoder             blocks over whole contexts
//! decoder             blocks over start rows and beams
//! batch               rows of one step, and what lies where in pages
//! step                how an executor fills and runs a batch
//! family              facts, memory and loading, for the rest of the system
//! ```
//!
//! A context goes through the encoder as a whole; then a row of the decoder starts, and beams follow it.
//! Norms are root-mean-square norms, attention does not divide by a root, and positions enter by
//! relative biases alone.

pub mod batch;
pub mod config;
mod decoder;
mod encoder;
mod family;
mod feed_forward;
mod step;
pub mod tensors;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::{Linear, Output, Rows, Scores, WeightFormat};
use beamline_compute::cpu::pages::PageStore;
use beamline_compute::cpu::vector::rms_norm;

use self::batch::T5Batch;
use self::config::T5Config;
use self::decoder::Decoder;
use self::encoder::Encoder;
use self::tensors::{EMBEDDING, HEAD};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::described::Described;
use crate::error::ModelError;

/// A loaded encoder-decoder.
#[derive(Debug)]
pub struct T5 {
    config: T5Config,
    /// Embedding table, `[vocab_size, d_model]`.
    embedding: Vec<f32>,
    encoder: Encoder,
    decoder: Decoder,
    final_norm: Vec<f32>,
    /// The final norm, with the scale before the output matrix.
    head_norm: Vec<f32>,
    head: Linear,
}

/// Activations of a step, reused from step to step.
#[derive(Debug, Default)]
pub struct Workspace {
    encoder: encoder::Workspace,
    decoder: decoder::Workspace,
}

impl Workspace {
    /// The residual stream of the decoder's rows, `[rows, d_model]`, not yet normed.
    pub fn hidden(&self) -> &[f32] {
        &self.decoder.hidden
    }

    /// What was encoded in the last step, `[rows of the encoder, d_model]`, after the encoder's final norm.
    pub fn encoded(&self) -> &[f32] {
        &self.encoder.hidden
    }
}

impl T5 {
    /// Checks every tensor of the checkpoint and packs the weights. Embedding, norms and biases stay in
    /// single precision in every format.
    ///
    /// # Errors
    ///
    /// When tensors are missing, unknown, of the wrong shape or type, or hold values that are not finite.
    pub fn load(checkpoint: &Checkpoint<T5Config>, format: WeightFormat) -> Result<Self, ModelError> {
        let (config, tensors) = (checkpoint.config().clone(), checkpoint.tensors());
        config.expected(tensors).check(tensors)?;
        let embedding = tensors.load(EMBEDDING)?;
        let head = if config.tied_head { embedding.clone() } else { tensors.load(HEAD)? };
        let final_norm: Vec<f32> = tensors.load("decoder.final_layer_norm.weight")?.to_vec1()?;
        let scale = if config.scales_output { 1.0 / (config.d_model as f64).sqrt() } else { 1.0 };
        Ok(Self {
            embedding: embedding.flatten_all()?.to_vec1()?,
            encoder: Encoder::load(&config, tensors, format)?,
            decoder: Decoder::load(&config, tensors, format)?,
            head_norm: final_norm.iter().map(|weight| weight * scale as f32).collect(),
            final_norm,
            head: Linear::pack(&[head], None, format)?,
            config,
        })
    }

    /// Configuration of the checkpoint.
    pub fn config(&self) -> &T5Config {
        &self.config
    }

    /// Bytes of weights as they are served.
    pub fn weight_bytes(&self) -> usize {
        let norms = size_of_val(&self.final_norm[..]) + size_of_val(&self.head_norm[..]);
        let stacks = self.encoder.bytes() + self.decoder.bytes();
        size_of_val(&self.embedding[..]) + self.head.bytes() + norms + stacks
    }

    /// The format of the weights.
    pub fn format(&self) -> WeightFormat {
        self.head.format()
    }

    /// Allocates `pages` pages for keys and values in a format.
    ///
    /// # Errors
    ///
    /// When the memory cannot be had.
    pub fn page_store(&self, format: KvFormat, pages: usize) -> Result<PageStore, ModelError> {
        Ok(PageStore::new(self.config.page_shape(format), pages)?)
    }

    /// Runs a batch, whose tokens are in the vocabulary and whose writes were checked. Encodes contexts,
    /// writes keys and values, and leaves the states of the decoder's rows in `workspace`. `beat` is
    /// called at least once per block.
    pub fn forward(
        &self,
        cpu: &Cpu,
        batch: &T5Batch,
        pages: &mut PageStore,
        workspace: &mut Workspace,
        beat: &mut dyn FnMut(),
    ) {
        let Workspace { encoder, decoder } = workspace;
        let embed = |tokens: &[u32], out: &mut [f32]| self.embed(tokens, out);
        let (tokens, sequences) = (&batch.encoder_tokens, &batch.sequences);
        self.encoder.encode(cpu, tokens, sequences, &embed, encoder, beat);
        self.decoder.store_encoded(cpu, batch, &encoder.hidden, pages, decoder, beat);
        self.decoder.decode(cpu, batch, &embed, pages, decoder, beat);
    }

    fn embed(&self, tokens: &[u32], out: &mut [f32]) {
        let width = self.config.d_model;
        for (out, &token) in out.chunks_exact_mut(width).zip(tokens) {
            out.copy_from_slice(&self.embedding[token as usize * width..][..width]);
        }
    }

    /// Scores the tokens that follow rows of [`Workspace::hidden`]. `scores` says which tokens are
    /// wanted; `rows` is scratch.
    pub fn score(&self, cpu: &Cpu, hidden: &[f32], rows: &mut Rows, scores: &mut Scores) {
        rows.pack_normed(cpu, hidden, &self.head_norm, self.config.layer_norm_epsilon, self.format());
        self.head.score(cpu, rows, scores);
    }

    /// Final states of rows of [`Workspace::hidden`], `[rows, d_model]`, before they are scaled.
    pub fn states(&self, cpu: &Cpu, hidden: &[f32]) -> Vec<f32> {
        let (norm, width) = (&self.final_norm, self.config.d_model);
        let mut out = vec![0.0; hidden.len()];
        for (out, x) in out.chunks_exact_mut(width).zip(hidden.chunks_exact(width)) {
            rms_norm(cpu.isa(), x, norm, self.config.layer_norm_epsilon, out);
        }
        out
    }

    /// Logits of rows of [`Workspace::hidden`], `[rows, vocab_size]`, padding rows of the vocabulary
    /// included.
    pub fn logits(&self, cpu: &Cpu, hidden: &[f32], out: &mut Vec<f32>) {
        let mut rows = Rows::default();
        rows.pack_normed(cpu, hidden, &self.head_norm, self.config.layer_norm_epsilon, self.format());
        out.resize(rows.count() * self.config.vocab_size, 0.0);
        self.head.forward(cpu, &rows, Output::Replace, out);
    }
}
