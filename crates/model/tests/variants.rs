//! Decoders with settings that a loader may not know: their logits are computed, or the checkpoint is
//! refused by the name of a setting; nothing else is ever computed. The folder is that of
//! `BEAMLINE_CONFORMANCE`.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;

use std::collections::HashMap;
use std::path::Path;

use beamline_compute::batch::{Batch, ContextRows};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::{PAGE_SIZE, PageStore};
use beamline_kv_cache::PageId;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::families::decoder::{Decoder, Workspace, page_shape};
use candle_core::{DType, Device, Tensor};
use common::folder;
use serde_json::Value;

/// Least tolerance of single precision: see [`folder::tolerance`].
const LOGITS: f64 = 2e-4;
const MAX_CONTEXT: usize = 2048;

/// Logits of some positions of a sequence, one forward pass from scratch.
fn logits(model: &Decoder, cpu: &Cpu, tokens: &[u32], rows: &[i64]) -> Vec<f32> {
    let config = model.config();
    let count = tokens.len().div_ceil(PAGE_SIZE);
    let mut pages = PageStore::new(page_shape(config, KvFormat::F32), count).unwrap();
    let table: Vec<PageId> = (0..count as u32).map(PageId).collect();
    let (mut batch, mut workspace) = (Batch::default(), Workspace::default());
    batch.push_context(ContextRows {
        owner: 0,
        tokens,
        first_position: 0,
        cached: 0,
        pages: &table,
        wanted: tokens.len(),
    });
    batch.check_writes(pages.pages()).unwrap();
    model.forward(cpu, &batch, &mut pages, &mut workspace, &mut |_, _| {});
    let hidden = config.hidden_size;
    let chosen: Vec<f32> =
        rows.iter().flat_map(|&row| &workspace.hidden[row as usize * hidden..][..hidden]).copied().collect();
    let mut logits = Vec::new();
    model.logits(cpu, &chosen, &mut logits);
    logits
}

fn check_logits(case: &Path, model: &Decoder) {
    let cpu = Cpu::new(2).unwrap();
    let record = folder::read_json(&case.join("cases.json"));
    let tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(case.join("cases.safetensors"), &Device::Cpu).unwrap();
    let tolerance = folder::tolerance(LOGITS, &record["max_abs_difference_f32_from_f64"]);
    for name in record["lengths"].as_object().unwrap().keys() {
        let ids = tensors[&format!("{name}.input_ids")].to_vec1::<i64>().unwrap();
        let tokens: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
        let rows = tensors[&format!("{name}.rows")].to_vec1::<i64>().unwrap();
        let expected = tensors[&format!("{name}.logits.f64")].to_dtype(DType::F64).unwrap();
        let expected: Vec<f64> = expected.flatten_all().unwrap().to_vec1().unwrap();
        if tokens.len() > model.config().max_positions && scales_with_length(case) {
            folder::skipped(&format!(
                "{} {name}: a server takes no longer context than it can",
                case.display()
            ));
            continue;
        }
        let found = logits(model, &cpu, &tokens, &rows);
        assert_eq!(found.len(), expected.len());
        let worst = found.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(worst <= tolerance, "{} {name}: logits are off by {worst}", case.display());
    }
}

/// Whether frequencies change once a sequence is longer than the model's positions.
fn scales_with_length(case: &Path) -> bool {
    let config = folder::read_json(&case.join("config.json"));
    let blocks = ["rope_parameters", "rope_scaling"].into_iter().map(|name| &config[name]);
    let mut types = blocks.flat_map(|block| [&block["rope_type"], &block["type"]]);
    types.any(|kind| kind == "dynamic")
}

/// Every key of a JSON value, those of nested objects too, and every word that is a value.
fn names(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                found.push(name.clone());
                names(value, found);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| names(value, found)),
        Value::String(word) => found.push(word.clone()),
        _ => {}
    }
}

#[test]
fn a_setting_is_computed_or_refused_by_name() {
    let mut failures = Vec::new();
    for case in folder::variants() {
        let outcome = std::panic::catch_unwind(|| {
            let opened = Checkpoint::open(&case)
                .and_then(|checkpoint| Decoder::load(&checkpoint, MAX_CONTEXT, WeightFormat::F32));
            match opened {
                Ok(model) => check_logits(&case, &model),
                Err(error) => {
                    let mut known = Vec::new();
                    names(&folder::read_json(&case.join("config.json")), &mut known);
                    let message = error.to_string();
                    assert!(known.iter().any(|name| message.contains(name)), "{message}");
                    eprintln!("refused: {}: {message}", case.display());
                }
            }
        });
        if outcome.is_err() {
            failures.push(case.display().to_string());
        }
    }
    assert!(failures.is_empty(), "{failures:?}; see above");
}
