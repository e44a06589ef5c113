//! A T5 of the size of TIGER (Rajput et al. 2023): whole requests, from encoder tokens to the best
//! semantic IDs.
//!
//! 4 and 4 layers, width 128, 6 heads of 64, feed-forward width 1024, 1025 tokens; a history of 20 items
//! of 4 tokens and the end token, 32 beams, 4 generated tokens, on made-up weights and 12,000 items.
#![allow(missing_docs, reason = "criterion's macro makes public items")]
#![allow(clippy::expect_used, reason = "a measurement for people to run")]

use std::collections::HashMap;
use std::sync::Arc;

use beamline_catalog::{Catalog, CatalogLimits, FilterSpec, ItemRecord, SidPart, WrittenSymbols};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::PAGE_SIZE;
use beamline_kv_cache::PageId;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::decode::{Normalization, SearchRequest, Step};
use beamline_model::executor::Executor;
use beamline_model::executor::cpu::CpuBackend;
use beamline_model::families::t5::T5;
use beamline_model::families::t5::config::T5Config;
use beamline_model::families::t5::tensors::expected_tensors;
use beamline_model::step::{BranchStep, Chunk, Plan, Progress, Slot, StepModel};
use beamline_model::task::Job;
use candle_core::{Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const THREADS: usize = 2;
const BEAMS: usize = 32;
const LEVELS: usize = 4;
const ITEMS: u32 = 12_000;
const HISTORY: u32 = 20;
const CONFIG: &str = r#"{"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 128, "d_kv": 64,
    "d_ff": 1024, "num_heads": 6, "num_layers": 4, "vocab_size": 1025, "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu", "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}"#;

/// The model with weights that are made up.
fn model(format: WeightFormat) -> Arc<T5> {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("config.json"), CONFIG).expect("a file");
    let shapes = expected_tensors(&T5Config::parse(CONFIG).expect("a config"));
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let scale = if shape.len() == 1 { 0.0 } else { (1.0 / shape[shape.len() - 1] as f32).sqrt() };
        let number = |i: usize| (((i * 7919 + name.len() * 104_729) % 10_007) as f32 / 5003.0 - 1.0) * scale;
        let base = if shape.len() == 1 { 1.0 } else { 0.0 };
        let values: Vec<f32> = (0..shape.iter().product()).map(|i| base + number(i)).collect();
        (name, Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor"))
    };
    let tensors: HashMap<String, Tensor> = shapes.into_iter().map(tensor).collect();
    candle_core::safetensors::save(&tensors, directory.path().join("model.safetensors")).expect("a file");
    let checkpoint = Checkpoint::<T5Config>::open_as(directory.path()).expect("a checkpoint");
    Arc::new(T5::load(&checkpoint, format).expect("a model"))
}

/// Items of four codes, 256 for each level, each a token of its own.
fn catalog() -> Arc<Catalog> {
    let record = |item: u32| {
        let mixed = item.wrapping_mul(0x9e37_79b9);
        let code =
            |level: u32| 1 + level * 256 + (if level == 3 { item % 256 } else { mixed >> (8 * level) & 255 });
        ItemRecord {
            item_id: item.to_string(),
            sid: (0..LEVELS as u32).map(|level| SidPart::Code(code(level))).collect(),
            tags: Vec::new(),
            title: None,
        }
    };
    let records = (0..ITEMS).map(record);
    let catalog = Catalog::from_records(records, &WrittenSymbols::codes(), &CatalogLimits::default());
    Arc::new(catalog.expect("a catalog"))
}

fn job(catalog: &Arc<Catalog>, seed: u32) -> Job {
    let mut tokens: Vec<u32> =
        (0..HISTORY * LEVELS as u32).map(|i| 1 + i % 4 * 256 + (seed * 97 + i * 31) % 256).collect();
    // The end token, and the token that the decoder starts with.
    tokens.extend([0, 0]);
    let search = SearchRequest {
        catalog: Arc::clone(catalog),
        filter: catalog.filter(&FilterSpec::default()),
        start: catalog.trie().root(),
        steps: [Step::Level; LEVELS].into(),
        normalization: Normalization::FullVocab,
        normalize_over: None,
        widths: None,
    };
    Job::tokens(tokens.into(), Some(search))
}

/// Runs requests together to their ends.
fn run(executor: &mut Executor<CpuBackend<T5>>, jobs: &[Job]) {
    let branch = (BEAMS * (LEVELS - 1)).div_ceil(PAGE_SIZE);
    let mut plan = Plan::default();
    for (index, job) in jobs.iter().enumerate() {
        let (slot, len) = (Slot(index as u32), job.context.len());
        executor.open(slot, job.clone());
        let (first, context) = (plan.pages.len(), len.div_ceil(PAGE_SIZE));
        plan.pages.extend((first..first + context + branch).map(|page| PageId(page as u32)));
        let context_pages = first..first + context;
        plan.chunks.push(Chunk { slot, positions: 0..len, cached: 0, context_pages, expand: Some(BEAMS) });
    }
    let mut outcomes = Vec::new();
    executor.step(&plan, &mut outcomes).expect("a step");
    let chunks = std::mem::take(&mut plan.chunks);
    plan.branches = chunks
        .into_iter()
        .map(|Chunk { slot, context_pages, .. }| BranchStep {
            slot,
            rows: BEAMS,
            branch_pages: context_pages.end..context_pages.end + branch,
            context_pages,
        })
        .collect();
    for _ in 1..LEVELS {
        outcomes.clear();
        executor.step(&plan, &mut outcomes).expect("a step");
    }
    assert!(outcomes.iter().all(|(_, progress)| matches!(progress, Progress::Finished(_))));
    (0..jobs.len() as u32).for_each(|slot| executor.close(Slot(slot)));
}

fn requests(c: &mut Criterion) {
    let catalog = catalog();
    let mut group = c.benchmark_group("tiger");
    for format in WeightFormat::ALL {
        let cpu = Arc::new(Cpu::new(THREADS).expect("threads"));
        let mut executor = Executor::new(model(format), cpu, KvFormat::F32, 128).expect("pages");
        for together in [1, 8] {
            let jobs: Vec<Job> = (0..together).map(|seed| job(&catalog, seed)).collect();
            group.throughput(Throughput::Elements(u64::from(together)));
            group.bench_function(format!("{format}/{together}"), |bencher| {
                bencher.iter(|| run(&mut executor, &jobs));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, requests);
criterion_main!(benches);
