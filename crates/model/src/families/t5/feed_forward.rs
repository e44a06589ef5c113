//! The feed-forward layer of a block: norm, product, activation, product.
//!
//! Place in the flow: the last sublayer of every block, in both stacks, on any rows.

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::activation::Activation;
use beamline_compute::cpu::linear::{Linear, Output, Rows, WeightFormat};
use beamline_compute::cpu::parallel::{at_least, read, write};
use beamline_compute::cpu::vector::gate;

use super::config::T5Config;
use super::tensors::Stack;
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;

/// Rows of element-wise work that are worth a task of their own.
const ROWS_PER_TASK: usize = 16;

/// What a group of rows needs between two attentions; the memory is reused.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) rows: Rows,
    inner: Vec<f32>,
    gated: Vec<f32>,
}

/// `x += act(norm(x) W0) W`, or `x += (act(norm(x) W0) * norm(x) W1) W`.
#[derive(Debug)]
pub(super) struct FeedForward {
    norm: Vec<f32>,
    epsilon: f32,
    /// The activated product; of a gated layer the other one behind it.
    first: Linear,
    second: Linear,
    activation: Activation,
    gated: bool,
}

impl FeedForward {
    pub(super) fn load(
        config: &T5Config,
        tensors: &Tensors,
        stack: Stack,
        block: usize,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let layer = format!("{}.block.{block}.layer.{}", stack.name(), stack.feed_forward());
        let load = |name: &str| tensors.load(&format!("{layer}.{name}.weight"));
        let names: &[&str] = if config.gated { &["wi_0", "wi_1"] } else { &["wi"] };
        let first = names
            .iter()
            .map(|name| load(&format!("DenseReluDense.{name}")))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            norm: load("layer_norm")?.to_vec1()?,
            epsilon: config.layer_norm_epsilon,
            first: Linear::pack(&first, None, format)?,
            second: Linear::pack(&[load("DenseReluDense.wo")?], None, format)?,
            activation: config.activation,
            gated: config.gated,
        })
    }

    /// Adds the layer to rows `[rows, d_model]` of a residual stream.
    pub(super) fn add(&self, cpu: &Cpu, hidden: &mut [f32], scratch: &mut Scratch) {
        let Scratch { rows, inner, gated } = scratch;
        let (format, width) = (self.first.format(), self.second.inputs());
        rows.pack_normed(cpu, hidden, &self.norm, self.epsilon, format);
        let count = rows.count();
        let inner = at_least(inner, count * self.first.outputs());
        self.first.forward(cpu, rows, Output::Replace, inner);
        let (isa, activation) = (cpu.isa(), self.activation);
        let activated = if self.gated {
            let gated = at_least(gated, count * width);
            let parts = (read(&*inner, ROWS_PER_TASK * 2 * width), write(&mut *gated, ROWS_PER_TASK * width));
            cpu.each_part(parts, |_, (inner, gated)| {
                for (pair, out) in inner.chunks_exact(2 * width).zip(gated.chunks_exact_mut(width)) {
                    let (first, other) = pair.split_at(width);
                    out.copy_from_slice(first);
                    activation.apply(isa, out);
                    gate(isa, out, other);
                }
            });
            gated
        } else {
            cpu.each_part(write(&mut *inner, ROWS_PER_TASK * width), |_, part| activation.apply(isa, part));
            inner
        };
        rows.pack(cpu, activated, width, format);
        self.second.forward(cpu, rows, Output::Add, hidden);
    }

    /// Bytes of weights.
    pub(super) fn bytes(&self) -> usize {
        self.first.bytes() + self.second.bytes() + size_of_val(&self.norm[..])
    }
}
