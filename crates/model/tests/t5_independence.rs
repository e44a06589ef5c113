//! An answer of an encoder-decoder is a function of checkpoint, catalog and request, bit for bit.
//! Nothing else changes it: what shares the batch, how the beams are cut, whether the context was
//! cached, the number of threads, the instruction set. It holds in every format of weights and of keys
//! and values. A wrong request fails alone.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use beamline_catalog::FilterSpec;
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::isa::Isa;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::PAGE_SIZE;
use beamline_kv_cache::PageId;
use beamline_model::decode::Normalization;
use beamline_model::executor::Executor;
use beamline_model::executor::cpu::CpuBackend;
use beamline_model::families::t5::T5;
use beamline_model::step::{Chunk, Plan, Progress, Slot, StepModel};
use beamline_model::task::{Found, Job, Retrieve, Task};
use candle_core::{Device, Tensor};
use common::Running;
use common::t5::{T5Case, WHOLE, run_all};

const CASES: [&str; 2] = ["t5-tiger", "t5-tiger-gated"];

/// Scores as bits, so that equal means equal.
fn bits(found: &Found) -> Vec<(u32, u64)> {
    found.hypotheses.iter().map(|h| (h.leaf.0, h.score.to_bits())).collect()
}

/// Contexts of one token to hundreds, and widths from one beam to more than a page of them.
fn requests(case: &T5Case) -> Vec<(Job, usize)> {
    let prompts: Vec<&str> = case.prompts().collect();
    let widths = [1, 50, 8, 32, 33, 3, 70, 17];
    let job = |(index, width): (usize, usize)| {
        let normalization = [Normalization::FullVocab, Normalization::AllowedSet][index % 2];
        (case.job(case.context(prompts[index % prompts.len()]), &[], normalization), width)
    };
    widths.into_iter().enumerate().map(job).collect()
}

fn cold(
    executor: &mut Executor<CpuBackend<T5>>,
    requests: &[(Job, usize)],
    beams: usize,
) -> Vec<Vec<(u32, u64)>> {
    let requests: Vec<_> = requests.iter().map(|(job, width)| (job.clone(), *width, None)).collect();
    run_all(executor, &requests, beams).iter().map(|found| bits(found.as_ref().unwrap())).collect()
}

#[test]
fn neither_batch_nor_parts_nor_threads_change_a_bit() {
    for (name, kv) in CASES.into_iter().flat_map(|name| KvFormat::ALL.map(|kv| (name, kv))) {
        for format in WeightFormat::ALL {
            let case = T5Case::of(name, format);
            let requests = requests(&case);
            let mut executor = case.executor(kv, 512);
            let alone: Vec<_> = requests
                .iter()
                .map(|request| cold(&mut executor, std::slice::from_ref(request), WHOLE).remove(0))
                .collect();
            assert!(alone.iter().all(|found| !found.is_empty()));
            for isa in Isa::all() {
                for threads in [1, 2] {
                    let cpu = Arc::new(Cpu::with_isa(threads, isa).unwrap());
                    let mut executor = case.executor_on(cpu, kv, 512);
                    // Parts are cut above the kernels, so one instruction set stands for all.
                    let parts: &[usize] = if isa == Isa::detect() { &[WHOLE, 7, 3, 1] } else { &[7] };
                    for &beams in parts {
                        let together = cold(&mut executor, &requests, beams);
                        assert!(
                            together == alone,
                            "{name} in {format} and {kv}, {threads} threads, {beams} beams with {}",
                            isa.name()
                        );
                    }
                }
            }
        }
    }
}

/// Computes a context and keeps its pages, from `first_page` on.
fn warm(executor: &mut Executor<CpuBackend<T5>>, job: &Job, first_page: u32) -> Vec<PageId> {
    let count = job.context.len().div_ceil(PAGE_SIZE) as u32;
    let pages: Vec<PageId> = (first_page..first_page + count).map(PageId).collect();
    let chunk = Chunk {
        slot: Slot(0),
        positions: 0..job.context.len(),
        cached: 0,
        context_pages: 0..pages.len(),
        expand: None,
    };
    let plan = Plan { chunks: vec![chunk], pages: pages.clone(), ..Plan::default() };
    let mut outcomes = Vec::new();
    executor.open(Slot(0), Job { task: Task::Warm, ..job.clone() });
    executor.step(&plan, &mut outcomes).unwrap();
    executor.close(Slot(0));
    assert_eq!(outcomes, [(Slot(0), Progress::Prefilled)]);
    pages
}

#[test]
fn a_cached_context_changes_no_bit() {
    for (name, kv) in CASES.into_iter().flat_map(|name| KvFormat::ALL.map(|kv| (name, kv))) {
        let case = T5Case::of(name, WeightFormat::F32);
        let requests = requests(&case);
        let expected = cold(&mut case.executor(kv, 512), &requests, WHOLE);
        let mut executor = case.executor(kv, 1024);
        let mut next = 512;
        let mut mixed = Vec::new();
        for (index, (job, width)) in requests.iter().enumerate() {
            // Some of them come twice, and read the same pages; one is not cached.
            let pages = (index != 2).then(|| warm(&mut executor, job, next));
            next += pages.as_ref().map_or(0, |pages| pages.len() as u32);
            mixed.extend(std::iter::repeat_n((job.clone(), *width, pages), 1 + index % 2));
        }
        let found = run_all(&mut executor, &mixed, 5);
        let mut found = found.iter().map(|found| bits(found.as_ref().unwrap()));
        for (index, expected) in expected.iter().enumerate() {
            for _ in 0..1 + index % 2 {
                assert_eq!(found.next().as_ref(), Some(expected), "{name} in {kv}");
            }
        }
    }
}

#[test]
fn a_request_that_cannot_be_computed_fails_alone() {
    let case = T5Case::of(CASES[0], WeightFormat::F32);
    let good = requests(&case).remove(1);
    let expected = cold(&mut case.executor(KvFormat::F32, 512), std::slice::from_ref(&good), WHOLE);
    let of = |tokens: Vec<u32>| case.job(tokens, &[], Normalization::FullVocab);
    let asking = |task: Task| Job { task, ..of(vec![1, case.start]) };
    let filter = case.catalog.filter(&FilterSpec::default());
    let items = Retrieve { count: 3, catalog: Arc::clone(&case.catalog), filter };
    let bad = [
        of(vec![1, 246]),
        of(vec![case.start]),
        // What the model does not do.
        asking(Task::Warm),
        asking(Task::Score),
        asking(Task::Retrieve(Arc::new(items))),
    ];
    for bad in bad {
        let requests = [(bad, 4, None), (good.0.clone(), good.1, None)];
        let found = run_all(&mut case.executor(KvFormat::F32, 512), &requests, WHOLE);
        assert!(found[0].is_err());
        assert_eq!(bits(found[1].as_ref().unwrap()), expected[0]);
    }
}

/// Beams that go in waves are those of requests alone: enough of them share a step on one thread.
#[test]
fn waves_change_no_bit() {
    for name in CASES {
        let case = T5Case::of(name, WeightFormat::F32);
        let first_token = |item| {
            let mut path = Vec::new();
            case.catalog.trie().path(case.catalog.leaf_of(item), &mut path);
            path[0]
        };
        let beams = case.catalog.items().map(first_token).collect::<BTreeSet<u32>>().len();
        let requests: Vec<_> =
            requests(&case).into_iter().cycle().take(60).map(|(job, _)| (job, 70)).collect();
        assert!(requests.len() * beams.min(70) >= 512, "{beams} beams each are cut into waves");
        let executor = |pages| case.executor_on(Arc::new(Cpu::new(1).unwrap()), KvFormat::F32, pages);
        let alone = requests
            .iter()
            .take(8)
            .map(|request| cold(&mut executor(512), std::slice::from_ref(request), WHOLE).remove(0));
        let alone: Vec<_> = alone.collect();
        let together = cold(&mut executor(4096), &requests, WHOLE);
        for (index, found) in together.iter().enumerate() {
            assert!(*found == alone[index % 8], "{name}: request {index}");
        }
    }
}

/// A checkpoint in which one token of the encoder leads to what is not finite, and the others do not.
fn with_a_token_that_overflows(directory: &std::path::Path, token: usize) -> T5Case {
    let source = common::fixture(CASES[0]);
    for file in ["config.json", "tokenizer.json", "convention.json", "catalog.jsonl", "cases.json"] {
        std::fs::copy(source.join(file), directory.join(file)).unwrap();
    }
    std::fs::copy(source.join("cases.safetensors"), directory.join("cases.safetensors")).unwrap();
    let weights = source.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(weights, &Device::Cpu).unwrap();
    let mut change = |name: &str, change: &dyn Fn(usize, &mut f32)| {
        let shape = tensors[name].dims().to_vec();
        let mut values: Vec<f32> = tensors[name].flatten_all().unwrap().to_vec1().unwrap();
        values.iter_mut().enumerate().for_each(|(index, value)| change(index, value));
        tensors.insert(name.to_owned(), Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
    };
    // The first norm multiplies the first column beyond the range of numbers. Only this token has a
    // value there.
    let width = 32;
    change("shared.weight", &|index, value| {
        if index % width == 0 {
            *value = if index / width == token { 100.0 } else { 0.0 };
        }
    });
    change("encoder.block.0.layer.0.layer_norm.weight", &|index, value| {
        if index == 0 {
            *value = 3e38;
        }
    });
    candle_core::safetensors::save(&tensors, directory.join("model.safetensors")).unwrap();
    T5Case::open(directory, WeightFormat::F32)
}

#[test]
fn states_that_are_not_finite_fail_their_request_alone() {
    let directory = tempfile::tempdir().unwrap();
    let probe = T5Case::of(CASES[0], WeightFormat::F32);
    let bad = probe.context("h7")[0];
    let case = with_a_token_that_overflows(directory.path(), bad as usize);
    let contexts = ["h0", "h7", "h0"].map(|prompt| case.context(prompt));
    assert!(!contexts[0].contains(&bad));
    let job = |tokens: Vec<u32>| case.job(tokens, &[], Normalization::FullVocab);
    let requests = contexts.map(|tokens| (job(tokens), 20, None));
    let found = run_all(&mut case.executor(KvFormat::F32, 512), &requests, 3);
    let why = found[1].as_ref().unwrap_err();
    assert!(why.contains("not finite"), "{why}");
    let alone = cold(&mut case.executor(KvFormat::F32, 512), &[(requests[0].0.clone(), 20)], WHOLE);
    for found in [&found[0], &found[2]] {
        assert_eq!(bits(found.as_ref().unwrap()), alone[0]);
    }
}

#[test]
fn a_part_of_a_context_is_refused() {
    let case = T5Case::of(CASES[0], WeightFormat::F32);
    let job = case.job(case.context("h7"), &[], Normalization::FullVocab);
    let len = job.context.len();
    for (positions, cached) in [(0..len - 1, 0), (1..len, 0), (len - 1..len, len - 1), (0..len, 5)] {
        let mut executor = case.executor(KvFormat::F32, 64);
        let (mut plan, mut outcomes, mut next_page) = (Plan::default(), Vec::new(), 0);
        Running::new(0, &job, 4, &mut next_page).plan(WHOLE, &mut plan);
        plan.chunks[0].positions = positions;
        plan.chunks[0].cached = cached;
        executor.open(Slot(0), job.clone());
        executor.step(&plan, &mut outcomes).unwrap();
        let [(_, Progress::Failed(why))] = &outcomes[..] else { panic!("{outcomes:?}") };
        assert!(why.contains("whole"), "{why}");
    }
}

#[test]
fn a_plan_that_shares_a_written_page_is_refused() {
    let case = T5Case::of(CASES[0], WeightFormat::F32);
    let (job, width) = requests(&case).remove(2);
    let mut executor = case.executor(KvFormat::F32, 64);
    let mut plan = Plan::default();
    for slot in 0..2 {
        Running::new(slot, &job, width, &mut 0).plan(WHOLE, &mut plan);
        executor.open(Slot(slot), job.clone());
    }
    let error = executor.step(&plan, &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("page 0 is written by two requests"), "{error}");
}
