//! Linear layers with their own weight layout.
//!
//! A weight matrix is packed once, at load, into panels of [`PANEL`] output columns, `[panel][input][PANEL]`: the
//! order in which the register tile reads it. Several matrices that read the same input (query, key and value;
//! gate and up) are packed as one.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::Cpu;
use super::isa::per_isa;
use super::tile::{PANEL, SharedMatrix, accumulate};
use crate::error::ModelError;

/// Under this many multiply-adds a product runs on the calling thread: waking another costs more.
const PARALLEL_FROM: usize = 200_000;
/// Input values that stay in a core's own cache while all panels pass by: rows are taken in groups of so many.
const CACHED_INPUT: usize = 128 << 10;

/// `y = x W^T + b` for weights in single precision.
#[derive(Debug)]
pub struct Linear {
    inputs: usize,
    outputs: usize,
    /// `[panel][input][PANEL]`; columns past `outputs` are zero.
    panels: Vec<f32>,
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

impl Linear {
    /// Packs weights `[outputs, inputs]` that read the same input, one below the other, with a bias for all of
    /// them or for none.
    ///
    /// # Errors
    ///
    /// When a tensor cannot be read as a matrix of numbers, or the input widths differ.
    pub fn pack(weights: &[Tensor], biases: Option<&[Tensor]>) -> Result<Self, ModelError> {
        let widths = weights.iter().map(|weight| weight.dims2()).collect::<Result<Vec<_>, _>>()?;
        let inputs = widths.first().map_or(0, |&(_, inputs)| inputs);
        if inputs == 0 || widths.iter().any(|&(_, width)| width != inputs) {
            return Err(ModelError::Internal(format!("packing matrices of the shapes {widths:?}")));
        }
        let outputs: usize = widths.iter().map(|&(outputs, _)| outputs).sum();
        let mut panels = vec![0.0; outputs.div_ceil(PANEL) * inputs * PANEL];
        let mut output = 0;
        for weight in weights {
            let values = weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            for row in values.chunks_exact(inputs) {
                let panel = &mut panels[output / PANEL * inputs * PANEL..][..inputs * PANEL];
                for (place, weight) in panel.iter_mut().skip(output % PANEL).step_by(PANEL).zip(row) {
                    *place = *weight;
                }
                output += 1;
            }
        }
        let bias = biases.map(|biases| -> Result<Vec<f32>, ModelError> {
            let mut all = Vec::with_capacity(outputs);
            for bias in biases {
                all.extend(bias.to_dtype(DType::F32)?.to_vec1::<f32>()?);
            }
            Ok(all)
        });
        Ok(Self { inputs, outputs, panels, bias: bias.transpose()? })
    }

    /// Width of the input.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Width of the output.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes of weights.
    pub fn bytes(&self) -> usize {
        4 * (self.panels.len() + self.bias.as_ref().map_or(0, Vec::len))
    }

    /// Multiplies `x` `[rows, inputs]` into `out` `[rows, outputs]`. A row of the result depends on that row of
    /// `x` alone.
    pub fn forward(&self, cpu: &Cpu, x: &[f32], output: Output, out: &mut [f32]) {
        let rows = x.len() / self.inputs;
        assert_eq!(x.len(), rows * self.inputs, "whole input rows");
        assert_eq!(out.len(), rows * self.outputs, "as many output rows as input rows");
        let out = SharedMatrix::new(out, self.outputs);
        let panels = self.outputs.div_ceil(PANEL);
        let group = (CACHED_INPUT / self.inputs).clamp(PANEL, rows.max(PANEL));
        let task = |index: usize| {
            let (first_row, panel) = (index / panels * group, index % panels);
            let x = &x[first_row * self.inputs..rows.min(first_row + group) * self.inputs];
            let weights = &self.panels[panel * self.inputs * PANEL..][..self.inputs * PANEL];
            let bias =
                self.bias.as_ref().map(|bias| &bias[panel * PANEL..self.outputs.min((panel + 1) * PANEL)]);
            multiply_panel(cpu.isa, x, self.inputs, weights, bias, first_row, panel * PANEL, output, out);
        };
        let tasks = panels * rows.div_ceil(group);
        if rows * self.inputs * self.outputs < PARALLEL_FROM {
            (0..tasks).for_each(task);
        } else {
            let least = PARALLEL_FROM.div_ceil(rows.min(group) * self.inputs * PANEL);
            cpu.run(|| (0..tasks).into_par_iter().with_min_len(least).for_each(task));
        }
    }
}

per_isa! {
    /// All rows of `x` times one panel of weights, into rows `first_row..` and columns `column..` of `out`. The calls
    /// that share `out` must be for different rows or different panels.
    fn multiply_panel(x: &[f32], inputs: usize, panel: &[f32], bias: Option<&[f32]>, first_row: usize, column: usize,
        output: Output, out: SharedMatrix<'_>) = multiply_panel_body
}

#[inline(always)]
fn multiply_panel_body<const R: usize>(
    x: &[f32],
    inputs: usize,
    panel: &[f32],
    bias: Option<&[f32]>,
    first_row: usize,
    column: usize,
    output: Output,
    out: SharedMatrix<'_>,
) {
    let rows = x.len() / inputs;
    let mut row = 0;
    while row + R <= rows {
        let mut sums = [[0.0; PANEL]; R];
        accumulate(&x[row * inputs..], inputs, inputs, panel, PANEL, &mut sums);
        for (offset, sums) in sums.iter().enumerate() {
            store(sums, bias, column, output, first_row + row + offset, out);
        }
        row += R;
    }
    while row < rows {
        let mut sums = [[0.0; PANEL]; 1];
        accumulate(&x[row * inputs..], inputs, inputs, panel, PANEL, &mut sums);
        store(&sums[0], bias, column, output, first_row + row, out);
        row += 1;
    }
}

#[inline(always)]
fn store(
    sums: &[f32; PANEL],
    bias: Option<&[f32]>,
    column: usize,
    output: Output,
    row: usize,
    out: SharedMatrix<'_>,
) {
    let width = PANEL.min(out.columns() - column);
    // SAFETY: `column` names the panel; each pair of row group and panel is multiplied by one call, which visits a row
    // once.
    let out = unsafe { out.row_segment(row, column, width) };
    for (index, out) in out.iter_mut().enumerate() {
        let mut value = sums[index];
        if let Some(bias) = bias {
            value += bias[index];
        }
        *out = match output {
            Output::Replace => value,
            Output::Add => *out + value,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;
    use candle_core::Device;
    use proptest::prelude::*;

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..count)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    proptest! {
        #[test]
        fn products_are_right_and_rows_do_not_see_each_other(
            rows in 1usize..40, inputs in 1usize..70, outputs in 1usize..100, seed in 0u64..1000, bias in any::<bool>(),
        ) {
            let (x, w, b) = (numbers(rows * inputs, seed), numbers(outputs * inputs, seed + 1), numbers(outputs, seed + 2));
            let weight = Tensor::from_slice(&w, (outputs, inputs), &Device::Cpu).unwrap();
            let biases = [Tensor::from_slice(&b, outputs, &Device::Cpu).unwrap()];
            let linear = Linear::pack(&[weight], bias.then_some(&biases)).unwrap();
            let mut first: Option<Vec<u32>> = None;
            for isa in Isa::all() {
                let cpu = Cpu::with_isa(2, isa).unwrap();
                let mut out = vec![0.5; rows * outputs];
                linear.forward(&cpu, &x, Output::Add, &mut out);
                for row in 0..rows {
                    for column in 0..outputs {
                        let truth: f64 = (0..inputs).map(|k| f64::from(x[row * inputs + k]) * f64::from(w[column * inputs + k])).sum::<f64>()
                            + 0.5 + if bias { f64::from(b[column]) } else { 0.0 };
                        prop_assert!((f64::from(out[row * outputs + column]) - truth).abs() < 1e-5);
                    }
                    let mut alone = vec![0.5; outputs];
                    linear.forward(&cpu, &x[row * inputs..(row + 1) * inputs], Output::Add, &mut alone);
                    prop_assert_eq!(&alone[..], &out[row * outputs..(row + 1) * outputs]);
                }
                let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
                prop_assert!(first.get_or_insert(bits.clone()) == &bits, "{} differs", isa.name());
            }
        }
    }
}
