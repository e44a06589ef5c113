//! Decoders of the Llama family tree: Qwen3, Qwen2 and Llama. The API calls the family `qwen`.
//!
//! Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward layer:
//!
//! ```text
//! x = embedding[token]
//! every layer:  q, k, v = norm(x) Wqkv (+ bias)         Qwen3: q and k are normalised per head
//!               x += attention(rope(q), rope(k), v) Wo  (+ bias)
//!               g, u = norm(x) Wgate_up;  x += (silu(g) * u) Wdown
//! logits = norm(x) Whead
//! ```
//!
//! In the last layer only the rows whose state is wanted go past their keys and values.
//!
//! Everything except attention looks at one row at a time. So a large step is cut into groups of rows
//! (`each_group`). Each group goes from one attention to the next on one thread, while its activations
//! are in that core's cache. A small step is cut the other way, through the weights.
//!
//! Queries, keys and values of the first layer depend on the token alone, before they are turned to
//! their position. They are looked up in the table of all tokens where that is small.

mod family;
mod step;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::OnceLock;

use beamline_compute::batch::Batch;
use beamline_compute::cpu::attention::{Heads, Tables, attend};
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::{Linear, Output, Rows, Scores, WeightFormat};
use beamline_compute::cpu::pages::{PageShape, PageStore};
use beamline_compute::cpu::parallel::{at_least, each_group, keep_rows, read, rows_of_group, write};
use beamline_compute::cpu::rotary::{Rotary, turn_heads};
use beamline_compute::cpu::vector::rms_norm;
use beamline_compute::cpu::{Cpu, NewRows, PageWrites};
use candle_core::Tensor;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::Config;
use crate::checkpoint::described::Described;
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;

/// A loaded decoder.
#[derive(Debug)]
pub struct Decoder {
    config: Config,
    heads: Heads,
    /// Embedding table, `[vocab_size, hidden_size]`.
    embedding: Vec<f32>,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    head: Linear,
    rotary: Rotary,
    /// `[vocab_size, qkv_width]`: what the first layer makes of each token. Filled by the first step.
    first_qkv: OnceLock<Vec<f32>>,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Vec<f32>,
    qkv: Linear,
    /// Weights of the per-head norms of queries and keys.
    qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    output: Linear,
    mlp_norm: Vec<f32>,
    gate_up: Linear,
    down: Linear,
}

/// Activations of a step, reused from step to step.
#[derive(Debug, Default)]
pub struct Workspace {
    /// The residual stream. After a forward pass it holds only that of the wanted rows,
    /// `[wanted, hidden_size]`, not yet normed.
    pub hidden: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    scratch: Scratch,
}

/// What a group of rows needs between two attentions.
#[derive(Debug, Default)]
struct Scratch {
    gated: Vec<f32>,
    rows: Rows,
}

thread_local! {
    /// Reused by all groups of a thread.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Decoder {
    /// Checks every tensor of the checkpoint and packs the weights, with rotary tables for `positions`
    /// positions. The embedding stays in single precision in every format.
    ///
    /// # Errors
    ///
    /// When tensors are missing, unknown, of the wrong shape or type, or hold values that are not finite.
    pub fn load(checkpoint: &Checkpoint, positions: usize, format: WeightFormat) -> Result<Self, ModelError> {
        let (config, tensors) = (checkpoint.config().clone(), checkpoint.tensors());
        config.expected(tensors).check(tensors)?;
        let embedding = tensors.load("model.embed_tokens.weight")?;
        let head = if config.tied_head { embedding.clone() } else { tensors.load("lm_head.weight")? };
        let layers = (0..config.layers)
            .map(|index| Layer::load(&config, tensors, index, format))
            .collect::<Result<_, _>>()?;
        let (frequencies, scale) = config.rope.frequencies(config.head_dim);
        Ok(Self {
            heads: Heads { query: config.heads, key_value: config.kv_heads, dim: config.head_dim },
            embedding: embedding.flatten_all()?.to_vec1()?,
            layers,
            final_norm: tensors.load("model.norm.weight")?.to_vec1()?,
            head: Linear::pack(&[head], None, format)?,
            rotary: Rotary::new(&frequencies, scale, positions),
            first_qkv: OnceLock::new(),
            config,
        })
    }

    /// Configuration of the checkpoint.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Positions that can be computed.
    pub fn positions(&self) -> usize {
        self.rotary.positions()
    }

    /// Bytes of weights as they are served.
    pub fn weight_bytes(&self) -> usize {
        let layers = self.layers.iter().map(|layer| {
            layer.qkv.bytes() + layer.output.bytes() + layer.gate_up.bytes() + layer.down.bytes()
        });
        let table = if self.looks_up_first_qkv() { self.first_qkv_len() } else { 0 };
        4 * (self.embedding.len() + table) + self.head.bytes() + layers.sum::<usize>()
    }

    /// The format of the weights.
    pub fn format(&self) -> WeightFormat {
        self.head.format()
    }

    /// Runs a batch: writes keys and values of its rows, leaves the final states of the wanted rows in
    /// `workspace.hidden`. For tests that look inside, `observe` is given the residual stream after the
    /// embedding (0) and after each layer (1..).
    pub fn forward(
        &self,
        cpu: &Cpu,
        batch: &Batch,
        pages: &mut PageStore,
        workspace: &mut Workspace,
        observe: &mut dyn FnMut(usize, &[f32]),
    ) {
        let (width, attended_width) = (self.config.hidden_size, self.heads.query * self.heads.dim);
        let w = workspace;
        w.hidden.resize(batch.rows() * width, 0.0);
        let positions = &batch.positions;
        let qkv = at_least(&mut w.qkv, batch.rows() * self.heads.qkv_width());
        let mut attended = at_least(&mut w.attended, batch.rows() * attended_width);
        self.fill_first_qkv(cpu, &mut w.scratch);
        let destinations = &batch.destinations;
        if !self.layers.is_empty() {
            let rows = rows_of_group(batch.rows(), cpu.threads());
            let groups =
                (write(&mut w.hidden, rows * width), write(&mut *qkv, rows * self.heads.qkv_width()));
            let groups = (groups, pages.writes(0, destinations).in_parts(rows));
            let groups = ((read(&batch.tokens, rows), read(positions, rows)), groups);
            each_group(cpu, groups, &mut w.scratch, &SCRATCH, |cpu, scratch, part| {
                let ((tokens, positions), ((hidden, qkv), writes)) = part;
                self.enter(cpu, tokens, positions, hidden, qkv, scratch);
                self.store(cpu, writes, qkv);
            });
        }
        observe(0, &w.hidden);
        for (index, layer) in self.layers.iter().enumerate() {
            let next = self.layers.get(index + 1);
            let blocks = if next.is_some() { &batch.blocks } else { &batch.final_blocks };
            let tables = Tables { pages: &batch.pages, lineage: &batch.lineage };
            attend(cpu, self.heads, qkv, pages.layer(index), blocks, tables, attended);
            if next.is_none() {
                attended = keep_rows(attended, attended_width, &batch.wanted);
                keep_rows(&mut w.hidden, width, &batch.wanted);
                w.hidden.truncate(batch.wanted.len() * width);
            }
            let rows = rows_of_group(w.hidden.len() / width, cpu.threads());
            let groups = (read(&*attended, rows * attended_width), write(&mut w.hidden, rows * width));
            match next {
                None => each_group(cpu, groups, &mut w.scratch, &SCRATCH, |cpu, scratch, part| {
                    self.leave(cpu, layer, part.0, part.1, scratch);
                }),
                Some(next) => {
                    let qkv = write(&mut *qkv, rows * self.heads.qkv_width());
                    let writes = pages.writes(index + 1, destinations).in_parts(rows);
                    let groups = (groups, ((read(positions, rows), qkv), writes));
                    each_group(cpu, groups, &mut w.scratch, &SCRATCH, |cpu, scratch, part| {
                        let ((attended, hidden), ((positions, qkv), writes)) = part;
                        self.leave(cpu, layer, attended, hidden, scratch);
                        self.project(cpu, next, hidden, qkv, scratch);
                        self.rotate(cpu, next, positions, qkv);
                        self.store(cpu, writes, qkv);
                    });
                }
            }
            observe(index + 1, &w.hidden);
        }
    }

    /// Embeds tokens; and queries, keys and values of the first layer.
    fn enter(
        &self,
        cpu: &Cpu,
        tokens: &[u32],
        positions: &[u32],
        hidden: &mut [f32],
        qkv: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let look_up = |table: &[f32], width: usize, out: &mut [f32]| {
            for (out, &token) in out.chunks_exact_mut(width).zip(tokens) {
                out.copy_from_slice(&table[token as usize * width..][..width]);
            }
        };
        look_up(&self.embedding, self.config.hidden_size, hidden);
        let Some(first) = self.layers.first() else { return };
        match self.first_qkv.get() {
            Some(table) => look_up(table, self.heads.qkv_width(), qkv),
            None => self.project(cpu, first, hidden, qkv, scratch),
        }
        self.rotate(cpu, first, positions, qkv);
    }

    /// Makes the table of the first layer, once, if it is to be had.
    fn fill_first_qkv(&self, cpu: &Cpu, scratch: &mut Scratch) {
        if let (Some(first), true) = (self.layers.first(), self.looks_up_first_qkv()) {
            self.first_qkv.get_or_init(|| {
                let mut table = vec![0.0; self.first_qkv_len()];
                self.project(cpu, first, &self.embedding, &mut table, scratch);
                table
            });
        }
    }

    fn looks_up_first_qkv(&self) -> bool {
        first_layer_table_bytes(&self.config) > 0
    }

    fn first_qkv_len(&self) -> usize {
        self.config.vocab_size * self.heads.qkv_width()
    }

    /// From the residual stream to queries, keys and values, not yet turned.
    fn project(&self, cpu: &Cpu, layer: &Layer, hidden: &[f32], qkv: &mut [f32], scratch: &mut Scratch) {
        let rows = &mut scratch.rows;
        rows.pack_normed(cpu, hidden, &layer.attention_norm, self.config.rms_norm_eps, self.format());
        layer.qkv.forward(cpu, rows, Output::Replace, qkv);
    }

    /// From what attention found back to the residual stream, and through the feed-forward layer.
    fn leave(
        &self,
        cpu: &Cpu,
        layer: &Layer,
        attended: &[f32],
        hidden: &mut [f32],
        Scratch { gated, rows }: &mut Scratch,
    ) {
        let (config, format) = (&self.config, self.format());
        rows.pack(cpu, attended, layer.output.inputs(), format);
        layer.output.forward(cpu, rows, Output::Add, hidden);
        rows.pack_normed(cpu, hidden, &layer.mlp_norm, config.rms_norm_eps, format);
        let gated = at_least(gated, rows.count() * config.intermediate_size);
        layer.gate_up.forward(cpu, rows, Output::Replace, gated);
        rows.pack(cpu, gated, config.intermediate_size, format);
        layer.down.forward(cpu, rows, Output::Add, hidden);
    }

    /// Scores the tokens that follow rows of [`Workspace::hidden`]. `scores` says which tokens are
    /// wanted; `rows` is scratch.
    pub fn score(&self, cpu: &Cpu, hidden: &[f32], rows: &mut Rows, scores: &mut Scores) {
        rows.pack_normed(cpu, hidden, &self.final_norm, self.config.rms_norm_eps, self.format());
        self.head.score(cpu, rows, scores);
    }

    /// Final states of rows of [`Workspace::hidden`], `[rows, hidden_size]`.
    pub fn states(&self, cpu: &Cpu, hidden: &[f32]) -> Vec<f32> {
        let (norm, width) = (&self.final_norm, self.config.hidden_size);
        let mut out = vec![0.0; hidden.len()];
        for (out, x) in out.chunks_exact_mut(width).zip(hidden.chunks_exact(width)) {
            rms_norm(cpu.isa(), x, norm, self.config.rms_norm_eps, out);
        }
        out
    }

    /// Logits of rows of [`Workspace::hidden`], `[rows, vocab_size]`, padding rows of the vocabulary
    /// included.
    pub fn logits(&self, cpu: &Cpu, hidden: &[f32], out: &mut Vec<f32>) {
        let mut rows = Rows::default();
        rows.pack_normed(cpu, hidden, &self.final_norm, self.config.rms_norm_eps, self.format());
        out.resize(rows.count() * self.config.vocab_size, 0.0);
        self.head.forward(cpu, &rows, Output::Replace, out);
    }

    /// Normalises (Qwen3) and turns queries and keys in place.
    fn rotate(&self, cpu: &Cpu, layer: &Layer, positions: &[u32], qkv: &mut [f32]) {
        let (heads, eps, isa) = (self.heads, self.config.rms_norm_eps, cpu.isa());
        let (q_norm, k_norm) = layer.qk_norm.as_ref().map(|(q, k)| (q.as_slice(), k.as_slice())).unzip();
        let parts = (write(qkv, ROWS_PER_TASK * heads.qkv_width()), read(positions, ROWS_PER_TASK));
        cpu.each_part(parts, |_, (qkv, positions)| {
            for (row, &position) in qkv.chunks_exact_mut(heads.qkv_width()).zip(positions) {
                let (queries, rest) = row.split_at_mut(heads.query * heads.dim);
                let keys = &mut rest[..heads.key_value * heads.dim];
                turn_heads(isa, queries, heads.dim, q_norm, eps, &self.rotary, position as usize);
                turn_heads(isa, keys, heads.dim, k_norm, eps, &self.rotary, position as usize);
            }
        });
    }

    /// Writes keys and values of rows into pages.
    fn store(&self, cpu: &Cpu, writes: PageWrites<'_>, qkv: &[f32]) {
        let heads = self.heads;
        let keys = heads.query * heads.dim;
        let values = keys + heads.key_value * heads.dim;
        writes.write(cpu, NewRows { rows: qkv, width: heads.qkv_width(), keys, values });
    }
}

/// Rows of element-wise work that are worth a task of their own.
const ROWS_PER_TASK: usize = 32;
/// Most values of the table of the first layer's queries, keys and values (32 MiB).
const FIRST_QKV_VALUES: usize = 8 << 20;

/// Bytes of the table of the first layer's queries, keys and values, beside the weights of the
/// checkpoint. It is 0 where the table would be too large.
pub fn first_layer_table_bytes(config: &Config) -> usize {
    let width = (config.heads + 2 * config.kv_heads).saturating_mul(config.head_dim);
    let values = config.vocab_size.saturating_mul(width);
    if values <= FIRST_QKV_VALUES { 4 * values } else { 0 }
}

impl Layer {
    fn load(
        config: &Config,
        tensors: &Tensors,
        index: usize,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let load = |name: &str| tensors.load(&format!("model.layers.{index}.{name}"));
        let vector = |name: &str| -> Result<Vec<f32>, ModelError> { Ok(load(name)?.to_vec1()?) };
        let linear = |names: &[&str], bias: bool| -> Result<Linear, ModelError> {
            let all = |kind: &str| -> Result<Vec<Tensor>, ModelError> {
                names.iter().map(|name| load(&format!("{name}.{kind}"))).collect()
            };
            let biases = if bias { Some(all("bias")?) } else { None };
            Ok(Linear::pack(&all("weight")?, biases.as_deref(), format)?)
        };
        Ok(Self {
            attention_norm: vector("input_layernorm.weight")?,
            qkv: linear(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], config.qkv_bias)?,
            qk_norm: if config.qk_norm {
                Some((vector("self_attn.q_norm.weight")?, vector("self_attn.k_norm.weight")?))
            } else {
                None
            },
            output: linear(&["self_attn.o_proj"], config.output_bias)?,
            mlp_norm: vector("post_attention_layernorm.weight")?,
            gate_up: Linear::pack_gated(
                load("mlp.gate_proj.weight")?,
                load("mlp.up_proj.weight")?,
                if config.mlp_bias {
                    Some([load("mlp.gate_proj.bias")?, load("mlp.up_proj.bias")?])
                } else {
                    None
                },
                format,
            )?,
            down: linear(&["mlp.down_proj"], config.mlp_bias)?,
        })
    }
}

/// What a page of a decoder holds.
pub fn page_shape(config: &Config, format: KvFormat) -> PageShape {
    let dim = config.head_dim;
    PageShape { format, layers: config.layers, heads: config.kv_heads, key_dim: dim, value_dim: dim }
}

/// Names and shapes that a checkpoint of this configuration must have.
pub fn expected_tensors(config: &Config) -> BTreeMap<String, Vec<usize>> {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let (query, key_value) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut expected = BTreeMap::from([
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, width]),
        ("model.norm.weight".to_owned(), vec![width]),
    ]);
    if !config.tied_head {
        expected.insert("lm_head.weight".to_owned(), vec![config.vocab_size, width]);
    }
    for layer in 0..config.layers {
        let mut add = |name: &str, shape: Vec<usize>| {
            expected.insert(format!("model.layers.{layer}.{name}"), shape);
        };
        add("input_layernorm.weight", vec![width]);
        add("post_attention_layernorm.weight", vec![width]);
        let projections = [
            ("self_attn.q_proj", query, width, config.qkv_bias),
            ("self_attn.k_proj", key_value, width, config.qkv_bias),
            ("self_attn.v_proj", key_value, width, config.qkv_bias),
            ("self_attn.o_proj", width, query, config.output_bias),
            ("mlp.gate_proj", inner, width, config.mlp_bias),
            ("mlp.up_proj", inner, width, config.mlp_bias),
            ("mlp.down_proj", width, inner, config.mlp_bias),
        ];
        for (name, outputs, inputs, bias) in projections {
            add(&format!("{name}.weight"), vec![outputs, inputs]);
            if bias {
                add(&format!("{name}.bias"), vec![outputs]);
            }
        }
        if config.qk_norm {
            add("self_attn.q_norm.weight", vec![config.head_dim]);
            add("self_attn.k_norm.weight", vec![config.head_dim]);
        }
    }
    expected
}
