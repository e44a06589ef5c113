//! Products of rows and weights, in every format, on the layers of two decoders.
//!
//! S is 256 wide and M 768, as in the benchmarks of whole servers. Prefills have as many rows as their
//! contexts, branch steps as many as beams. Retrieval and the last step of a greedy search have one row.

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::linear::{Linear, Output, Rows, Scores, WeightFormat};
use candle_core::{Device, Tensor};

use crate::case::{Case, Kernel};
use crate::peaks::Instruction;

/// A layer of a model.
struct Layer {
    name: &'static str,
    inputs: usize,
    outputs: usize,
    gated: bool,
}

const S: [Layer; 4] = layers(256, 512, 1024);
const M: [Layer; 4] = layers(768, 1280, 2304);
/// Rows of a prefill, and of what is not one.
const S_ROWS: (usize, [usize; 4]) = (321, [128, 32, 20, 1]);
const M_ROWS: (usize, [usize; 4]) = (641, [128, 32, 20, 1]);

/// The least share of the plain loop's rate in a prefill.
fn demand(format: WeightFormat) -> f64 {
    match format {
        WeightFormat::F32 | WeightFormat::Bf16 => 0.8,
        // With every eight dot products a block asks for a conversion, a product and a multiply-add.
        WeightFormat::Q8_0 => 0.55,
    }
}

const fn layers(hidden: usize, heads: usize, inner: usize) -> [Layer; 4] {
    [
        Layer { name: "qkv", inputs: hidden, outputs: heads, gated: false },
        Layer { name: "out", inputs: hidden, outputs: hidden, gated: false },
        Layer { name: "gate", inputs: hidden, outputs: inner, gated: true },
        Layer { name: "down", inputs: inner, outputs: hidden, gated: false },
    ]
}

struct Product {
    format: WeightFormat,
    linear: Linear,
    x: Vec<f32>,
    rows: Rows,
    out: Vec<f32>,
}

impl Kernel for Product {
    fn prepare(&mut self, cpu: &Cpu) {
        self.rows.pack(cpu, &self.x, self.linear.inputs(), self.format);
    }

    fn run(&mut self, cpu: &Cpu) {
        self.linear.forward(cpu, &self.rows, Output::Replace, &mut self.out);
    }
}

/// Rows that are packed for a format.
struct Packing {
    format: WeightFormat,
    inputs: usize,
    x: Vec<f32>,
    rows: Rows,
}

impl Kernel for Packing {
    fn prepare(&mut self, _: &Cpu) {}

    fn run(&mut self, cpu: &Cpu) {
        self.rows.pack(cpu, &self.x, self.inputs, self.format);
    }
}

/// The scores of a step: the logits of some tokens, and the normalisers over all.
struct Head {
    format: WeightFormat,
    linear: Linear,
    x: Vec<f32>,
    rows: Rows,
    scores: Scores,
}

impl Kernel for Head {
    fn prepare(&mut self, cpu: &Cpu) {
        self.rows.pack(cpu, &self.x, self.linear.inputs(), self.format);
    }

    fn run(&mut self, cpu: &Cpu) {
        self.scores.begin(true);
        (0..self.linear.outputs() as u32).step_by(64).for_each(|token| self.scores.want(token));
        self.linear.score(cpu, &self.rows, &mut self.scores);
    }
}

/// Every product, and what packing its rows takes.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for format in WeightFormat::ALL {
        for (model, layers, (prefill, others)) in [("S", &S, S_ROWS), ("M", &M, M_ROWS)] {
            for rows in std::iter::once(prefill).chain(others) {
                let demand = (rows == prefill).then(|| demand(format));
                cases.extend(layers.iter().map(|layer| product(model, layer, format, rows, demand)));
                cases.push(packing(model, layers[0].inputs, format, rows));
            }
            let vocabulary = if model == "S" { 832 } else { 3136 };
            cases.extend([128, 32].map(|rows| head(model, layers[0].inputs, vocabulary, format, rows)));
        }
    }
    cases
}

fn product(model: &str, layer: &Layer, format: WeightFormat, rows: usize, demand: Option<f64>) -> Case {
    let columns = if layer.gated { 2 * layer.outputs } else { layer.outputs };
    let kernel = Product {
        format,
        linear: linear(layer, format),
        x: numbers(rows * layer.inputs),
        rows: Rows::default(),
        out: vec![0.0; rows * layer.outputs],
    };
    Case {
        family: "product",
        format: format.name(),
        shape: format!("{model} {rows} rows, {} {} x {columns}", layer.name, layer.inputs),
        differs_at: differs_at(format),
        instruction: Some(match format {
            WeightFormat::F32 => Instruction::MultiplyAdd,
            WeightFormat::Bf16 => Instruction::Bfloat16,
            WeightFormat::Q8_0 => Instruction::Bytes,
        }),
        operations: 2.0 * (rows * layer.inputs * columns) as f64,
        demand,
        kernel: Box::new(kernel),
    }
}

fn head(model: &str, inputs: usize, outputs: usize, format: WeightFormat, rows: usize) -> Case {
    let layer = Layer { name: "head", inputs, outputs, gated: false };
    let kernel = Head {
        format,
        linear: linear(&layer, format),
        x: numbers(rows * inputs),
        rows: Rows::default(),
        scores: Scores::default(),
    };
    Case { family: "score", kernel: Box::new(kernel), ..product(model, &layer, format, rows, None) }
}

fn packing(model: &str, inputs: usize, format: WeightFormat, rows: usize) -> Case {
    Case {
        family: "pack",
        format: format.name(),
        shape: format!("{model} {rows} rows of {inputs}"),
        differs_at: differs_at(format),
        instruction: None,
        operations: (rows * inputs) as f64,
        demand: None,
        kernel: Box::new(Packing { format, inputs, x: numbers(rows * inputs), rows: Rows::default() }),
    }
}

fn differs_at(format: WeightFormat) -> &'static [&'static str] {
    match format {
        WeightFormat::F32 => &["portable", "avx2", "avx512"],
        WeightFormat::Bf16 => &["portable", "avx2", "avx512", "avx512bf16"],
        WeightFormat::Q8_0 => &["portable", "avx2", "avx512", "avx512vnni"],
    }
}

fn linear(layer: &Layer, format: WeightFormat) -> Linear {
    let matrix = || {
        let shape = (layer.outputs, layer.inputs);
        Tensor::from_vec(numbers(layer.outputs * layer.inputs), shape, &Device::Cpu).expect("a matrix")
    };
    if layer.gated {
        Linear::pack_gated(matrix(), matrix(), None, format).expect("two matrices")
    } else {
        Linear::pack(&[matrix()], None, format).expect("a matrix")
    }
}

/// Numbers between -1 and 1.
pub(crate) fn numbers(count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}
