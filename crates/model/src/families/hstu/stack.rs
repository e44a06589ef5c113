//! The layers of HSTU: one implementation for all variants, told apart by constants alone.
//!
//! ```text
//! u, v, q, k = split(norm(x) W (+ b)), with SiLU on all of them, on u, or on none
//! a          = pointwise attention of q over k and v
//! x          = (x +) parts(u, a, norm(a)) Wo (+ bo)        parts: u * n, [u, a, u * n] or [u, n, u * n]
//! ```
//!
//! In the last layer only the rows whose state is wanted have a u and a q; the others need keys and
//! values alone. So columns are put in the order u, q, v, k when a layer is loaded.
//!
//! What must not be here: where the rows come from, what becomes of the final states.

use std::cell::RefCell;
use std::ops::Range;

use beamline_compute::cpu::attention::{Block, Tables};
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::{Linear, Output, Rows, WeightFormat};
use beamline_compute::cpu::mask::Mask;
use beamline_compute::cpu::pages::PageStore;
use beamline_compute::cpu::parallel::{at_least, each_group, keep_rows, read, rows_of_group, write};
use beamline_compute::cpu::pointwise::{Call, RelativeBias, Shape, attend};
use beamline_compute::cpu::vector::{gate, layer_norm};
use beamline_compute::cpu::{Cpu, NewRows, PageWrites};
use candle_core::Tensor;

use super::batch::HstuBatch;
use super::config::{NormKind, OutputParts, SiluScope, StackConfig, Variant};
use super::layer_tensors::LayerTensors;
use crate::checkpoint::tensors::Tensors;
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

    /// Constants of the layers.
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
    pub fn page_store(&self, format: KvFormat, pages: usize) -> Result<PageStore, ModelError> {
        Ok(PageStore::new(self.config.page_shape(format), pages)?)
    }

    /// Runs a batch: writes keys and values of its rows, leaves the final states of the wanted rows in
    /// `workspace.hidden`. For tests that look inside, `observe` is given the residual stream before the
    /// layers (0) and after each (1..).
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
        let destinations = &batch.layout.destinations;
        if let Some(layer) = self.layers.first() {
            let columns = self.columns(config.layers == 1);
            let rows = rows_of_group(batch.rows(), cpu.threads());
            let groups = (read(&w.hidden, rows * width), write(projected, rows * uvqk));
            let groups = (groups, pages.writes(0, destinations).in_parts(rows));
            each_group(cpu, groups, &mut w.scratch, &SCRATCH, |cpu, scratch, part| {
                let ((hidden, projected), writes) = part;
                self.project(cpu, layer, columns.clone(), hidden, projected, scratch);
                self.store(cpu, writes, projected);
            });
        }
        let final_blocks = compact(&batch.layout.final_blocks);
        let all_rows = batch.sequences();
        let of_wanted: Vec<u32> = batch.layout.wanted.iter().map(|&row| all_rows.of_row[row]).collect();
        for (index, layer) in self.layers.iter().enumerate() {
            let layout = &batch.layout;
            let (mut blocks, mut sequences) = (&layout.blocks, all_rows);
            let next = self.layers.get(index + 1);
            if next.is_none() {
                // What is not wanted ends here.
                keep_rows(&mut w.hidden, width, &layout.wanted);
                w.hidden.truncate(layout.wanted.len() * width);
                let columns = 0..config.values() + config.keys();
                let rows = rows_of_group(layout.wanted.len(), cpu.threads());
                let projected = &mut projected[..layout.wanted.len() * uvqk];
                let groups = (read(&w.hidden, rows * width), write(projected, rows * uvqk));
                each_group(cpu, groups, &mut w.scratch, &SCRATCH, |cpu, scratch, (hidden, projected)| {
                    self.project(cpu, layer, columns.clone(), hidden, projected, scratch);
                });
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
            let rows = rows_of_group(left, cpu.threads());
            let groups = (read(attended, rows * values), write(&mut w.hidden, rows * width));
            match next {
                None => {
                    let groups = (groups, read(projected, rows * uvqk));
                    each_group(cpu, groups, &mut w.scratch, &SCRATCH, |cpu, scratch, part| {
                        let ((attended, hidden), uvqk) = part;
                        self.leave(cpu, layer, attended, uvqk, hidden, scratch);
                    });
                }
                Some(next) => {
                    let columns = self.columns(index + 2 == self.layers.len());
                    let writes = pages.writes(index + 1, destinations).in_parts(rows);
                    let groups = (groups, (write(projected, rows * uvqk), writes));
                    each_group(cpu, groups, &mut w.scratch, &SCRATCH, |cpu, scratch, part| {
                        let ((attended, hidden), (uvqk, writes)) = part;
                        self.leave(cpu, layer, attended, uvqk, hidden, scratch);
                        self.project(cpu, next, columns.clone(), hidden, uvqk, scratch);
                        self.store(cpu, writes, uvqk);
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

    /// Projects the residual stream to these columns of u, q, v and k. The other columns must not be
    /// read afterwards.
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
        let activated = match config.silu {
            SiluScope::Uvqk => config.uvqk(),
            SiluScope::U => config.values(),
            SiluScope::None => 0,
        };
        layer.uvqk.forward_columns(cpu, &scratch.rows, columns, activated, uvqk);
    }

    /// From what attention found back to the residual stream.
    fn leave(
        &self,
        cpu: &Cpu,
        layer: &Layer,
        attended: &[f32],
        uvqk: &[f32],
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
    }

    /// Writes keys and values of projected rows into pages.
    fn store(&self, cpu: &Cpu, writes: PageWrites<'_>, uvqk: &[f32]) {
        let config = &self.config;
        let values = config.values() + config.keys();
        let keys = values + config.values();
        writes.write(cpu, NewRows { rows: uvqk, width: config.uvqk(), keys, values });
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
