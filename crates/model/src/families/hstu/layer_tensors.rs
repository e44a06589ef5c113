//! The tensors of a layer: what they are called in each variant, their shapes, and how they are read.
//!
//! Place in the flow: the layers on the CPU and those on a graphics processor are made from a
//! [`LayerTensors`], each in its own format.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::config::{Layout, NormKind, StackConfig, Variant};
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;

/// Names of the tensors of a layer.
struct Names {
    uvqk: &'static str,
    uvqk_bias: &'static str,
    input_norm: [&'static str; 2],
    output_norm: [&'static str; 2],
    output: &'static str,
    output_bias: &'static str,
    time_weights: &'static str,
    position_weights: &'static str,
}

impl Variant {
    /// What the names of a layer's tensors begin with, up to its number.
    pub fn layer_prefix(self) -> &'static str {
        match self {
            Self::Research => "_hstu._attention_layers.",
            Self::Dlrm => "_hstu_transducer._stu_module._stu_layers.",
            Self::Nvidia => "_hstu_block._attention_layers.",
        }
    }

    /// Names that a variant has no tensor for are empty: configurations that need them are refused.
    fn names(self, layout: Layout) -> Names {
        let none = Names {
            uvqk: "",
            uvqk_bias: "",
            input_norm: ["", ""],
            output_norm: ["", ""],
            output: "",
            output_bias: "",
            time_weights: "",
            position_weights: "",
        };
        match (self, layout) {
            (Self::Research, _) => Names {
                uvqk: "_uvqk",
                output: "_o.weight",
                output_bias: "_o.bias",
                time_weights: "_rel_attn_bias._ts_w",
                position_weights: "_rel_attn_bias._pos_w",
                ..none
            },
            (Self::Dlrm, _) => Names {
                uvqk: "_uvqk_weight",
                uvqk_bias: "_uvqk_beta",
                input_norm: ["_input_norm_weight", "_input_norm_bias"],
                output_norm: ["_output_norm_weight", "_output_norm_bias"],
                output: "_output_weight",
                ..none
            },
            (Self::Nvidia, layout) => Names {
                uvqk: if layout == Layout::InOut { "_linear_uvqk_weight" } else { "_linear_uvqk.weight" },
                uvqk_bias: if layout == Layout::InOut { "_linear_uvqk_bias" } else { "_linear_uvqk.bias" },
                input_norm: ["_input_layernorm_weight", "_input_layernorm_bias"],
                output_norm: ["_output_layernorm_weight", "_output_layernorm_bias"],
                output: if layout == Layout::InOut { "_linear_proj_weight" } else { "_linear_proj.weight" },
                ..none
            },
        }
    }
}

impl StackConfig {
    /// Names and shapes of the tensors of all layers.
    pub fn expected_tensors(&self, variant: Variant, prefix: &str) -> BTreeMap<String, Vec<usize>> {
        let names = variant.names(self.uvqk_layout);
        let mut expected = BTreeMap::new();
        let matrix = |layout: Layout, inputs: usize, outputs: usize| match layout {
            Layout::InOut => vec![inputs, outputs],
            Layout::OutIn => vec![outputs, inputs],
        };
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: Vec<usize>| {
                expected.insert(format!("{prefix}{layer}.{name}"), shape);
            };
            add(names.uvqk, matrix(self.uvqk_layout, self.model_dim, self.uvqk()));
            if self.uvqk_bias {
                add(names.uvqk_bias, vec![self.uvqk()]);
            }
            let inputs = self.output_parts.count() * self.values();
            add(names.output, matrix(self.output_layout, inputs, self.model_dim));
            if self.output_bias {
                add(names.output_bias, vec![self.model_dim]);
            }
            if self.input_norm.affine {
                names.input_norm.iter().for_each(|name| add(name, vec![self.model_dim]));
            }
            if self.output_norm.affine {
                let width = match self.output_norm.kind {
                    NormKind::Layer => self.values(),
                    NormKind::Group => self.heads,
                };
                names.output_norm.iter().for_each(|name| add(name, vec![width]));
            }
            if let Some(bias) = self.relative_bias {
                add(names.time_weights, vec![bias.time_buckets + 1]);
                add(names.position_weights, vec![2 * bias.positions - 1]);
            }
        }
        expected
    }
}

/// A matrix as `[outputs, inputs]`, however it lies in the file.
pub(crate) fn out_in(matrix: Tensor, layout: Layout) -> Result<Tensor, ModelError> {
    Ok(match layout {
        Layout::OutIn => matrix,
        Layout::InOut => transposed(&matrix)?,
    })
}

/// Rows for columns, in squares whose lines stay in the cache.
fn transposed(matrix: &Tensor) -> Result<Tensor, ModelError> {
    const SIDE: usize = 16;
    let (rows, columns) = matrix.dims2()?;
    let values: Vec<f32> = matrix.flatten_all()?.to_vec1()?;
    let mut turned = vec![0.0; values.len()];
    for top in (0..rows).step_by(SIDE) {
        for left in (0..columns).step_by(SIDE) {
            for row in top..rows.min(top + SIDE) {
                for column in left..columns.min(left + SIDE) {
                    turned[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    Ok(Tensor::from_vec(turned, (columns, rows), matrix.device())?)
}

/// The tensors of one layer. Matrices are `[outputs, inputs]`.
#[derive(Debug)]
pub(crate) struct LayerTensors {
    /// Weight and bias.
    pub(crate) input_norm: Option<[Tensor; 2]>,
    /// u, v, q and k.
    pub(crate) uvqk: [Tensor; 4],
    /// Biases of u, v, q and k.
    pub(crate) uvqk_bias: Option<[Tensor; 4]>,
    /// Weights of position differences, and of time buckets.
    pub(crate) relative_bias: Option<[Tensor; 2]>,
    /// Weight and bias.
    pub(crate) output_norm: Option<[Tensor; 2]>,
    /// Weight of the output projection.
    pub(crate) output: Tensor,
    /// Bias of the output projection.
    pub(crate) output_bias: Option<Tensor>,
}

impl LayerTensors {
    /// Reads a layer; its tensors were checked.
    ///
    /// # Errors
    ///
    /// When a tensor cannot be loaded.
    pub(crate) fn load(
        config: &StackConfig,
        variant: Variant,
        prefix: &str,
        layer: usize,
        tensors: &Tensors,
    ) -> Result<Self, ModelError> {
        let names = variant.names(config.uvqk_layout);
        let load = |name: &str| tensors.load(&format!("{prefix}{layer}.{name}"));
        let pair = |there: bool, [first, second]: [&str; 2]| -> Result<Option<[Tensor; 2]>, ModelError> {
            Ok(if there { Some([load(first)?, load(second)?]) } else { None })
        };
        let (values, keys) = (config.values(), config.keys());
        let split = |outputs: Tensor| -> Result<[Tensor; 4], ModelError> {
            let part = |start, len| outputs.narrow(0, start, len);
            let (q, k) = (part(2 * values, keys)?, part(2 * values + keys, keys)?);
            Ok([part(0, values)?, part(values, values)?, q, k])
        };
        Ok(Self {
            input_norm: pair(config.input_norm.affine, names.input_norm)?,
            uvqk: split(out_in(load(names.uvqk)?, config.uvqk_layout)?)?,
            uvqk_bias: if config.uvqk_bias { Some(split(load(names.uvqk_bias)?)?) } else { None },
            relative_bias: pair(
                config.relative_bias.is_some(),
                [names.position_weights, names.time_weights],
            )?,
            output_norm: pair(config.output_norm.affine, names.output_norm)?,
            output: out_in(load(names.output)?, config.output_layout)?,
            output_bias: if config.output_bias { Some(load(names.output_bias)?) } else { None },
        })
    }
}
