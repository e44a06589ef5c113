//! The decoder: pre-norm blocks of self-attention, cross-attention to the encoder's output, and a
//! feed-forward layer.
//!
//! ```text
//! x = embedding[token]
//! every block:  q, k, v = norm(x) Wqkv
//!               x += attention(q, k, v of the start row, ancestors and itself; bias) Wo
//!               q = norm(x) Wq;          x += attention(q, encoded Wk, encoded Wv) Wo
//!               x += feed forward(norm(x))
//! ```
//!
//! Place in the flow: after the encoder, on the start rows and beams of all requests of a step together.
//! Keys and values of both attentions lie in pages ([`batch`](super::batch)).
//!
//! Invariant: everything except attention looks at one row at a time; attention reads the pages of the
//! row's own request.

use std::cell::RefCell;

use beamline_compute::cpu::attention::{Heads, Tables, attend};
use beamline_compute::cpu::linear::{Linear, Output, WeightFormat};
use beamline_compute::cpu::pages::PageStore;
use beamline_compute::cpu::parallel::{at_least, each_group, read, rows_of_group, write};
use beamline_compute::cpu::relative::bias::{Bias, Direction};
use beamline_compute::cpu::relative::branch;
use beamline_compute::cpu::{Cpu, NewRows, PageWrites};

use super::batch::T5Batch;
use super::config::T5Config;
use super::feed_forward::{FeedForward, Scratch};
use super::tensors::Stack;
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;

thread_local! {
    /// Reused by all groups of a thread.
    static SCRATCH: RefCell<GroupScratch> = RefCell::default();
}

/// A loaded decoder.
#[derive(Debug)]
pub(super) struct Decoder {
    heads: Heads,
    width: usize,
    epsilon: f32,
    bias: Bias,
    blocks: Vec<Block>,
}

#[derive(Debug)]
struct Block {
    own_norm: Vec<f32>,
    own_qkv: Linear,
    own_output: Linear,
    cross_norm: Vec<f32>,
    cross_query: Linear,
    cross_key_value: Linear,
    cross_output: Linear,
    feed_forward: FeedForward,
}

/// Activations of a step, reused from step to step.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// `[rows, d_model]`: the residual stream, at the end not yet normed.
    pub(super) hidden: Vec<f32>,
    /// Queries, keys and values of self-attention; then queries of cross-attention in the same columns.
    qkv: Vec<f32>,
    attended: Vec<f32>,
    key_value: Vec<f32>,
    scratch: GroupScratch,
}

/// What a group of rows needs between two attentions.
#[derive(Debug, Default)]
struct GroupScratch {
    layer: Scratch,
    query: Vec<f32>,
}

impl Decoder {
    pub(super) fn load(
        config: &T5Config,
        tensors: &Tensors,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let weights: Vec<f32> = tensors.load(&Stack::Decoder.bias())?.flatten_all()?.to_vec1()?;
        let block = |index| Block::load(config, tensors, index, format);
        Ok(Self {
            heads: Heads { query: config.num_heads, key_value: config.num_heads, dim: config.d_kv },
            width: config.d_model,
            epsilon: config.layer_norm_epsilon,
            bias: Bias::new(config.relative(), Direction::Causal, &weights),
            blocks: (0..config.decoder_layers).map(block).collect::<Result<_, _>>()?,
        })
    }

    fn inner(&self) -> usize {
        self.heads.query * self.heads.dim
    }

    /// Writes the cross-attention's keys and values of the encoder's output, `[rows, d_model]`, for all
    /// blocks. `beat` is called once per block.
    pub(super) fn store_encoded(
        &self,
        cpu: &Cpu,
        batch: &T5Batch,
        encoded: &[f32],
        pages: &mut PageStore,
        workspace: &mut Workspace,
        beat: &mut dyn FnMut(),
    ) {
        let (count, width, inner) = (batch.encoder_tokens.len(), self.width, self.inner());
        let Workspace { key_value, scratch, .. } = workspace;
        let key_value = at_least(key_value, count * 2 * inner);
        let rows = rows_of_group(count, cpu.threads());
        for (index, block) in self.blocks.iter().enumerate() {
            let writes = pages.writes(index, &batch.cross).in_parts(rows);
            let groups =
                (read(&encoded[..count * width], rows * width), write(&mut *key_value, rows * 2 * inner));
            each_group(cpu, (groups, writes), scratch, &SCRATCH, |cpu, scratch, part| {
                let ((encoded, key_value), writes) = part;
                let rows = &mut scratch.layer.rows;
                rows.pack(cpu, encoded, width, block.cross_key_value.format());
                block.cross_key_value.forward(cpu, rows, Output::Replace, key_value);
                writes.write(cpu, NewRows { rows: key_value, width: 2 * inner, keys: 0, values: inner });
            });
            beat();
        }
    }

    /// Runs the decoder's rows of a batch, embedded by `embed`, over pages that hold the encoder's
    /// output. Leaves their states in `workspace.hidden`. `beat` is called once per block.
    pub(super) fn decode(
        &self,
        cpu: &Cpu,
        batch: &T5Batch,
        embed: &(dyn Fn(&[u32], &mut [f32]) + Sync),
        pages: &mut PageStore,
        workspace: &mut Workspace,
        beat: &mut dyn FnMut(),
    ) {
        let Workspace { hidden, qkv, attended, scratch, .. } = workspace;
        let (count, width, inner) = (batch.rows(), self.width, self.inner());
        hidden.resize(count * width, 0.0);
        let qkv = at_least(qkv, count * 3 * inner);
        let attended = at_least(attended, count * inner);
        let rows = rows_of_group(count, cpu.threads());
        let tables = Tables { pages: &batch.pages, lineage: &batch.lineage };

        let streams = (write(&mut *hidden, rows * width), write(&mut *qkv, rows * 3 * inner));
        let groups = (streams, pages.writes(0, &batch.own).in_parts(rows));
        each_group(cpu, (read(&batch.decoder_tokens, rows), groups), scratch, &SCRATCH, |cpu, s, part| {
            let (tokens, ((hidden, qkv), writes)) = part;
            embed(tokens, hidden);
            self.project(cpu, 0, hidden, qkv, writes, &mut s.layer);
        });
        for (index, block) in self.blocks.iter().enumerate() {
            let layer = pages.layer(index);
            branch::attend(cpu, self.heads, &self.bias, qkv, layer, &batch.own_blocks, tables, attended);
            let streams = (write(&mut *hidden, rows * width), write(&mut *qkv, rows * 3 * inner));
            each_group(cpu, (read(&*attended, rows * inner), streams), scratch, &SCRATCH, |cpu, s, part| {
                let (attended, (hidden, qkv)) = part;
                add_product(cpu, &block.own_output, attended, hidden, &mut s.layer);
                self.ask(cpu, block, hidden, qkv, s);
            });
            attend(cpu, self.heads, qkv, pages.layer(index), &batch.cross_blocks, tables, attended);
            let streams = (write(&mut *hidden, rows * width), read(&*attended, rows * inner));
            let Some(next) = (index + 1 < self.blocks.len()).then_some(index + 1) else {
                each_group(cpu, streams, scratch, &SCRATCH, |cpu, s, (hidden, attended)| {
                    block.leave(cpu, attended, hidden, &mut s.layer);
                });
                beat();
                break;
            };
            let groups = (write(&mut *qkv, rows * 3 * inner), pages.writes(next, &batch.own).in_parts(rows));
            each_group(cpu, (streams, groups), scratch, &SCRATCH, |cpu, s, part| {
                let ((hidden, attended), (qkv, writes)) = part;
                block.leave(cpu, attended, hidden, &mut s.layer);
                self.project(cpu, next, hidden, qkv, writes, &mut s.layer);
            });
            beat();
        }
    }

    /// Queries, keys and values of a block's self-attention; keys and values go to their pages.
    fn project(
        &self,
        cpu: &Cpu,
        block: usize,
        hidden: &[f32],
        qkv: &mut [f32],
        writes: PageWrites<'_>,
        scratch: &mut Scratch,
    ) {
        let (block, inner) = (&self.blocks[block], self.inner());
        scratch.rows.pack_normed(cpu, hidden, &block.own_norm, self.epsilon, block.own_qkv.format());
        block.own_qkv.forward(cpu, &scratch.rows, Output::Replace, qkv);
        writes.write(cpu, NewRows { rows: qkv, width: 3 * inner, keys: inner, values: 2 * inner });
    }

    /// Queries of a block's cross-attention, to the columns of queries in `qkv`. [`attend`] divides by
    /// the root of a head's width and T5 does not, so they are multiplied by it.
    fn ask(&self, cpu: &Cpu, block: &Block, hidden: &[f32], qkv: &mut [f32], scratch: &mut GroupScratch) {
        let GroupScratch { layer, query } = scratch;
        let (inner, root) = (self.inner(), (self.heads.dim as f32).sqrt());
        layer.rows.pack_normed(cpu, hidden, &block.cross_norm, self.epsilon, block.cross_query.format());
        let query = at_least(query, layer.rows.count() * inner);
        block.cross_query.forward(cpu, &layer.rows, Output::Replace, query);
        for (qkv, query) in qkv.chunks_exact_mut(3 * inner).zip(query.chunks_exact(inner)) {
            qkv.iter_mut().zip(query).for_each(|(to, from)| *to = from * root);
        }
    }

    /// Bytes of weights.
    pub(super) fn bytes(&self) -> usize {
        self.bias.bytes() + self.blocks.iter().map(Block::bytes).sum::<usize>()
    }
}

/// Adds the product of rows and a matrix to the residual stream.
fn add_product(cpu: &Cpu, matrix: &Linear, x: &[f32], hidden: &mut [f32], scratch: &mut Scratch) {
    scratch.rows.pack(cpu, x, matrix.inputs(), matrix.format());
    matrix.forward(cpu, &scratch.rows, Output::Add, hidden);
}

impl Block {
    fn load(
        config: &T5Config,
        tensors: &Tensors,
        index: usize,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let load = |name: &str| tensors.load(&format!("decoder.block.{index}.layer.{name}.weight"));
        let pack = |names: &[&str]| -> Result<Linear, ModelError> {
            let all = names.iter().map(|name| load(name)).collect::<Result<Vec<_>, _>>()?;
            Ok(Linear::pack(&all, None, format)?)
        };
        Ok(Self {
            own_norm: load("0.layer_norm")?.to_vec1()?,
            own_qkv: pack(&["0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v"])?,
            own_output: pack(&["0.SelfAttention.o"])?,
            cross_norm: load("1.layer_norm")?.to_vec1()?,
            cross_query: pack(&["1.EncDecAttention.q"])?,
            cross_key_value: pack(&["1.EncDecAttention.k", "1.EncDecAttention.v"])?,
            cross_output: pack(&["1.EncDecAttention.o"])?,
            feed_forward: FeedForward::load(config, tensors, Stack::Decoder, index, format)?,
        })
    }

    /// From what cross-attention found back to the residual stream, and through the feed-forward layer.
    fn leave(&self, cpu: &Cpu, attended: &[f32], hidden: &mut [f32], scratch: &mut Scratch) {
        add_product(cpu, &self.cross_output, attended, hidden, scratch);
        self.feed_forward.add(cpu, hidden, scratch);
    }

    fn bytes(&self) -> usize {
        let products =
            [&self.own_qkv, &self.own_output, &self.cross_query, &self.cross_key_value, &self.cross_output];
        products.into_iter().map(Linear::bytes).sum::<usize>()
            + self.feed_forward.bytes()
            + size_of_val(&self.own_norm[..])
            + size_of_val(&self.cross_norm[..])
    }
}
