//! Qwen3, Qwen2 and Llama decoders in device memory: weights in bf16, and the forward pass as a list of work.
//!
//! The equations are those of [`families::decoder`](crate::families::decoder). Products are cuBLAS's,
//! bf16 in and accumulated in single precision. Queries, keys and values are one product, and so are
//! gate and up. The residual stream is kept in single precision, so no layer rounds it.
//!
//! In the last layer only the wanted rows go past their keys and values.
//!
//! What this must not know: requests, searches.

use std::ops::Range;
use std::sync::Arc;

use beamline_compute::cpu::rotary::Rotary;
use beamline_compute::cuda::device::{Device, DeviceError, Mark, Memory, Product, Queue, Scratch, Written};
use beamline_compute::cuda::kernels::{self, Attention, Embed, ResidualNorm, StepArrays};
use beamline_compute::cuda::layout::Layout;
use beamline_compute::cuda::pages::DevicePages;
use beamline_compute::cuda::tiles::Shape;
use beamline_compute::cuda::weights::{matrix, vector};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::Config;
use crate::checkpoint::described::Described;
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;

/// A decoder in device memory.
#[derive(Debug)]
pub struct DeviceDecoder {
    device: Arc<dyn Device>,
    config: Config,
    padded_dim: usize,
    positions: usize,
    embedding: Arc<Memory>,
    layers: Vec<Layer>,
    final_norm: Memory,
    head: Arc<Memory>,
    /// `[position][cos of half | sin of half]`, single precision.
    rotary: Memory,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Memory,
    qkv: Memory,
    qkv_bias: Option<Memory>,
    qk_norm: Option<[Memory; 2]>,
    output: Memory,
    output_bias: Option<Memory>,
    mlp_norm: Memory,
    gate_up: Memory,
    gate_up_bias: Option<Memory>,
    down: Memory,
    down_bias: Option<Memory>,
}

/// Activations of a step, reused from step to step.
#[derive(Debug)]
pub struct Workspace {
    hidden: Scratch,
    wanted_hidden: Scratch,
    normed: Scratch,
    qkv: Scratch,
    queries: Scratch,
    attended: Scratch,
    wanted_attended: Scratch,
    delta: Scratch,
    gate_up: Scratch,
    gated: Scratch,
    partial_out: Scratch,
    partial_state: Scratch,
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
            hidden: scratch()?,
            wanted_hidden: scratch()?,
            normed: scratch()?,
            qkv: scratch()?,
            queries: scratch()?,
            attended: scratch()?,
            wanted_attended: scratch()?,
            delta: scratch()?,
            gate_up: scratch()?,
            gated: scratch()?,
            partial_out: scratch()?,
            partial_state: scratch()?,
        })
    }
}

impl Layer {
    fn load(
        device: &Arc<dyn Device>,
        config: &Config,
        tensors: &Tensors,
        index: usize,
    ) -> Result<Self, ModelError> {
        let load = |name: &str| tensors.load(&format!("model.layers.{index}.{name}"));
        let all = |names: &[&str]| names.iter().map(|name| load(name)).collect::<Result<Vec<_>, _>>();
        let matrix = |names: &[&str]| Ok::<_, ModelError>(matrix(device, &all(names)?)?);
        let vector = |names: &[&str]| Ok::<_, ModelError>(vector(device, &all(names)?)?);
        let biases = |there: bool, names: &[&str]| there.then(|| vector(names)).transpose();
        Ok(Self {
            attention_norm: vector(&["input_layernorm.weight"])?,
            qkv: matrix(&["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"])?,
            qkv_bias: biases(
                config.qkv_bias,
                &["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
            )?,
            qk_norm: if config.qk_norm {
                Some([vector(&["self_attn.q_norm.weight"])?, vector(&["self_attn.k_norm.weight"])?])
            } else {
                None
            },
            output: matrix(&["self_attn.o_proj.weight"])?,
            output_bias: biases(config.output_bias, &["self_attn.o_proj.bias"])?,
            mlp_norm: vector(&["post_attention_layernorm.weight"])?,
            gate_up: matrix(&["mlp.gate_proj.weight", "mlp.up_proj.weight"])?,
            gate_up_bias: biases(config.mlp_bias, &["mlp.gate_proj.bias", "mlp.up_proj.bias"])?,
            down: matrix(&["mlp.down_proj.weight"])?,
            down_bias: biases(config.mlp_bias, &["mlp.down_proj.bias"])?,
        })
    }
}

impl DeviceDecoder {
    /// Checks every tensor of the checkpoint and copies the weights, with rotary tables for `positions`
    /// positions. A checkpoint without weights gets random ones.
    ///
    /// # Errors
    ///
    /// When tensors are missing, unknown, of the wrong shape or type, hold values that are not finite,
    /// or do not fit; or when the configuration asks for what the kernels lack.
    pub fn load(
        device: &Arc<dyn Device>,
        checkpoint: &Checkpoint,
        positions: usize,
    ) -> Result<Self, ModelError> {
        if !checkpoint.has_weights() {
            return Self::random(device, checkpoint.config(), positions);
        }
        let (config, tensors) = (checkpoint.config().clone(), checkpoint.tensors());
        let padded_dim = Self::check(&config)?;
        config.expected(tensors).check(tensors)?;
        let embedding = Arc::new(matrix(device, &[tensors.load("model.embed_tokens.weight")?])?);
        let head = match config.tied_head {
            true => Arc::clone(&embedding),
            false => Arc::new(matrix(device, &[tensors.load("lm_head.weight")?])?),
        };
        let layers = (0..config.layers).map(|index| Layer::load(device, &config, tensors, index));
        Ok(Self {
            device: Arc::clone(device),
            padded_dim,
            positions,
            embedding,
            layers: layers.collect::<Result<_, _>>()?,
            final_norm: vector(device, &[tensors.load("model.norm.weight")?])?,
            head,
            rotary: Self::rotary(device, &config, positions)?,
            config,
        })
    }

    /// The same with random weights, for timing a shape without its checkpoint.
    ///
    /// # Errors
    ///
    /// When it does not fit, or the configuration has what the kernels have not.
    pub fn random(device: &Arc<dyn Device>, config: &Config, positions: usize) -> Result<Self, ModelError> {
        let padded_dim = Self::check(config)?;
        let mut seed = 1;
        let mut random = |outputs: usize, inputs: usize| -> Result<Memory, ModelError> {
            let memory = Memory::zeroed(device, 2 * outputs * inputs)?;
            seed += 1;
            // Products keep the size of what goes in.
            kernels::fill_normal(
                &**device,
                memory.address(),
                outputs * inputs,
                seed,
                (inputs as f32).powf(-0.5),
            )?;
            Ok(memory)
        };
        let zeros = |there: bool, len: usize| there.then(|| Memory::zeroed(device, 4 * len)).transpose();
        let ones = |len: usize| Memory::of(device, &vec![1.0_f32; len]);
        let (width, inner, dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let qkv = (config.heads + 2 * config.kv_heads) * dim;
        let embedding = Arc::new(random(config.vocab_size, width)?);
        let head = match config.tied_head {
            true => Arc::clone(&embedding),
            false => Arc::new(random(config.vocab_size, width)?),
        };
        let mut layers = Vec::with_capacity(config.layers);
        for _ in 0..config.layers {
            layers.push(Layer {
                attention_norm: ones(width)?,
                qkv: random(qkv, width)?,
                qkv_bias: zeros(config.qkv_bias, qkv)?,
                qk_norm: if config.qk_norm { Some([ones(dim)?, ones(dim)?]) } else { None },
                output: random(width, config.heads * dim)?,
                output_bias: zeros(config.output_bias, width)?,
                mlp_norm: ones(width)?,
                gate_up: random(2 * inner, width)?,
                gate_up_bias: zeros(config.mlp_bias, 2 * inner)?,
                down: random(width, inner)?,
                down_bias: zeros(config.mlp_bias, width)?,
            });
        }
        Ok(Self {
            device: Arc::clone(device),
            padded_dim,
            positions,
            embedding,
            layers,
            final_norm: ones(width)?,
            head,
            rotary: Self::rotary(device, config, positions)?,
            config: config.clone(),
        })
    }

    /// Width of a head as the kernels have it.
    fn check(config: &Config) -> Result<usize, ModelError> {
        if config.hidden_size > kernels::MOST_WIDTH {
            let what = format!(
                "hidden_size {} is more than {}: not implemented on CUDA",
                config.hidden_size,
                kernels::MOST_WIDTH
            );
            return Err(ModelError::Config(what));
        }
        if config.heads / config.kv_heads > kernels::FEW_QUERIES {
            let what = format!(
                "{} query heads on {} key-value heads: too many on CUDA",
                config.heads, config.kv_heads
            );
            return Err(ModelError::Config(what));
        }
        kernels::padded_dim(config.head_dim).ok_or_else(|| {
            let what =
                format!("head_dim {} is odd or more than 256: not implemented on CUDA", config.head_dim);
            ModelError::Config(what)
        })
    }

    fn rotary(device: &Arc<dyn Device>, config: &Config, positions: usize) -> Result<Memory, ModelError> {
        let (frequencies, scale) = config.rope.frequencies(config.head_dim);
        Ok(Memory::of(device, Rotary::new(&frequencies, scale, positions).table())?)
    }

    /// Device that holds the weights.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Configuration of the checkpoint.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Width of a head in pages.
    pub fn padded_dim(&self) -> usize {
        self.padded_dim
    }

    /// Positions that can be computed.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The constants of this model that shape a layout.
    pub fn shape(&self) -> Shape {
        Shape {
            group: self.config.heads / self.config.kv_heads,
            kv_heads: self.config.kv_heads,
            queries: kernels::queries(self.padded_dim),
            few_queries: kernels::FEW_QUERIES,
        }
    }

    /// Bytes of weights.
    pub fn weight_bytes(&self) -> usize {
        let layer = |layer: &Layer| {
            let biases = [&layer.qkv_bias, &layer.output_bias, &layer.gate_up_bias, &layer.down_bias];
            let biases: usize = biases.into_iter().flatten().map(Memory::bytes).sum();
            let norms = layer.qk_norm.as_ref().map_or(0, |norms| norms.iter().map(Memory::bytes).sum());
            let matrices = [&layer.qkv, &layer.output, &layer.gate_up, &layer.down];
            let norms: usize = norms + layer.attention_norm.bytes() + layer.mlp_norm.bytes();
            biases + norms + matrices.iter().map(|matrix| matrix.bytes()).sum::<usize>()
        };
        let head = if self.config.tied_head { 0 } else { self.head.bytes() };
        let layers: usize = self.layers.iter().map(layer).sum();
        layers + head + self.embedding.bytes() + self.final_norm.bytes() + self.rotary.bytes()
    }

    /// Runs a step: fills in branch rows, writes keys and values of all rows. Returns the address of the
    /// final states of the wanted rows: bf16 `[wanted, hidden_size]`, normed. `arrivals` is empty, or
    /// names for each layer what its attention must wait for.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub fn forward(
        &self,
        layout: &Layout,
        arrays: &StepArrays,
        pages: &DevicePages,
        arrivals: &[Mark],
        workspace: &mut Workspace,
    ) -> Result<u64, DeviceError> {
        let (device, config, w) = (&*self.device, &self.config, workspace);
        let (rows, wanted) = (layout.rows.count(), layout.rows.wanted.len());
        let (width, inner, heads, dim) =
            (config.hidden_size, config.intermediate_size, config.heads, config.head_dim);
        let qkv_width = (heads + 2 * config.kv_heads) * dim;
        let hidden = w.hidden.at_least(4 * rows * width)?;
        let wanted_hidden = w.wanted_hidden.at_least(4 * wanted * width)?;
        let normed = w.normed.at_least(2 * rows * width)?;
        let qkv = w.qkv.at_least(2 * rows * qkv_width)?;
        let queries = w.queries.at_least(2 * rows * heads * self.padded_dim)?;
        let attended = w.attended.at_least(2 * rows * heads * dim)?;
        let wanted_attended = w.wanted_attended.at_least(2 * wanted * heads * dim)?;
        let delta = w.delta.at_least(2 * rows * width)?;
        let gate_up = w.gate_up.at_least(4 * rows * inner)?;
        let gated = w.gated.at_least(2 * rows * inner)?;
        let partial_out = w.partial_out.at_least(4 * layout.rows.partial_rows * heads * self.padded_dim)?;
        let partial_state = w.partial_state.at_least(8 * layout.rows.partial_rows * heads)?;

        kernels::branch_rows(device, &arrays.rows, &layout.rows)?;
        let eps = config.rms_norm_eps;
        let bias = |bias: &Option<Memory>| bias.as_ref().map_or(0, Memory::address);
        // What the layer before computed is added with the norm of the next.
        let add = ResidualNorm {
            hidden,
            rows_from: 0,
            delta,
            bias: 0,
            norm: 0,
            hidden_out: hidden,
            out: normed,
            rows,
            width,
            eps,
        };
        for (index, layer) in self.layers.iter().enumerate() {
            let is_last = index + 1 == self.layers.len();
            let norm = layer.attention_norm.address();
            match index.checked_sub(1).map(|before| &self.layers[before]) {
                None => kernels::embed(
                    device,
                    &Embed {
                        tokens: arrays.rows.tokens,
                        table: self.embedding.address(),
                        norm,
                        hidden,
                        out: normed,
                        rows,
                        vocab: config.vocab_size,
                        width,
                        eps,
                    },
                )?,
                Some(before) => {
                    let bias = bias(&before.down_bias);
                    kernels::residual_norm(device, &ResidualNorm { norm, bias, ..add })?;
                }
            }
            self.product(normed, &layer.qkv, qkv, rows, width, qkv_width)?;
            let [keys, values] = pages.layer(index);
            kernels::rotary_store(
                device,
                &kernels::RotaryStore {
                    qkv,
                    bias: bias(&layer.qkv_bias),
                    norms: layer.qk_norm.as_ref().map_or([0, 0], |[q, k]| [q.address(), k.address()]),
                    eps,
                    positions: arrays.rows.positions,
                    table: self.rotary.address(),
                    places: arrays.rows.places,
                    queries,
                    keys,
                    values,
                    rows,
                    heads,
                    kv_heads: config.kv_heads,
                    dim,
                    padded_dim: self.padded_dim,
                },
            )?;
            let attention = Attention {
                queries,
                keys,
                values,
                pages: arrays.rows.pages,
                out: attended,
                partial_out,
                partial_state,
                lineage: arrays.rows.lineage,
                heads,
                kv_heads: config.kv_heads,
                dim,
                padded_dim: self.padded_dim,
            };
            if let Some(&arrival) = arrivals.get(index) {
                device.order(arrival, Queue::Compute)?;
            }
            let (tiles, addresses) = match is_last {
                true => (&layout.final_prefill, arrays.final_prefill),
                false => (&layout.prefill, arrays.prefill),
            };
            kernels::attend_context(device, &attention, tiles, addresses)?;
            kernels::attend_branches(device, &attention, layout, arrays)?;
            let norm = layer.mlp_norm.address();
            let mut after = ResidualNorm { norm, bias: bias(&layer.output_bias), ..add };
            let mut attended = attended;
            if is_last {
                kernels::gather(device, attended, arrays.rows.wanted, wanted_attended, wanted, heads * dim)?;
                attended = wanted_attended;
                after = ResidualNorm {
                    rows_from: arrays.rows.wanted,
                    hidden_out: wanted_hidden,
                    rows: wanted,
                    ..after
                };
            }
            let rows = after.rows;
            self.product(attended, &layer.output, delta, rows, heads * dim, width)?;
            kernels::residual_norm(device, &after)?;
            self.product(normed, &layer.gate_up, gate_up, rows, width, 2 * inner)?;
            kernels::gate(device, gate_up, bias(&layer.gate_up_bias), gated, rows, inner)?;
            self.product(gated, &layer.down, delta, rows, inner, width)?;
        }
        let last = self.layers.last().map_or(0, |layer| bias(&layer.down_bias));
        let norm = self.final_norm.address();
        let (hidden, hidden_out) = (wanted_hidden, wanted_hidden);
        let add = ResidualNorm { norm, bias: last, hidden, hidden_out, rows: wanted, ..add };
        kernels::residual_norm(device, &add)?;
        Ok(normed)
    }

    /// Logits of some of the states, single precision `[rows, vocab_size]`.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub fn logits(&self, states: u64, rows: Range<usize>, out: u64) -> Result<(), DeviceError> {
        let width = self.config.hidden_size;
        let product = Product {
            x: states + 2 * (rows.start * width) as u64,
            weight: self.head.address(),
            out,
            rows: rows.len(),
            inputs: width,
            outputs: self.config.vocab_size,
            written: Written::F32,
        };
        kernels::multiply(&*self.device, product)
    }

    fn product(
        &self,
        x: u64,
        weight: &Memory,
        out: u64,
        rows: usize,
        inputs: usize,
        outputs: usize,
    ) -> Result<(), DeviceError> {
        debug_assert_eq!(weight.bytes().max(16), (2 * inputs * outputs).max(16));
        let weight = weight.address();
        let product = Product { x, weight, out, rows, inputs, outputs, written: Written::Bf16 };
        kernels::multiply(&*self.device, product)
    }
}
