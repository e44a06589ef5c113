//! The encoder: pre-norm blocks in which all rows of a request see each other.
//!
//! ```text
//! x = embedding[token]
//! every block:  q, k, v = norm(x) Wqkv;  x += attention(q, k, v; bias of the first block) Wo
//!               x += feed forward(norm(x))
//! encoded = norm(x)
//! ```
//!
//! Place in the flow: a step encodes the contexts that are not cached, all together. The output becomes
//! keys and values of the decoder's cross-attention, and is then forgotten.
//!
//! Invariant: all rows of a request are present. Everything except attention looks at one row at a time,
//! so the rows of different requests share products and nothing else.

use std::cell::RefCell;
use std::ops::Range;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::attention::Heads;
use beamline_compute::cpu::linear::{Linear, Output, WeightFormat};
use beamline_compute::cpu::parallel::{at_least, each_group, read, rows_of_group, write};
use beamline_compute::cpu::relative::bias::{Bias, Direction};
use beamline_compute::cpu::relative::whole::{self, SLACK};
use beamline_compute::cpu::vector::rms_norm;

use super::config::T5Config;
use super::feed_forward::{FeedForward, Scratch};
use super::tensors::Stack;
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;

thread_local! {
    /// Reused by all groups of a thread.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A loaded encoder.
#[derive(Debug)]
pub(super) struct Encoder {
    heads: Heads,
    width: usize,
    epsilon: f32,
    bias: Bias,
    blocks: Vec<Block>,
    final_norm: Vec<f32>,
}

#[derive(Debug)]
struct Block {
    norm: Vec<f32>,
    qkv: Linear,
    output: Linear,
    feed_forward: FeedForward,
}

/// Activations of a step, reused from step to step.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// `[rows, d_model]`: the residual stream, and at the end what was encoded.
    pub(super) hidden: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    attention: whole::Workspace,
    scratch: Scratch,
}

impl Encoder {
    pub(super) fn load(
        config: &T5Config,
        tensors: &Tensors,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let weights: Vec<f32> = tensors.load(&Stack::Encoder.bias())?.flatten_all()?.to_vec1()?;
        let block = |index| Block::load(config, tensors, index, format);
        Ok(Self {
            heads: Heads { query: config.num_heads, key_value: config.num_heads, dim: config.d_kv },
            width: config.d_model,
            epsilon: config.layer_norm_epsilon,
            bias: Bias::new(config.relative(), Direction::Both, &weights),
            blocks: (0..config.encoder_layers).map(block).collect::<Result<_, _>>()?,
            final_norm: tensors.load("encoder.final_layer_norm.weight")?.to_vec1()?,
        })
    }

    /// Encodes the rows of some requests, embedded by `embed`, and leaves the output in
    /// `workspace.hidden`. Each of `sequences` is the rows of one request. `beat` is called once per
    /// block.
    pub(super) fn encode(
        &self,
        cpu: &Cpu,
        tokens: &[u32],
        sequences: &[Range<usize>],
        embed: &(dyn Fn(&[u32], &mut [f32]) + Sync),
        workspace: &mut Workspace,
        beat: &mut dyn FnMut(),
    ) {
        let Workspace { hidden, qkv, attended, attention, scratch } = workspace;
        let (count, width, inner) = (tokens.len(), self.width, self.heads.query * self.heads.dim);
        hidden.resize(count * width, 0.0);
        let qkv = at_least(qkv, count * 3 * inner + SLACK);
        let attended = at_least(attended, count * inner);
        let rows = rows_of_group(count, cpu.threads());
        let groups =
            (write(&mut *hidden, rows * width), write(&mut qkv[..count * 3 * inner], rows * 3 * inner));
        each_group(cpu, (read(tokens, rows), groups), scratch, &SCRATCH, |cpu, scratch, part| {
            let (tokens, (hidden, qkv)) = part;
            embed(tokens, hidden);
            self.project(cpu, 0, hidden, qkv, scratch);
        });
        for (index, block) in self.blocks.iter().enumerate() {
            whole::attend(cpu, self.heads, &self.bias, sequences, qkv, attention, attended);
            let streams = (write(&mut *hidden, rows * width), read(&*attended, rows * inner));
            let groups = (streams, write(&mut qkv[..count * 3 * inner], rows * 3 * inner));
            each_group(cpu, groups, scratch, &SCRATCH, |cpu, scratch, part| {
                let ((hidden, attended), qkv) = part;
                block.leave(cpu, attended, hidden, scratch);
                if index + 1 < self.blocks.len() {
                    self.project(cpu, index + 1, hidden, qkv, scratch);
                } else {
                    self.finish(cpu, hidden);
                }
            });
            beat();
        }
    }

    /// Queries, keys and values of a block.
    fn project(&self, cpu: &Cpu, block: usize, hidden: &[f32], qkv: &mut [f32], scratch: &mut Scratch) {
        let block = &self.blocks[block];
        scratch.rows.pack_normed(cpu, hidden, &block.norm, self.epsilon, block.qkv.format());
        block.qkv.forward(cpu, &scratch.rows, Output::Replace, qkv);
    }

    /// The final norm, in place.
    fn finish(&self, cpu: &Cpu, hidden: &mut [f32]) {
        let mut row = vec![0.0; self.width];
        for hidden in hidden.chunks_exact_mut(self.width) {
            row.copy_from_slice(hidden);
            rms_norm(cpu.isa(), &row, &self.final_norm, self.epsilon, hidden);
        }
    }

    /// Bytes of weights.
    pub(super) fn bytes(&self) -> usize {
        let blocks = self.blocks.iter().map(|block| {
            block.qkv.bytes()
                + block.output.bytes()
                + block.feed_forward.bytes()
                + size_of_val(&block.norm[..])
        });
        self.bias.bytes() + size_of_val(&self.final_norm[..]) + blocks.sum::<usize>()
    }
}

impl Block {
    fn load(
        config: &T5Config,
        tensors: &Tensors,
        index: usize,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let load = |name: &str| tensors.load(&format!("encoder.block.{index}.layer.0.{name}.weight"));
        let qkv = [load("SelfAttention.q")?, load("SelfAttention.k")?, load("SelfAttention.v")?];
        Ok(Self {
            norm: load("layer_norm")?.to_vec1()?,
            qkv: Linear::pack(&qkv, None, format)?,
            output: Linear::pack(&[load("SelfAttention.o")?], None, format)?,
            feed_forward: FeedForward::load(config, tensors, Stack::Encoder, index, format)?,
        })
    }

    /// From what attention found back to the residual stream, and through the feed-forward layer.
    fn leave(&self, cpu: &Cpu, attended: &[f32], hidden: &mut [f32], scratch: &mut Scratch) {
        scratch.rows.pack(cpu, attended, self.output.inputs(), self.output.format());
        self.output.forward(cpu, &scratch.rows, Output::Add, hidden);
        self.feed_forward.add(cpu, hidden, scratch);
    }
}
