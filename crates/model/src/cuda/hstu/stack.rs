//! The layers of HSTU in device memory: weights in bf16, and the forward pass as a list of work.
//!
//! The equations are those of [`families::hstu::stack`](crate::families::hstu::stack). u, v, q and k are
//! one product. The residual stream is kept in single precision, so no layer rounds it. So is the
//! attention's output, because the norm behind it subtracts the mean.
//!
//! In the last layer only the wanted rows go past their keys and values.
//!
//! What this must not know: where the rows come from, what becomes of the final states.

use std::sync::Arc;

use beamline_compute::cpu::time_buckets::TimeWeights;
use beamline_compute::cuda::device::{Device, DeviceError, Mark, Memory, Product, Queue, Scratch, Written};
use beamline_compute::cuda::kernels::hstu::{self as kernels, Attention, Gate, Heads, ResidualNorm, Split};
use beamline_compute::cuda::kernels::{FEW_QUERIES, MOST_WIDTH, multiply, queries};
use beamline_compute::cuda::pages::DevicePages;
use beamline_compute::cuda::rows::RowArrays;
use beamline_compute::cuda::tiles::Shape;
use beamline_compute::cuda::weights::{matrix, vector};

use super::layout::HstuLayout;
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;
use crate::families::hstu::config::{NormKind, OutputParts, SiluScope, StackConfig, Variant};
use crate::families::hstu::layer_tensors::LayerTensors;

/// The layers of a model in device memory.
#[derive(Debug)]
pub struct DeviceStack {
    device: Arc<dyn Device>,
    config: StackConfig,
    heads: Heads,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    input_norm: Option<[Memory; 2]>,
    /// u, v, q, k.
    uvqk: Memory,
    uvqk_bias: Option<Memory>,
    bias: Option<Bias>,
    output_norm: Option<[Memory; 2]>,
    output: Memory,
    output_bias: Option<Memory>,
}

/// Relative bias of a layer, by position and by time.
#[derive(Debug)]
struct Bias {
    /// By `positions - 1 - distance`.
    positions: Memory,
    /// `TimeTable` of kernels/pointwise_tile.cuh.
    times: Memory,
}

/// Where the arrays of a step lie.
#[derive(Clone, Copy, Debug)]
pub struct StackArrays {
    /// Of the rows.
    pub rows: RowArrays,
    /// Items of many and of few rows.
    pub items: [u64; 2],
    /// The same of the last layer.
    pub final_items: [u64; 2],
    /// Times of the contexts.
    pub times: u64,
}

/// Activations of a step, reused from step to step.
#[derive(Debug)]
pub struct Workspace {
    normed: Scratch,
    uvqk: Scratch,
    u: Scratch,
    queries: Scratch,
    attended: Scratch,
    gated: Scratch,
    delta: Scratch,
    states: Scratch,
}

impl Workspace {
    /// Nothing yet.
    ///
    /// # Errors
    ///
    /// When the device has no memory.
    pub fn new(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        let scratch = || Scratch::new(device, 1 << 16);
        Ok(Self {
            normed: scratch()?,
            uvqk: scratch()?,
            u: scratch()?,
            queries: scratch()?,
            attended: scratch()?,
            gated: scratch()?,
            delta: scratch()?,
            states: scratch()?,
        })
    }
}

fn address(memory: Option<&Memory>) -> u64 {
    memory.map_or(0, Memory::address)
}

fn pair(memory: Option<&[Memory; 2]>) -> [u64; 2] {
    memory.map_or([0; 2], |[weight, bias]| [weight.address(), bias.address()])
}

impl Layer {
    fn load(device: &Arc<dyn Device>, tensors: LayerTensors) -> Result<Self, ModelError> {
        let norm = |norm: Option<[candle_core::Tensor; 2]>| -> Result<Option<[Memory; 2]>, ModelError> {
            norm.map(|[weight, bias]| Ok([vector(device, &[weight])?, vector(device, &[bias])?])).transpose()
        };
        let bias = tensors.relative_bias.map(|[positions, times]| -> Result<Bias, ModelError> {
            // A causal mask reaches the first half and the middle.
            let reached = positions.dim(0)?.div_ceil(2);
            let times: Vec<f32> = times.to_vec1()?;
            Ok(Bias {
                positions: vector(device, &[positions.narrow(0, 0, reached)?])?,
                times: Memory::of(device, &TimeWeights::new(&times).to_bytes())?,
            })
        });
        Ok(Self {
            input_norm: norm(tensors.input_norm)?,
            uvqk: matrix(device, &tensors.uvqk)?,
            uvqk_bias: tensors.uvqk_bias.map(|parts| vector(device, &parts)).transpose()?,
            bias: bias.transpose()?,
            output_norm: norm(tensors.output_norm)?,
            output: matrix(device, &[tensors.output])?,
            output_bias: tensors.output_bias.map(|bias| vector(device, &[bias])).transpose()?,
        })
    }
}

impl DeviceStack {
    /// The widths of keys and values in pages.
    ///
    /// # Errors
    ///
    /// When the configuration has what the kernels have not.
    pub fn check(config: &StackConfig) -> Result<[usize; 2], ModelError> {
        let refuse = |what: String| Err(ModelError::Config(format!("{what}: not implemented on CUDA")));
        for (name, width) in [("model_dim", config.model_dim), ("heads times value_dim", config.values())] {
            if width > MOST_WIDTH {
                return refuse(format!("stack: {name} is {width}, more than {MOST_WIDTH}"));
            }
        }
        let widths = [config.key_dim, config.value_dim];
        match kernels::padded_widths(widths) {
            Some(padded) => Ok(padded),
            None => refuse(format!(
                "stack: key_dim and value_dim are {widths:?}, more than {}",
                kernels::MOST_HEAD
            )),
        }
    }

    /// Copies the layers; their tensors were checked.
    ///
    /// # Errors
    ///
    /// When a tensor cannot be loaded, does not fit, or the configuration has what the kernels have not.
    pub fn load(
        device: &Arc<dyn Device>,
        config: &StackConfig,
        variant: Variant,
        prefix: &str,
        tensors: &Tensors,
    ) -> Result<Self, ModelError> {
        let heads = Heads {
            heads: config.heads,
            widths: [config.key_dim, config.value_dim],
            padded: Self::check(config)?,
            scale: config.logit_scale.value(config),
            divisor: config.attention_divisor as f32,
            mask: config.mask.into(),
            positions: config.relative_bias.map_or(0, |bias| bias.positions),
        };
        let load = |layer| Layer::load(device, LayerTensors::load(config, variant, prefix, layer, tensors)?);
        let layers = (0..config.layers).map(load).collect::<Result<_, _>>()?;
        Ok(Self { device: Arc::clone(device), config: config.clone(), heads, layers })
    }

    /// Constants of the layers.
    pub fn config(&self) -> &StackConfig {
        &self.config
    }

    /// The constants of this stack that shape a layout.
    pub fn shape(&self) -> Shape {
        let [key, value] = self.heads.padded;
        Shape {
            group: 1,
            kv_heads: self.config.heads,
            queries: queries(key.max(value)),
            few_queries: FEW_QUERIES,
        }
    }

    /// Allocates pages for the keys and values of these layers.
    ///
    /// # Errors
    ///
    /// When they do not fit.
    pub fn pages(&self, pages: usize) -> Result<DevicePages, DeviceError> {
        DevicePages::new(&self.device, self.config.layers, self.config.heads, self.heads.padded, pages)
    }

    /// Bytes of weights.
    pub fn weight_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.uvqk.bytes() + layer.output.bytes()).sum()
    }

    /// Runs a step whose rows are in the residual stream at `hidden`, single precision
    /// `[rows, model_dim]`: writes keys and values of all rows. Returns the address of the final states
    /// of the wanted rows: single precision `[wanted, model_dim]`. `arrivals` is empty, or names for
    /// each layer what its attention must wait for.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub fn forward(
        &self,
        layout: &HstuLayout,
        arrays: &StackArrays,
        hidden: u64,
        pages: &DevicePages,
        arrivals: &[Mark],
        workspace: &mut Workspace,
    ) -> Result<u64, DeviceError> {
        let (device, config, heads, w) = (&*self.device, &self.config, &self.heads, workspace);
        let (rows, wanted) = (layout.rows.count(), layout.rows.wanted.len());
        let (width, values, uvqk_width) = (config.model_dim, config.values(), config.uvqk());
        let inner = config.output_parts.count() * values;
        let normed = w.normed.at_least(2 * rows * width)?;
        let uvqk = w.uvqk.at_least(2 * rows * uvqk_width)?;
        let u = w.u.at_least(2 * rows * values)?;
        let queries = w.queries.at_least(2 * rows * config.heads * heads.padded[0])?;
        let attended = w.attended.at_least(4 * (rows + layout.rows.partial_rows) * values)?;
        let gated = w.gated.at_least(2 * rows * inner)?;
        let delta = w.delta.at_least(2 * rows * width)?;
        let states = w.states.at_least(4 * wanted * width)?;

        let silu = match config.silu {
            SiluScope::Uvqk => 2,
            SiluScope::U => 1,
            SiluScope::None => 0,
        };
        let parts = match config.output_parts {
            OutputParts::Gated => 0,
            OutputParts::ConcatRaw => 1,
            OutputParts::ConcatNormed => 2,
        };
        // What the layer before computed is added with the norm of the next.
        let residual = if config.residual { hidden } else { 0 };
        let input = ResidualNorm {
            out: normed,
            rows,
            width,
            eps: config.input_norm.eps as f32,
            ..ResidualNorm::default()
        };
        let mut add = ResidualNorm { hidden, ..input };
        for (index, layer) in self.layers.iter().enumerate() {
            let is_last = index + 1 == self.layers.len();
            let norm = pair(layer.input_norm.as_ref());
            kernels::residual_norm(device, &ResidualNorm { norm, ..add })?;
            self.product(normed, &layer.uvqk, uvqk, [rows, width, uvqk_width])?;
            let [keys, page_values] = pages.layer(index);
            kernels::split(
                device,
                heads,
                &Split {
                    uvqk,
                    bias: address(layer.uvqk_bias.as_ref()),
                    places: arrays.rows.places,
                    u,
                    queries,
                    keys,
                    values: page_values,
                    rows,
                    silu,
                },
            )?;
            let (items, addresses) = match is_last {
                true => (&layout.final_items, arrays.final_items),
                false => (&layout.items, arrays.items),
            };
            let bias = layer.bias.as_ref();
            let attention = Attention {
                queries,
                keys,
                values: page_values,
                pages: arrays.rows.pages,
                times: arrays.times,
                time_table: address(bias.map(|bias| &bias.times)),
                position_weights: address(bias.map(|bias| &bias.positions)),
                out: attended,
                merge: arrays.rows.merge,
                lineage: arrays.rows.lineage,
                merge_rows: layout.rows.merge.len(),
            };
            if let Some(&arrival) = arrivals.get(index) {
                device.order(arrival, Queue::Compute)?;
            }
            kernels::attend(device, heads, &attention, items, addresses)?;
            let (left, rows_from) = if is_last { (wanted, arrays.rows.wanted) } else { (rows, 0) };
            kernels::gate(
                device,
                heads,
                &Gate {
                    attended,
                    u,
                    rows_from,
                    norm: pair(layer.output_norm.as_ref()),
                    out: gated,
                    rows: left,
                    parts,
                    by_head: config.output_norm.kind == NormKind::Group,
                    eps: config.output_norm.eps as f32,
                },
            )?;
            self.product(gated, &layer.output, delta, [left, inner, width])?;
            let bias = address(layer.output_bias.as_ref());
            add = ResidualNorm { hidden: residual, delta, bias, hidden_out: hidden, ..input };
        }
        let (rows_from, rows) = (arrays.rows.wanted, wanted);
        kernels::residual_norm(device, &ResidualNorm { rows_from, hidden_out: states, out: 0, rows, ..add })?;
        Ok(states)
    }

    fn product(
        &self,
        x: u64,
        weight: &Memory,
        out: u64,
        [rows, inputs, outputs]: [usize; 3],
    ) -> Result<(), DeviceError> {
        debug_assert_eq!(weight.bytes(), (2 * inputs * outputs).max(16));
        let weight = weight.address();
        let product = Product { x, weight, out, rows, inputs, outputs, written: Written::Bf16 };
        multiply(&*self.device, product)
    }
}
