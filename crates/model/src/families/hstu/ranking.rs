//! From the final states of candidates to predictions: the heads of the ranking variants.
//!
//! ```text
//! dlrm     user = postprocessor(state);  item = MLP(the candidate's embeddings)
//!          prediction = MLP(user * item)
//! nvidia   prediction = MLP(state / |state|)
//! ```
//!
//! A prediction depends on the candidate's own state alone, so the number of candidates in a call
//! changes nothing.

use std::collections::BTreeMap;
use std::ops::Range;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::linear::{Linear, Rows, WeightFormat};
use beamline_compute::cpu::vector::gate;

use super::config::{
    DlrmInput, DlrmOutput, HstuConfig, Normalization, NvidiaOutput, Postprocessor, Prediction, StackConfig,
    TaskKind, VariantConfig,
};
use super::embed::{Dlrm, Embedder};
use super::inputs::Prepared;
use super::mlp::{Plain, Swish, SwishShape, apply};
use super::retrieval::normalize;
use super::stack::{Affine, norm_rows};
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;

const POSTPROCESSOR: &str = "_hstu_transducer._output_postprocessor.";
const ITEM_TOWER: &str = "_item_embedding_mlp";
const PREDICTION: &str = "_multitask_module._prediction_module";
const NVIDIA_HEAD: &str = "_mlp._mlp";

/// The head of a model that ranks.
#[derive(Debug)]
pub struct Ranking {
    names: Vec<String>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Dlrm(Box<DlrmRanking>),
    Nvidia(NvidiaRanking),
}

impl Ranking {
    /// Names of the predictions of a candidate: its tasks, or `task.class` for the classes of a single one.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    pub(super) fn bytes(&self) -> usize {
        match &self.kind {
            Kind::Dlrm(dlrm) => {
                let combiner = match &dlrm.postprocessor {
                    Post::Timestamp { combiner, .. } => combiner.bytes(),
                    _ => 0,
                };
                combiner + dlrm.item_tower.bytes() + dlrm.prediction.bytes()
            }
            Kind::Nvidia(nvidia) => nvidia.head.bytes(),
        }
    }

    /// The head of a model of one of the ranking variants; nothing for others.
    ///
    /// # Errors
    ///
    /// When a tensor cannot be loaded, or a buffer contradicts the configuration.
    pub(crate) fn load(
        config: &HstuConfig,
        tensors: &Tensors,
        format: WeightFormat,
    ) -> Result<Option<Self>, ModelError> {
        let kind = match &config.variant {
            VariantConfig::Research(..) => return Ok(None),
            VariantConfig::Dlrm(input, output) => {
                let dlrm = DlrmRanking::load(input, output, &config.stack, tensors, format)?;
                Kind::Dlrm(Box::new(dlrm))
            }
            VariantConfig::Nvidia(_, output) => {
                let (layers, bias) = (output.head.len(), output.head_bias);
                Kind::Nvidia(NvidiaRanking {
                    width: config.stack.model_dim,
                    normalization: output.normalization,
                    head: Plain::load(tensors, NVIDIA_HEAD, layers, bias, output.activation, format)?,
                    prediction: output.prediction,
                })
            }
        };
        Ok(Some(Self { names: config.prediction_names(), kind }))
    }

    /// Predictions of candidates, `[candidates, names]`, from their final states.
    pub(crate) fn predict(
        &self,
        cpu: &Cpu,
        embedder: &Embedder,
        states: &[f32],
        request: &Prepared,
        candidates: Range<usize>,
    ) -> Option<Vec<f32>> {
        match &self.kind {
            Kind::Dlrm(dlrm) => Some(dlrm.predict(cpu, embedder.dlrm()?, states, request, candidates)),
            Kind::Nvidia(nvidia) => Some(nvidia.predict(cpu, states)),
        }
    }
}

impl HstuConfig {
    /// Names of the predictions of a candidate: its tasks, or `task.class` for the classes of a single
    /// one. Empty where the model does not rank.
    pub fn prediction_names(&self) -> Vec<String> {
        match &self.variant {
            VariantConfig::Research(..) => Vec::new(),
            VariantConfig::Dlrm(_, output) => output.tasks.iter().map(|task| task.name.clone()).collect(),
            VariantConfig::Nvidia(_, output) => match output.prediction {
                Prediction::Sigmoid => output.tasks.clone(),
                Prediction::Softmax => {
                    let classes = output.head.last().copied().unwrap_or_default();
                    (0..classes).map(|class| format!("{}.{class}", output.tasks[0])).collect()
                }
            },
        }
    }
}

/// Names and shapes of the tensors of the production head.
pub(super) fn expect_dlrm(
    input: &DlrmInput,
    output: &DlrmOutput,
    stack: &StackConfig,
    expected: &mut BTreeMap<String, Vec<usize>>,
) {
    let width = stack.model_dim;
    let mut add = |name: &str, shape: Vec<usize>| {
        expected.insert(format!("{POSTPROCESSOR}{name}"), shape);
    };
    if let Postprocessor::TimestampLayerNorm { periods, .. } = &output.postprocessor {
        add("_time_feature_combiner.weight", vec![width, width + 2 * periods.len()]);
        add("_time_feature_combiner.bias", vec![width]);
    }
    if !matches!(output.postprocessor, Postprocessor::L2 { .. }) {
        add("_layer_norm.weight", vec![width]);
        add("_layer_norm.bias", vec![width]);
    }
    tower_shape(input, output, stack).expect(ITEM_TOWER, expected);
    prediction_shape(output, stack).expect(PREDICTION, expected);
}

/// Buffers that a checkpoint may hold beside the configuration, which then must say the same.
pub(super) const DLRM_BUFFERS: [&str; 2] = [
    "_hstu_transducer._output_postprocessor._period_units",
    "_hstu_transducer._output_postprocessor._units_per_period",
];

/// Names and shapes of the tensors of NVIDIA's head.
pub(super) fn expect_nvidia(
    output: &NvidiaOutput,
    width: usize,
    expected: &mut BTreeMap<String, Vec<usize>>,
) {
    Plain::expect(NVIDIA_HEAD, width, &output.head, output.head_bias, expected);
}

fn tower_shape(input: &DlrmInput, output: &DlrmOutput, stack: &StackConfig) -> SwishShape {
    SwishShape {
        inputs: output.item_tower.features.len() * input.embedding_dim,
        hidden: output.item_tower.hidden_dim,
        outputs: stack.model_dim,
        normed: true,
    }
}

fn prediction_shape(output: &DlrmOutput, stack: &StackConfig) -> SwishShape {
    SwishShape {
        inputs: stack.model_dim,
        hidden: output.prediction_hidden_dim,
        outputs: output.tasks.len(),
        normed: false,
    }
}

/// The head of the production variant.
#[derive(Debug)]
pub(super) struct DlrmRanking {
    width: usize,
    postprocessor: Post,
    features: Vec<String>,
    item_tower: Swish,
    prediction: Swish,
    tasks: Vec<TaskKind>,
}

#[derive(Debug)]
enum Post {
    Timestamp { periods: Vec<(u32, u32)>, cycle: f32, combiner: Linear, norm: Affine, eps: f32 },
    Norm { norm: Affine, eps: f32 },
    L2 { eps: f64 },
}

impl DlrmRanking {
    fn load(
        input: &DlrmInput,
        output: &DlrmOutput,
        stack: &StackConfig,
        tensors: &Tensors,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let load = |name: &str| tensors.load(&format!("{POSTPROCESSOR}{name}"));
        let norm = || -> Result<Affine, ModelError> {
            Ok((load("_layer_norm.weight")?.to_vec1()?, load("_layer_norm.bias")?.to_vec1()?))
        };
        let postprocessor = match &output.postprocessor {
            Postprocessor::TimestampLayerNorm { periods, cycle, eps } => {
                let expected = [
                    periods.iter().map(|p| p.0 as f32).collect(),
                    periods.iter().map(|p| p.1 as f32).collect(),
                ];
                for (name, expected) in DLRM_BUFFERS.into_iter().zip::<[Vec<f32>; 2]>(expected) {
                    if !tensors.entries().contains_key(name) {
                        continue;
                    }
                    let stored: Vec<f32> = tensors.load(name)?.flatten_all()?.to_vec1()?;
                    if stored != expected {
                        return Err(ModelError::Mismatch(vec![format!(
                            "{name} is {stored:?}, output.postprocessor.periods says {expected:?}"
                        )]));
                    }
                }
                let (weight, bias) =
                    (load("_time_feature_combiner.weight")?, load("_time_feature_combiner.bias")?);
                Post::Timestamp {
                    periods: periods.clone(),
                    cycle: *cycle as f32,
                    combiner: Linear::pack(&[weight], Some(&[bias]), format)?,
                    norm: norm()?,
                    eps: *eps as f32,
                }
            }
            Postprocessor::LayerNorm { eps } => Post::Norm { norm: norm()?, eps: *eps as f32 },
            Postprocessor::L2 { eps } => Post::L2 { eps: *eps },
        };
        let tower = &output.item_tower;
        let (tower_shape, prediction) = (tower_shape(input, output, stack), prediction_shape(output, stack));
        Ok(Self {
            width: stack.model_dim,
            postprocessor,
            features: tower.features.clone(),
            item_tower: Swish::load(tensors, ITEM_TOWER, tower_shape, tower.norm_eps, format)?,
            prediction: Swish::load(tensors, PREDICTION, prediction, output.prediction_norm_eps, format)?,
            tasks: output.tasks.iter().map(|task| task.kind).collect(),
        })
    }

    /// User vectors `[candidates, width]` from final states, for a query at `time`.
    pub(super) fn users(&self, cpu: &Cpu, states: &[f32], time: i64) -> Vec<f32> {
        let width = self.width;
        let normed = |x: &[f32], norm: &Affine, eps: f32| {
            let mut out = Vec::new();
            norm_rows(cpu, x, width, Some(norm), eps, &mut out);
            out
        };
        match &self.postprocessor {
            Post::Timestamp { periods, cycle, combiner, norm, eps } => {
                let features: Vec<f32> =
                    periods.iter().flat_map(|&period| time_features(time, period, *cycle)).collect();
                let mut x = Vec::with_capacity(states.len() / width * (width + features.len()));
                for state in states.chunks_exact(width) {
                    x.extend_from_slice(state);
                    x.extend_from_slice(&features);
                }
                normed(&apply(cpu, combiner, &x, &mut Rows::default()), norm, *eps)
            }
            Post::Norm { norm, eps } => normed(states, norm, *eps),
            Post::L2 { eps } => {
                let mut x = states.to_vec();
                normalize(cpu, Normalization::L2 { eps: *eps }, &mut x, width);
                x
            }
        }
    }

    /// Item vectors `[candidates, width]`.
    pub(super) fn items(
        &self,
        cpu: &Cpu,
        embedder: &Dlrm,
        request: &Prepared,
        range: Range<usize>,
    ) -> Vec<f32> {
        let given = &request.request.candidates;
        let (count, mut x) = (range.len(), Vec::new());
        for candidate in range {
            for name in &self.features {
                let Some((index, table)) = embedder.feature(name) else {
                    unreachable!("the configuration was checked: there is a feature {name:?}")
                };
                let ids = if index == 0 { &given.items } else { &given.additional[index - 1] };
                x.extend_from_slice(table.row(ids[candidate] as usize));
            }
        }
        self.item_tower.forward(cpu, &x, count)
    }

    pub(super) fn predict(
        &self,
        cpu: &Cpu,
        embedder: &Dlrm,
        states: &[f32],
        request: &Prepared,
        candidates: Range<usize>,
    ) -> Vec<f32> {
        let count = candidates.len();
        let mut x = self.users(cpu, states, request.request.query_time);
        gate(cpu.isa(), &mut x, &self.items(cpu, embedder, request, candidates));
        let mut out = self.prediction.forward(cpu, &x, count);
        for row in out.chunks_exact_mut(self.tasks.len()) {
            for (x, kind) in row.iter_mut().zip(&self.tasks) {
                if *kind == TaskKind::Binary {
                    *x = probability(*x);
                }
            }
        }
        out
    }
}

/// Time of the day or week as a point on a circle. It is computed in single precision throughout, as
/// trained, which rounds a time in seconds to a minute or two.
fn time_features(time: i64, (period, units): (u32, u32), cycle: f32) -> [f32; 2] {
    let units = units as f32;
    let unit = (time as f32 / period as f32).floor().rem_euclid(units);
    let angle = unit / units * cycle;
    [angle.cos(), angle.sin()]
}

/// The sigmoid, for the few outputs of a head: in double precision.
fn probability(x: f32) -> f32 {
    (1.0 / (1.0 + (-f64::from(x)).exp())) as f32
}

/// The head of NVIDIA's variant.
#[derive(Debug)]
pub(super) struct NvidiaRanking {
    width: usize,
    normalization: Normalization,
    head: Plain,
    prediction: Prediction,
}

impl NvidiaRanking {
    pub(super) fn predict(&self, cpu: &Cpu, states: &[f32]) -> Vec<f32> {
        let mut x = states.to_vec();
        normalize(cpu, self.normalization, &mut x, self.width);
        let count = states.len() / self.width;
        let mut out = self.head.forward(cpu, &x);
        let outputs = out.len() / count.max(1);
        match self.prediction {
            Prediction::Sigmoid => out.iter_mut().for_each(|x| *x = probability(*x)),
            Prediction::Softmax => out.chunks_exact_mut(outputs.max(1)).for_each(softmax),
        }
        out
    }
}

fn softmax(row: &mut [f32]) {
    let largest = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let weights: Vec<f64> = row.iter().map(|&x| (f64::from(x) - f64::from(largest)).exp()).collect();
    let total: f64 = weights.iter().sum();
    for (x, weight) in row.iter_mut().zip(weights) {
        *x = (weight / total) as f32;
    }
}
