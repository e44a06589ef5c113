//! The small multi-layer perceptrons around the layers of the ranking variants.
//!
//! ```text
//! Swish  Linear -> x * sigmoid(norm(x)) -> Linear (-> norm)       tensors 0, 1, 2 (, 3)
//! Plain  Linear -> activation -> Linear -> ..                     tensors 0, 2, 4, ..
//! ```

use std::collections::BTreeMap;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::linear::{Linear, Output, Rows, WeightFormat};
use beamline_compute::cpu::vector::swish_norm;
use rayon::prelude::*;

use super::config::Activation;
use super::stack::{Affine, ROWS_PER_TASK, norm_rows};
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;

/// Sizes of a [`Swish`].
#[derive(Clone, Copy, Debug)]
pub(super) struct SwishShape {
    pub(super) inputs: usize,
    pub(super) hidden: usize,
    pub(super) outputs: usize,
    /// Whether a norm ends it.
    pub(super) normed: bool,
}

impl SwishShape {
    /// Names and shapes of its tensors.
    pub(super) fn expect(self, prefix: &str, expected: &mut BTreeMap<String, Vec<usize>>) {
        let Self { inputs, hidden, outputs, normed } = self;
        let mut add = |name: &str, shape: Vec<usize>| {
            expected.insert(format!("{prefix}.{name}"), shape);
        };
        add("0.weight", vec![hidden, inputs]);
        add("0.bias", vec![hidden]);
        add("1.weight", vec![hidden]);
        add("1.bias", vec![hidden]);
        add("2.weight", vec![outputs, hidden]);
        add("2.bias", vec![outputs]);
        if normed {
            add("3.weight", vec![outputs]);
            add("3.bias", vec![outputs]);
        }
    }
}

/// Linear, swish norm, linear, and perhaps a norm.
#[derive(Debug)]
pub(super) struct Swish {
    /// A layer without inputs is its bias.
    first: Result<Linear, Vec<f32>>,
    inner_norm: Affine,
    second: Linear,
    norm: Option<Affine>,
    eps: f32,
}

impl Swish {
    pub(super) fn load(
        tensors: &Tensors,
        prefix: &str,
        shape: SwishShape,
        eps: f64,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let load = |name: &str| tensors.load(&format!("{prefix}.{name}"));
        let vector = |name: &str| -> Result<Vec<f32>, ModelError> { Ok(load(name)?.to_vec1()?) };
        let linear = |layer: usize| -> Result<Linear, ModelError> {
            let (weight, bias) = (load(&format!("{layer}.weight"))?, load(&format!("{layer}.bias"))?);
            Ok(Linear::pack(&[weight], Some(&[bias]), format)?)
        };
        Ok(Self {
            first: if shape.inputs == 0 { Err(vector("0.bias")?) } else { Ok(linear(0)?) },
            inner_norm: (vector("1.weight")?, vector("1.bias")?),
            second: linear(2)?,
            norm: if shape.normed { Some((vector("3.weight")?, vector("3.bias")?)) } else { None },
            eps: eps as f32,
        })
    }

    /// For `count` rows `[count, inputs]`: `[count, outputs]`.
    pub(super) fn forward(&self, cpu: &Cpu, x: &[f32], count: usize) -> Vec<f32> {
        let (isa, mut rows) = (cpu.isa(), Rows::default());
        let mut hidden = match &self.first {
            Ok(first) => apply(cpu, first, x, &mut rows),
            Err(bias) => bias.repeat(count),
        };
        let (weight, bias) = &self.inner_norm;
        cpu.run(|| {
            let rows = hidden.par_chunks_mut(weight.len()).with_min_len(ROWS_PER_TASK);
            rows.for_each(|row| swish_norm(isa, row, weight, bias, self.eps));
        });
        let mut out = apply(cpu, &self.second, &hidden, &mut rows);
        if self.norm.is_some() {
            let mut normed = Vec::new();
            norm_rows(cpu, &out, self.second.outputs(), self.norm.as_ref(), self.eps, &mut normed);
            out = normed;
        }
        out
    }

    pub(super) fn bytes(&self) -> usize {
        self.first.as_ref().map_or(0, Linear::bytes) + self.second.bytes()
    }
}

/// Linear layers with an activation between them.
#[derive(Debug)]
pub(super) struct Plain {
    layers: Vec<Linear>,
    activation: Activation,
}

impl Plain {
    /// Names and shapes of its tensors.
    pub(super) fn expect(
        prefix: &str,
        inputs: usize,
        widths: &[usize],
        bias: bool,
        expected: &mut BTreeMap<String, Vec<usize>>,
    ) {
        let mut inputs = inputs;
        for (layer, &outputs) in widths.iter().enumerate() {
            expected.insert(format!("{prefix}.{}.weight", 2 * layer), vec![outputs, inputs]);
            if bias {
                expected.insert(format!("{prefix}.{}.bias", 2 * layer), vec![outputs]);
            }
            inputs = outputs;
        }
    }

    pub(super) fn load(
        tensors: &Tensors,
        prefix: &str,
        layers: usize,
        bias: bool,
        activation: Activation,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let layer = |layer: usize| -> Result<Linear, ModelError> {
            let load = |kind: &str| tensors.load(&format!("{prefix}.{}.{kind}", 2 * layer));
            let bias = if bias { Some([load("bias")?]) } else { None };
            Ok(Linear::pack(&[load("weight")?], bias.as_ref().map(|bias| &bias[..]), format)?)
        };
        Ok(Self { layers: (0..layers).map(layer).collect::<Result<_, _>>()?, activation })
    }

    pub(super) fn forward(&self, cpu: &Cpu, x: &[f32]) -> Vec<f32> {
        let (mut rows, mut x) = (Rows::default(), x.to_vec());
        for (index, layer) in self.layers.iter().enumerate() {
            if index > 0 {
                x.iter_mut().for_each(|x| *x = activate(self.activation, *x));
            }
            x = apply(cpu, layer, &x, &mut rows);
        }
        x
    }

    pub(super) fn bytes(&self) -> usize {
        self.layers.iter().map(Linear::bytes).sum()
    }
}

/// A linear layer on rows that are not packed yet.
pub(super) fn apply(cpu: &Cpu, linear: &Linear, x: &[f32], rows: &mut Rows) -> Vec<f32> {
    rows.pack(cpu, x, linear.inputs(), linear.format());
    let mut out = vec![0.0; rows.count() * linear.outputs()];
    linear.forward(cpu, rows, Output::Replace, &mut out);
    out
}

fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Relu => x.max(0.0),
        Activation::Gelu => {
            let x = f64::from(x);
            (x * 0.5 * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
        }
    }
}

/// The error function by a series whose terms all have one sign. It is 1 beyond 6, where single
/// precision shows no difference.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-17 * sum.abs() {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    sum * (-x * x).exp() * 2.0 / std::f64::consts::PI.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_is_known_values() {
        for (x, expected) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (4.0, 0.999_999_984_582_742_1),
        ] {
            assert!((erf(x) - expected).abs() < 1e-14, "{x}: {}", erf(x));
            assert!((erf(-x) + expected).abs() < 1e-14);
        }
        assert!((activate(Activation::Gelu, 1.0) - 0.841_344_7).abs() < 1e-6);
    }
}
