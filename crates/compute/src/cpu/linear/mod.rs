//! Linear layers with their own weight formats.
//!
//! Place in the flow: a family packs each weight matrix once, at load, and multiplies rows by it in
//! every step.
//!
//! ```text
//! rows       activations of a call, packed into tiles as the kernels read them
//! weights    a matrix, packed into panels of 32 outputs: f32, bf16 or q8_0
//! single, bfloat16, quantized    one folder per format: packing, and kernels tile x panel -> sums,
//!                                one per instruction set
//! registers, prefetch            what kernels of an instruction set share
//! sink       what becomes of the sums: stored, added, gated, or scored
//! ```
//!
//! Invariant: in every format a row of the result depends on that row of the input and on the weights
//! alone, bit for bit. The other rows of the call, the threads and the instruction set make no
//! difference. Each format fixes the order of its operations, and every kernel keeps to it.
//!
//! What must not be here: what a layer is for.

mod bfloat16;
mod format;
#[cfg(target_arch = "x86_64")]
mod prefetch;
mod quantized;
#[cfg(target_arch = "x86_64")]
mod registers;
mod rows;
mod scores;
mod single;
mod sink;
#[cfg(test)]
mod tests;
mod weights;

use std::ops::Range;

use candle_core::{DType, Tensor};

pub(crate) use bfloat16::Bf16Kernel;
pub use format::WeightFormat;
pub use quantized::error_of as quantization_error;
pub use rows::Rows;
pub use scores::Scores;
use sink::Sink;
use weights::{Ahead, Weights};

use super::Cpu;
use super::tile::{PANEL, SharedMatrix};
use crate::error::ComputeError;

/// Most rows of a register tile in any format.
const MAX_HEIGHT: usize = 12;

/// Calls `$run::<height>(arguments)` with the height as a constant.
#[cfg(target_arch = "x86_64")]
macro_rules! for_height {
    ($height:expr, $run:ident, $($argument:expr),*) => {
        match $height {
            1 => $run::<1>($($argument),*),
            2 => $run::<2>($($argument),*),
            3 => $run::<3>($($argument),*),
            4 => $run::<4>($($argument),*),
            5 => $run::<5>($($argument),*),
            6 => $run::<6>($($argument),*),
            7 => $run::<7>($($argument),*),
            8 => $run::<8>($($argument),*),
            9 => $run::<9>($($argument),*),
            10 => $run::<10>($($argument),*),
            11 => $run::<11>($($argument),*),
            12 => $run::<12>($($argument),*),
            height => unreachable!("a tile of {height} rows"),
        }
    };
}
#[cfg(target_arch = "x86_64")]
use for_height;

/// Under this many multiply-adds a product runs on the calling thread: waking another costs more.
const PARALLEL_FROM: usize = 100_000;
/// Input values that stay in a core's own cache while all panels pass by. Rows are taken in groups of at
/// most this many values.
const CACHED_INPUT: usize = 128 << 10;
/// Outputs of a gated layer in a panel; the other half of the panel holds their gates.
const GATED: usize = PANEL / 2;

/// `y = x W^T + b`, or `y = silu(x G^T + c) * (x U^T + d)` for a gated pair of matrices.
#[derive(Debug)]
pub struct Linear {
    inputs: usize,
    outputs: usize,
    gated: bool,
    weights: Weights,
    /// One value per column of every panel.
    bias: Option<Vec<f32>>,
}

/// What happens to the values already in the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// They are overwritten.
    Replace,
    /// The product is added to them: a residual connection.
    Add,
}

/// A matrix in single precision, `[outputs, inputs]`, with its bias.
struct Source {
    values: Vec<f32>,
    outputs: usize,
    bias: Option<Vec<f32>>,
}

impl Linear {
    /// Packs weights `[outputs, inputs]` that read the same input, one below the other. Either all of
    /// them have a bias or none.
    ///
    /// # Errors
    ///
    /// When a tensor cannot be read as a matrix of numbers, or the input widths differ.
    pub fn pack(
        weights: &[Tensor],
        biases: Option<&[Tensor]>,
        format: WeightFormat,
    ) -> Result<Self, ComputeError> {
        let (sources, inputs) = sources(weights, biases)?;
        let mut columns = Vec::new();
        for (matrix, source) in sources.iter().enumerate() {
            columns.extend((0..source.outputs).map(|row| Some((matrix, row))));
        }
        let outputs = columns.len();
        Ok(Self::place(&sources, inputs, outputs, false, columns, format))
    }

    /// Packs the two matrices `[outputs, inputs]` of a gated unit (SwiGLU, Shazeer 2020), so that each
    /// output and its gate come from the same panel.
    ///
    /// # Errors
    ///
    /// As [`Linear::pack`]; also when the shapes differ.
    pub fn pack_gated(
        gate: Tensor,
        up: Tensor,
        biases: Option<[Tensor; 2]>,
        format: WeightFormat,
    ) -> Result<Self, ComputeError> {
        let (sources, inputs) = sources(&[gate, up], biases.as_ref().map(|biases| &biases[..]))?;
        let outputs = sources[0].outputs;
        if sources[1].outputs != outputs {
            return Err(ComputeError::Internal(format!(
                "a gate of {outputs} outputs for {}",
                sources[1].outputs
            )));
        }
        let mut columns = Vec::new();
        for first in (0..outputs).step_by(GATED) {
            for matrix in 0..2 {
                columns.extend((first..first + GATED).map(|row| (row < outputs).then_some((matrix, row))));
            }
        }
        Ok(Self::place(&sources, inputs, outputs, true, columns, format))
    }

    /// Packs rows of the sources into panels, in the order of `columns`.
    fn place(
        sources: &[Source],
        inputs: usize,
        outputs: usize,
        gated: bool,
        mut columns: Vec<Option<(usize, usize)>>,
        format: WeightFormat,
    ) -> Self {
        columns.resize(columns.len().next_multiple_of(PANEL), None);
        let rows: Vec<Option<&[f32]>> = columns
            .iter()
            .map(|place| place.map(|(matrix, row)| &sources[matrix].values[row * inputs..][..inputs]))
            .collect();
        let bias = sources.iter().any(|source| source.bias.is_some()).then(|| {
            let of = |&(matrix, row): &(usize, usize)| sources[matrix].bias.as_ref().map_or(0.0, |b| b[row]);
            columns.iter().map(|place| place.as_ref().map_or(0.0, of)).collect()
        });
        Self { inputs, outputs, gated, weights: Weights::pack(&rows, inputs, format), bias }
    }

    /// Width of the input.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Width of the output.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The format of the weights.
    pub fn format(&self) -> WeightFormat {
        self.weights.format()
    }

    /// Bytes of weights.
    pub fn bytes(&self) -> usize {
        self.weights.bytes() + 4 * self.bias.as_ref().map_or(0, Vec::len)
    }

    /// Multiplies rows, packed for this layer's format, into `out` `[rows, outputs]`. A row of the
    /// result depends on that input row alone.
    pub fn forward(&self, cpu: &Cpu, rows: &Rows, output: Output, out: &mut [f32]) {
        assert_eq!(out.len(), rows.count() * self.outputs, "as many output rows as input rows");
        let out = SharedMatrix::new(out, self.outputs);
        let sink = match (self.gated, output) {
            (true, Output::Replace) => Sink::Gate(out),
            (false, Output::Replace) => Sink::Replace(out),
            (false, Output::Add) => Sink::Add(out),
            (true, Output::Add) => unreachable!("a gated layer has no residual connection"),
        };
        self.multiply(cpu, rows, PanelSet::Range(0..self.panels()), sink);
    }

    /// As [`Linear::forward`] with [`Output::Replace`], for some columns of the output. Those before
    /// column `activated` pass SiLU. Columns beside them, up to the next panel, are computed as well.
    pub fn forward_columns(
        &self,
        cpu: &Cpu,
        rows: &Rows,
        columns: Range<usize>,
        activated: usize,
        out: &mut [f32],
    ) {
        assert_eq!(out.len(), rows.count() * self.outputs, "as many output rows as input rows");
        assert!(!self.gated && columns.end <= self.outputs, "columns {columns:?} of {}", self.outputs);
        let panels = PanelSet::Range(columns.start / PANEL..columns.end.div_ceil(PANEL));
        self.multiply(cpu, rows, panels, Sink::Silu(SharedMatrix::new(out, self.outputs), activated));
    }

    /// Multiplies rows by an output matrix (the LM head) for scoring: see [`Scores`].
    pub fn score(&self, cpu: &Cpu, rows: &Rows, scores: &mut Scores) {
        scores.reset(rows.count(), self.outputs);
        let target = scores.target();
        let panels =
            if target.normalized { PanelSet::Range(0..self.panels()) } else { PanelSet::Some(target.kept) };
        self.multiply(cpu, rows, panels, Sink::Score(target));
    }

    fn panels(&self) -> usize {
        self.weights.panels()
    }

    fn multiply(&self, cpu: &Cpu, rows: &Rows, panels: PanelSet<'_>, sink: Sink<'_>) {
        assert_eq!(
            (rows.inputs(), rows.format()),
            (self.inputs, self.format()),
            "rows packed for this layer"
        );
        if rows.count() == 0 {
            return;
        }
        // Rows are taken in groups whose values stay in a core's cache while panel after panel passes by.
        let group = (CACHED_INPUT / self.inputs / rows.height()).max(1);
        let groups = rows.tiles().div_ceil(group);
        let (count, threads) = (panels.len(), cpu.threads());
        if count == 0 {
            return;
        }
        let task = |index: usize| {
            let (first, panel) = (index / count * group, panels.get(index % count));
            // Threads take panels in turn. The next one must be fetched from farther away than the first
            // tile can wait for.
            let next = index % count + threads;
            let next = (next < count).then(|| panels.get(next));
            let tiles = first..rows.tiles().min(first + group);
            let mut sums = [[0.0; PANEL]; MAX_HEIGHT];
            for tile in tiles.clone() {
                let range = rows.tile_rows(tile);
                let sums = &mut sums[..range.len()];
                let ahead = next.map(|panel| Ahead { panel, part: tile - first, parts: tiles.len() });
                self.weights.multiply(cpu, rows, tile, panel, ahead, sums);
                let bias = self.bias.as_ref().and_then(|bias| bias.as_chunks().0.get(panel));
                sink.store(cpu.isa(), sums, bias, range.start, panel);
            }
        };
        let work = rows.count() * self.inputs * count * PANEL;
        if work < PARALLEL_FROM {
            (0..groups * count).for_each(task);
        } else {
            cpu.each(groups * count, PARALLEL_FROM.div_ceil(work / (groups * count)), task);
        }
    }
}

/// Panels to multiply by.
enum PanelSet<'a> {
    Range(Range<usize>),
    Some(&'a [u32]),
}

impl PanelSet<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Range(panels) => panels.len(),
            Self::Some(panels) => panels.len(),
        }
    }

    fn get(&self, index: usize) -> usize {
        match self {
            Self::Range(panels) => panels.start + index,
            Self::Some(panels) => panels[index] as usize,
        }
    }
}

fn sources(weights: &[Tensor], biases: Option<&[Tensor]>) -> Result<(Vec<Source>, usize), ComputeError> {
    let widths = weights.iter().map(|weight| weight.dims2()).collect::<Result<Vec<_>, _>>()?;
    let inputs = widths.first().map_or(0, |&(_, inputs)| inputs);
    if inputs == 0 || widths.iter().any(|&(_, width)| width != inputs) {
        return Err(ComputeError::Internal(format!("packing matrices of the shapes {widths:?}")));
    }
    let mut sources = Vec::with_capacity(weights.len());
    for (index, (weight, (outputs, _))) in weights.iter().zip(widths).enumerate() {
        let values = weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let bias = biases.map(|biases| biases[index].to_dtype(DType::F32)?.to_vec1::<f32>()).transpose()?;
        sources.push(Source { values, outputs, bias });
    }
    Ok((sources, inputs))
}
