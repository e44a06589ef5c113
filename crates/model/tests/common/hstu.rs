//! What the tests of HSTU share: checkpoints of any configuration, and the smallest possible way to run
//! a request.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]
#![allow(clippy::approx_constant, reason = "the reference has 2 * 3.14")]

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::{PAGE_SIZE, PageStore};
use beamline_kv_cache::PageId;
use beamline_model::families::hstu::batch::HstuBatch;
use beamline_model::families::hstu::config::HstuConfig;
use beamline_model::families::hstu::inputs::{Events, Prepared, Request};
use beamline_model::families::hstu::stack::Workspace;
use beamline_model::families::hstu::{Hstu, expected_tensors};
use beamline_model::rows::{BeamRows, CandidateRows, ContextPart};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

#[path = "folder.rs"]
pub mod folder;

/// Tensors by name.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A file of the repository's fixtures of HSTU, such as `research/config.json`.
fn fixture_file(file: &str) -> PathBuf {
    folder::repository().join(format!("hstu-{file}"))
}

/// Its tensors; those of truth values are left out.
pub fn fixture(file: &str) -> HashMap<String, Tensor> {
    tensors_of(&fixture_file(file))
}

pub fn tensors_of(path: &Path) -> HashMap<String, Tensor> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers = file.iter().filter(|(_, view)| view.dtype() != safetensors::Dtype::BOOL);
    let tensor = |view: safetensors::tensor::TensorView<'_>| {
        let dtype = view.dtype().try_into().unwrap();
        Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu).unwrap()
    };
    numbers.map(|(name, view)| (name.to_owned(), tensor(view))).collect()
}

pub fn fixture_json(file: &str) -> Value {
    folder::read_json(&fixture_file(file))
}

/// Values of a tensor of any type.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn integers(tensor: &Tensor) -> Vec<i64> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The state dict of a fixture: what follows `state.`, with another prefix if asked.
pub fn state(fixture: &HashMap<String, Tensor>, prefix: &str) -> Tensors {
    let state = fixture.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("state.")?, tensor)));
    state
        .filter(|(_, tensor)| tensor.dtype() == DType::F32)
        .map(|(name, tensor)| {
            let values = values(tensor).into_iter().map(|x| x as f32).collect();
            (format!("{prefix}{name}"), (tensor.dims().to_vec(), values))
        })
        .collect()
}

/// A directory with config.json and model.safetensors.
pub fn checkpoint(config: &Value, tensors: &Tensors) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), config, tensors);
    directory
}

pub fn write(directory: &Path, config: &Value, tensors: &Tensors) {
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let (shapes, values) = tensors
        .iter()
        .map(|(name, (shape, values))| ((name.clone(), shape.clone()), (name.clone(), values.clone())))
        .unzip();
    super::made::write_tensors(directory, &values, &shapes);
}

/// Random tensors for a configuration.
pub fn random_tensors(config: &Value, seed: u64) -> Tensors {
    let shapes = expected_tensors(&HstuConfig::parse(&config.to_string()).unwrap());
    shapes
        .into_iter()
        .enumerate()
        .map(|(index, (name, shape))| {
            let count = shape.iter().product();
            let values = super::made::numbers(count, seed.wrapping_mul(1000).wrapping_add(index as u64));
            let norm = name.contains("norm") || name.ends_with(".1.weight") || name.ends_with(".3.weight");
            let fan = if name.contains("emb.weight") || name.contains("embeddings") || shape.len() == 1 {
                12.0
            } else {
                *shape.iter().min().unwrap() as f32
            };
            let value =
                |x: f32| if norm && shape.len() == 1 { 1.0 + 0.3 * x } else { x * (3.0 / fan).sqrt() };
            let values = values.into_iter().map(value).collect();
            (name, (shape, values))
        })
        .collect()
}

pub fn load(config: &Value, tensors: &Tensors, cpu: &Cpu, format: WeightFormat) -> Hstu {
    let directory = checkpoint(config, tensors);
    let checkpoint = Hstu::open(directory.path()).unwrap();
    Hstu::load(&checkpoint, cpu, format).unwrap()
}

pub struct ResearchSizes {
    pub items: usize,
    pub most: usize,
    pub positions: usize,
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    pub key: usize,
    pub value: usize,
}

/// The research variant as published.
pub fn research(sizes: &ResearchSizes) -> Value {
    json!({
        "model_type": "hstu",
        "hstu_variant": "research",
        "stack": {
            "model_dim": sizes.width, "layers": sizes.layers, "heads": sizes.heads,
            "key_dim": sizes.key, "value_dim": sizes.value,
            "input_norm": {"affine": false, "eps": 1e-6},
            "uvqk_bias": false, "uvqk_layout": "in_out", "silu": "uvqk", "logit_scale": 1.0,
            "attention_divisor": sizes.positions,
            "relative_bias": {"positions": sizes.positions, "time_buckets": 128, "time_divisor": 0.301},
            "mask": {"contextual_len": 0, "max_attention_len": 0, "min_full_attention_len": 0},
            "output_norm": {"kind": "layer", "affine": false, "eps": 1e-6},
            "output_parts": "gated", "output_bias": true, "output_layout": "out_in", "residual": true
        },
        "input": {
            "num_items": sizes.items, "padding_id": 0, "max_sequence_length": sizes.most,
            "position": {"direction": "forward", "rows": sizes.positions, "scale": "sqrt_model_dim"},
            "actions": null
        },
        "output": {"normalization": {"kind": "l2", "eps": 1e-6}, "head": {"kind": "items", "eps": 1e-6}}
    })
}

/// Research layers with actions and a token head.
pub fn token_head(sizes: &ResearchSizes, combine: &str, tied: bool) -> Value {
    let mut config = research(sizes);
    let dim = if combine == "add" { sizes.width } else { 3 };
    config["input"]["actions"] = json!({"count": 4, "dim": dim, "combine": combine, "generated": 2});
    config["output"] = json!({
        "normalization": {"kind": "layer_norm", "eps": 1e-6},
        "head": {"kind": "tokens", "vocab_size": sizes.items + 1, "tied": tied, "logit_scale": 2.5,
                 "semantic_id_levels": [{"first_token": 1, "codes": sizes.items}]}
    });
    config
}

/// Configuration of NVIDIA's variant.
pub fn nvidia(layout: &str, affine: bool, prediction: &str, residual: bool) -> Value {
    let tasks = if prediction == "sigmoid" { json!(["click", "like", "share"]) } else { json!(["rating"]) };
    json!({
        "model_type": "hstu",
        "hstu_variant": "nvidia",
        "stack": {
            "model_dim": 12, "layers": 2, "heads": 3, "key_dim": 5, "value_dim": 5,
            "input_norm": {"affine": affine, "eps": 1e-5},
            "uvqk_bias": true, "uvqk_layout": layout, "silu": "uvqk", "logit_scale": "inverse_sqrt_key_dim",
            "attention_divisor": 160.0, "relative_bias": null,
            "mask": {"contextual_len": 0, "max_attention_len": 0, "min_full_attention_len": 0},
            "output_norm": {"kind": "layer", "affine": true, "eps": 1e-5},
            "output_parts": "gated", "output_bias": false, "output_layout": layout, "residual": residual
        },
        "input": {
            "tables": [
                {"name": "video", "rows": 60, "unknown_ids": "refuse"},
                {"name": "act", "rows": 6, "unknown_ids": "refuse"},
                {"name": "user", "rows": 9, "unknown_ids": "clamp"}
            ],
            "item_table": "video", "action_table": "act",
            "contextual": [{"name": "user_id", "table": "user", "slots": 2, "min_tokens": 0}],
            "position": {"direction": "forward", "rows": 70, "scale": "sqrt_model_dim"},
            "preprocessing_mlp": null, "time_encoding": false, "max_history": 80, "max_candidates": 100
        },
        "output": {
            "normalization": {"kind": "l2", "eps": 1e-6},
            "head": [10, 3], "head_bias": true, "activation": if residual { "relu" } else { "gelu" },
            "prediction": prediction, "tasks": tasks
        }
    })
}

/// The layers of the production variant.
pub fn stu_stack(
    width: usize,
    layers: usize,
    heads: usize,
    key: usize,
    value: usize,
    divisor: usize,
) -> Value {
    json!({
        "model_dim": width, "layers": layers, "heads": heads, "key_dim": key, "value_dim": value,
        "input_norm": {"affine": true, "eps": 1e-6},
        "uvqk_bias": true, "uvqk_layout": "in_out", "silu": "u", "logit_scale": "inverse_sqrt_key_dim",
        "attention_divisor": divisor, "relative_bias": null,
        "mask": {"contextual_len": 0, "max_attention_len": 0, "min_full_attention_len": 0},
        "output_norm": {"kind": "layer", "affine": true, "eps": 1e-6},
        "output_parts": "concat_raw", "output_bias": false, "output_layout": "in_out", "residual": true
    })
}

/// The production variant, as its fixture in the repository has it.
pub fn dlrm(clamp: &str) -> Value {
    json!({
        "model_type": "hstu",
        "hstu_variant": "dlrm",
        "stack": stu_stack(12, 2, 2, 5, 6, 18),
        "input": {
            "embedding_dim": 8,
            "tables": [
                {"name": "video_id", "rows": 50, "unknown_ids": "refuse"},
                {"name": "owner_id", "rows": 20, "unknown_ids": "clamp"},
                {"name": "user_id", "rows": 10, "unknown_ids": "refuse"},
                {"name": "country", "rows": 6, "unknown_ids": "refuse"}
            ],
            "features": [
                {"name": "video_id", "table": "video_id"},
                {"name": "owner_id", "table": "owner_id"}
            ],
            "contextual": [
                {"name": "user_id", "table": "user_id", "slots": 1, "min_tokens": 5},
                {"name": "country", "table": "country", "slots": 2, "min_tokens": 0}
            ],
            "action_weights": [1, 2, 4], "action_dim": 8, "hidden_dim": 10, "norm_eps": 1e-5,
            "position": {"direction": "backward", "rows": 8192, "scale": "sqrt_model_dim"},
            "time": {"rows": 2049, "divisor": 60.0, "clamp": clamp},
            "max_history": 100, "max_candidates": 100
        },
        "output": {
            "postprocessor": {
                "kind": "timestamp_layer_norm", "periods": [[3600, 24], [86400, 7]], "cycle": 6.28, "eps": 1e-5
            },
            "item_tower": {"features": ["video_id", "owner_id"], "hidden_dim": 512, "norm_eps": 1e-5},
            "prediction_hidden_dim": 512, "prediction_norm_eps": 1e-5,
            "tasks": [
                {"name": "click", "kind": "binary"},
                {"name": "like", "kind": "binary"},
                {"name": "watch", "kind": "regression"}
            ]
        }
    })
}

/// A history without anything else.
pub fn history(items: &[u32], actions: &[u32], times: &[i64], query_time: i64) -> Request {
    let events = Events {
        items: items.to_vec(),
        actions: actions.to_vec(),
        times: times.to_vec(),
        ..Events::default()
    };
    Request { events, query_time, ..Request::default() }
}

pub fn table(first: u32, positions: usize) -> Vec<PageId> {
    (first..first + positions.div_ceil(PAGE_SIZE) as u32).map(PageId).collect()
}

/// Runs one request at a time.
pub struct Runner<'a> {
    pub model: &'a Hstu,
    pub cpu: &'a Cpu,
    pub pages: &'a mut PageStore,
}

impl Runner<'_> {
    /// Final states of positions, computed in chunks; those below `cached` are in pages.
    pub fn context(
        &mut self,
        request: &Prepared,
        table: &[PageId],
        positions: Range<usize>,
        cached: usize,
        chunk: usize,
    ) -> Vec<f32> {
        self.observed(request, table, positions, cached, chunk, &mut |_, _| {})
    }

    pub fn observed(
        &mut self,
        request: &Prepared,
        table: &[PageId],
        positions: Range<usize>,
        cached: usize,
        chunk: usize,
        observe: &mut dyn FnMut(usize, &[f32]),
    ) -> Vec<f32> {
        let (mut batch, mut workspace, mut states) = (HstuBatch::default(), Workspace::default(), Vec::new());
        let mut start = positions.start;
        while start < positions.end {
            let end = positions.end.min(start + chunk);
            batch.clear();
            let rows =
                ContextPart { owner: 0, positions: start..end, cached, pages: table, wanted: end - start };
            self.model.push_context(self.cpu, &mut batch, request, rows).unwrap();
            batch.layout.check_writes(self.pages.pages()).unwrap();
            self.model.forward(self.cpu, &batch, self.pages, &mut workspace, observe);
            states.extend_from_slice(&workspace.hidden);
            start = end;
        }
        states
    }

    pub fn candidates(
        &mut self,
        request: &Prepared,
        table: &[PageId],
        branch: &[PageId],
        candidates: Range<usize>,
    ) -> Vec<f32> {
        let (mut batch, mut workspace) = (HstuBatch::default(), Workspace::default());
        let rows = CandidateRows { owner: 0, candidates, context_pages: table, branch_pages: branch };
        self.model.push_candidates(self.cpu, &mut batch, request, rows);
        batch.layout.check_writes(self.pages.pages()).unwrap();
        self.model.forward(self.cpu, &batch, self.pages, &mut workspace, &mut |_, _| {});
        workspace.hidden
    }

    pub fn tokens(&mut self, request: &Prepared, rows: BeamRows<'_>) -> Vec<f32> {
        let (mut batch, mut workspace) = (HstuBatch::default(), Workspace::default());
        self.model.push_tokens(&mut batch, request, rows).unwrap();
        batch.layout.check_writes(self.pages.pages()).unwrap();
        self.model.forward(self.cpu, &batch, self.pages, &mut workspace, &mut |_, _| {});
        workspace.hidden
    }
}

pub fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let difference = (f64::from(*found) - expected).abs();
        assert!(difference <= tolerance, "{what} at {index}: {found} against {expected}");
    }
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
