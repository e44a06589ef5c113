//! The layers of HSTU: one implementation for all variants, told apart by constants alone.
//!
//! ```text
//! u, v, q, k = split(norm(x) W (+ b)), with SiLU on all of them, on u, or on none
//! a          = pointwise attention of q over k and v
//! x          = (x +) parts(u, a, norm(a)) Wo (+ bo)        parts: u * n, [u, a, u * n] or [u, n, u * n]
//! ```
//!
//! In the last layer only the rows whose state is wanted have a u and a q, and go past their keys and values. So columns are
//! put in the order u, q, v, k when a layer is loaded.
//!
//! What must not be here: where the rows come from, what becomes of the final states.

use std::cell::RefCell;
use std::ops::Range;

use candle_core::Tensor;

use super::batch::HstuBatch;
use super::config::{NormKind, OutputParts, SiluScope, StackConfig, Variant};
use super::layer_tensors::LayerTensors;
use crate::checkpoint::tensors::Tensors;
use crate::cpu::Cpu;
use crate::cpu::attention::{Block, Tables};
use crate::cpu::linear::{Linear, Output, Rows, WeightFormat};
use crate::cpu::mask::Mask;
use crate::cpu::pages::PageStore;
use crate::cpu::parallel::{Groups, at_least, keep_rows, read, write};
use crate::cpu::pointwise::{Call, RelativeBias, Shape, attend};
use crate::cpu::vector::{gate, layer_norm, silu_in_place};
use crate::error::ModelError;

/// Weight and bias of a norm.
pub(super) type Affine = (Vec<f32>, Vec<f32>);

/// The layers of a model.
#[derive(Debug)]
pub struct Stack {
    config: StackConfig,
    shape: Shape,
    mask: Mask,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    input_norm: Option<Affine>,
    uvqk: Linear,
    bias: Option<RelativeBias>,
    output_norm: Option<Affine>,
    output: Linear,
}

/// Activations of a step, reused from step to step.
#[derive(Debug, Default)]
pub struct Workspace {
    /// The residual stream; after a forward pass only that of the wanted rows, `[wanted, model_dim]`.
    pub hidden: Vec<f32>,
    uvqk: Vec<f32>,
    attended: Vec<f32>,
    scratch: Scratch,
}

/// What a group of rows needs between two attentions.
#[derive(Debug, Default)]
struct Scratch {
    normed: Vec<f32>,
    gated: Vec<f32>,
    rows: Rows,
}

thread_local! {
    /// Reused by all groups of a thread.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Stack {
    /// Packs the layers; their tensors were checked.
    ///
    /// # Errors
    ///
    /// When a tensor cannot be loaded.
    pub fn load(
        config: &StackConfig,
        variant: Variant,
        prefix: &str,
        tensors: &Tensors,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let load = |layer| Layer::pack(LayerTensors::load(config, variant, prefix, layer, tensors)?, format);
        let layers = (0..config.layers).map(load).collect::<Result<_, _>>()?;
        let shape = Shape {
            heads: config.heads,
            key_dim: config.key_dim,
            value_dim: config.value_dim,
            row_width: config.uvqk(),
            query_column: config.values(),
            logit_scale: config.logit_scale.value(config),
            divisor: config.attention_divisor as f32,
        };
        Ok(Self { config: config.clone(), shape, mask: config.mask.into(), layers })
    }

    /// The constants.
    pub fn config(&self) -> &StackConfig {
        &self.config
    }

    /// Who sees whom.
    pub fn mask(&self) -> Mask {
        self.mask
    }

    /// The format of the weights.
    pub fn format(&self) -> WeightFormat {
        self.layers[0].uvqk.format()
    }

    /// Bytes of weights as they are served.
    pub fn weight_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.uvqk.bytes() + layer.output.bytes()).sum()
    }

    /// Allocates pages for the keys and values of these layers.
    ///
    /// # Errors
    ///
    /// When the memory cannot be had.
    pub fn page_store(&self, pages: usize) -> Result<PageStore, ModelError> {
        let config = &self.config;
        PageStore::new(config.layers, config.heads, config.key_dim, config.value_dim, pages)
    }

    /// Runs a batch: writes keys and values of its rows, leaves the final states of the wanted rows in
    /// `workspace.hidden`. `observe` is given the residual stream before the layers (0) and after each (1..), for tests
    /// that look inside.
    pub fn forward(
        &self,
        cpu: &Cpu,
        batch: &HstuBatch,
        pages: &mut PageStore,
        workspace: &mut Workspace,
        observe: &mut dyn FnMut(usize, &[f32]),
    ) {
        let (config, w) = (&self.config, workspace);
        let (width, values, uvqk) = (config.model_dim, config.values(), config.uvqk());
        assert_eq!(batch.embedded.len(), batch.rows() * width, "a row of embeddings for every row");
        w.hidden.clear();
        w.hidden.extend_from_slice(&batch.embedded);
        observe(0, &w.hidden);
        let projected = at_least(&mut w.uvqk, batch.rows() * uvqk);
        let attended = at_least(&mut w.attended, batch.rows() * values);
        if let Some(first) = self.layers.first() {
            let columns = self.columns(config.layers == 1);
            self.project_all(cpu, first, columns, &w.hidden, projected, &mut w.scratch);
        }
        let final_blocks = compact(&batch.layout.final_blocks);
        let all_rows = batch.sequences();
        let of_wanted: Vec<u32> = batch.layout.wanted.iter().map(|&row| all_rows.of_row[row]).collect();
        for (index, layer) in self.layers.iter().enumerate() {
            self.store(cpu, batch, projected, pages, index);
            let next = self.layers.get(index + 1);
            let layout = &batch.layout;
            let (mut blocks, mut sequences) = (&layout.blocks, all_rows);
            if next.is_none() {
                // What is not wanted ends here.
                keep_rows(&mut w.hidden, width, &layout.wanted);
                w.hidden.truncate(layout.wanted.len() * width);
                let projected = &mut projected[..layout.wanted.len() * uvqk];
                let columns = 0..config.values() + config.keys();
                self.project_all(cpu, layer, columns, &w.hidden, projected, &mut w.scratch);
                blocks = &final_blocks;
                sequences.of_row = &of_wanted;
            }
            let left = w.hidden.len() / width;
            let (attended, projected) = (&mut attended[..left * values], &mut projected[..left * uvqk]);
            let call = Call {
                shape: self.shape,
                mask: self.mask,
                bias: layer.bias.as_ref(),
                rows: projected,
                sequences,
                pages: pages.layer(index),
                tables: Tables { pages: &layout.pages, lineage: &layout.lineage },
            };
            attend(cpu, &call, blocks, attended);
            let next = next.map(|next| (next, self.columns(index + 2 == self.layers.len())));
            match Groups::of(left, cpu.threads()) {
                Groups::One => {
                    self.leave(cpu, layer, next, attended, projected, &mut w.hidden, &mut w.scratch)
                }
                Groups::Of(rows) => {
                    let alone = cpu.alone();
                    let attended = read(attended, rows * values);
                    let parts =
                        ((attended, write(&mut w.hidden, rows * width)), write(projected, rows * uvqk));
                    cpu.each_part(parts, |_, ((attended, hidden), projected)| {
                        SCRATCH.with_borrow_mut(|scratch| {
                            self.leave(&alone, layer, next.clone(), attended, projected, hidden, scratch);
                        });
                    });
                }
            }
            observe(index + 1, &w.hidden);
        }
    }

    /// Columns that every row needs of a layer's projection.
    fn columns(&self, last: bool) -> Range<usize> {
        let config = &self.config;
        if last { config.values() + config.keys()..config.uvqk() } else { 0..config.uvqk() }
    }

    /// As [`Stack::project`], for all rows of a step.
    fn project_all(
        &self,
        cpu: &Cpu,
        layer: &Layer,
        columns: Range<usize>,
        hidden: &[f32],
        projected: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let (width, uvqk) = (self.config.model_dim, self.config.uvqk());
        match Groups::of(hidden.len() / width, cpu.threads()) {
            Groups::One => self.project(cpu, layer, columns, hidden, projected, scratch),
            Groups::Of(rows) => {
                let alone = cpu.alone();
                let parts = (read(hidden, rows * width), write(projected, rows * uvqk));
                cpu.each_part(parts, |_, (hidden, projected)| {
                    SCRATCH.with_borrow_mut(|scratch| {
                        self.project(&alone, layer, columns.clone(), hidden, projected, scratch)
                    });
                });
            }
        }
    }

    /// From the residual stream to these columns of u, q, v and k. What the others hold afterwards is not to be read.
    fn project(
        &self,
        cpu: &Cpu,
        layer: &Layer,
        columns: Range<usize>,
        hidden: &[f32],
        uvqk: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let config = &self.config;
        let (width, eps) = (config.model_dim, config.input_norm.eps as f32);
        norm_rows(cpu, hidden, width, layer.input_norm.as_ref(), eps, &mut scratch.normed);
        scratch.rows.pack(cpu, &scratch.normed[..hidden.len()], width, self.format());
        layer.uvqk.forward_columns(cpu, &scratch.rows, columns.clone(), uvqk);
        self.activate(cpu, columns, uvqk);
    }

    /// From what attention found back to the residual stream, and on to columns of the next layer's projection.
    fn leave(
        &self,
        cpu: &Cpu,
        layer: &Layer,
        next: Option<(&Layer, Range<usize>)>,
        attended: &[f32],
        uvqk: &mut [f32],
        hidden: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let (config, values) = (&self.config, self.config.values());
        let inner = config.output_parts.count() * values;
        let gated = at_least(&mut scratch.gated, attended.len() / values * inner);
        self.combine(cpu, layer, uvqk, attended, gated);
        scratch.rows.pack(cpu, gated, inner, self.format());
        let output = if config.residual { Output::Add } else { Output::Replace };
        layer.output.forward(cpu, &scratch.rows, output, hidden);
        if let Some((next, columns)) = next {
            self.project(cpu, next, columns, hidden, uvqk, scratch);
        }
    }

    /// SiLU where the model has it.
    fn activate(&self, cpu: &Cpu, columns: Range<usize>, uvqk: &mut [f32]) {
        let (isa, width) = (cpu.isa(), self.config.uvqk());
        let end = match self.config.silu {
            SiluScope::Uvqk => width,
            SiluScope::U => self.config.values(),
            SiluScope::None => 0,
        };
        let columns = columns.start..columns.end.min(end);
        if columns.is_empty() {
            return;
        }
        cpu.each_part(write(uvqk, ROWS_PER_TASK * width), |_, rows| {
            rows.chunks_exact_mut(width).for_each(|row| silu_in_place(isa, &mut row[columns.clone()]));
        });
    }

    /// Writes keys and values into pages, one head per task.
    fn store(&self, cpu: &Cpu, batch: &HstuBatch, uvqk: &[f32], pages: &mut PageStore, layer: usize) {
        let config = &self.config;
        let first_value = config.values() + config.keys();
        let first_key = first_value + config.values();
        cpu.each_part(write(pages.layer_mut(layer), 1), |head, pages| {
            for (row, destination) in uvqk.chunks_exact(config.uvqk()).zip(&batch.layout.destinations) {
                let key = &row[first_key + head * config.key_dim..][..config.key_dim];
                let value = &row[first_value + head * config.value_dim..][..config.value_dim];
                pages[0].write(*destination, key, value);
            }
        });
    }

    /// What the output projection reads.
    fn combine(&self, cpu: &Cpu, layer: &Layer, uvqk: &[f32], attended: &[f32], out: &mut [f32]) {
        let config = &self.config;
        let (values, width, inner) =
            (config.values(), config.uvqk(), config.output_parts.count() * config.values());
        let parts = (
            write(out, ROWS_PER_TASK * inner),
            (read(attended, ROWS_PER_TASK * values), read(uvqk, ROWS_PER_TASK * width)),
        );
        cpu.each_part(parts, |_, (out, (attended, uvqk))| {
            let rows = out.chunks_exact_mut(inner).zip(attended.chunks_exact(values));
            for ((out, attended), uvqk) in rows.zip(uvqk.chunks_exact(width)) {
                self.combine_row(cpu, layer, &uvqk[..values], attended, out);
            }
        });
    }

    fn combine_row(&self, cpu: &Cpu, layer: &Layer, u: &[f32], a: &[f32], out: &mut [f32]) {
        let (config, isa, values) = (&self.config, cpu.isa(), self.config.values());
        let eps = config.output_norm.eps as f32;
        let group = match config.output_norm.kind {
            NormKind::Layer => values,
            NormKind::Group => config.value_dim,
        };
        // The norm is written where the gated part belongs, and turned into it there.
        let (before, gated) = out.split_at_mut(out.len() - values);
        let affine = layer.output_norm.as_ref();
        if group == values {
            let affine = affine.map(|(weight, bias)| (weight.as_slice(), bias.as_slice()));
            layer_norm(isa, a, affine, eps, gated);
        } else {
            for (head, (a, out)) in a.chunks_exact(group).zip(gated.chunks_exact_mut(group)).enumerate() {
                layer_norm(isa, a, None, eps, out);
                if let Some((weight, bias)) = affine {
                    out.iter_mut().for_each(|x| *x = x.mul_add(weight[head], bias[head]));
                }
            }
        }
        match config.output_parts {
            OutputParts::Gated => {}
            OutputParts::ConcatRaw => {
                before[..values].copy_from_slice(u);
                before[values..].copy_from_slice(a);
            }
            OutputParts::ConcatNormed => {
                before[..values].copy_from_slice(u);
                before[values..].copy_from_slice(gated);
            }
        }
        gate(isa, gated, u);
    }
}

/// Rows of element-wise work that are worth a task of their own.
pub(super) const ROWS_PER_TASK: usize = 32;

/// Norms rows into another buffer.
pub(super) fn norm_rows(
    cpu: &Cpu,
    x: &[f32],
    width: usize,
    affine: Option<&Affine>,
    eps: f32,
    out: &mut Vec<f32>,
) {
    let isa = cpu.isa();
    let affine = affine.map(|(weight, bias)| (weight.as_slice(), bias.as_slice()));
    let parts = (write(at_least(out, x.len()), ROWS_PER_TASK * width), read(x, ROWS_PER_TASK * width));
    cpu.each_part(parts, |_, (out, x)| {
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            layer_norm(isa, x, affine, eps, out);
        }
    });
}

/// Blocks of all rows that are wanted, as they stand when nothing else is left.
fn compact(blocks: &[Block]) -> Vec<Block> {
    let mut end = 0;
    let compact = |block: &Block| {
        let start = end;
        end += block.rows.len();
        Block { rows: start..end, ..block.clone() }
    };
    blocks.iter().map(compact).collect()
}

impl Layer {
    fn pack(tensors: LayerTensors, format: WeightFormat) -> Result<Self, ModelError> {
        let vector = |tensor: &Tensor| -> Result<Vec<f32>, ModelError> { Ok(tensor.to_vec1()?) };
        let norm = |norm: Option<[Tensor; 2]>| -> Result<Option<Affine>, ModelError> {
            norm.map(|[weight, bias]| Ok((vector(&weight)?, vector(&bias)?))).transpose()
        };
        // u, v, q, k to u, q, v, k.
        let reorder = |[u, v, q, k]: [Tensor; 4]| [u, q, v, k];
        let uvqk_bias = tensors.uvqk_bias.map(reorder);
        let output_bias = tensors.output_bias.map(|bias| [bias]);
        let bias = tensors.relative_bias.map(|[positions, times]| -> Result<_, ModelError> {
            Ok(RelativeBias::new(&vector(&positions)?, &vector(&times)?))
        });
        Ok(Self {
            input_norm: norm(tensors.input_norm)?,
            uvqk: Linear::pack(&reorder(tensors.uvqk), uvqk_bias.as_ref().map(|bias| &bias[..]), format)?,
            bias: bias.transpose()?,
            output_norm: norm(tensors.output_norm)?,
            output: Linear::pack(&[tensors.output], output_bias.as_ref().map(|bias| &bias[..]), format)?,
        })
    }
}
