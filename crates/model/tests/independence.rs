//! An answer is a function of checkpoint, catalog and request, bit for bit. Nothing else changes it:
//! what shares the batch, how the context is cut, what was cached, the number of threads, the
//! instruction set. It holds in every format of weights and in every format of keys and values.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;

use std::sync::Arc;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::isa::Isa;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::PAGE_SIZE;
use beamline_model::decode::Normalization;
use beamline_model::executor::Executor;
use beamline_model::executor::cpu::CpuBackend;
use beamline_model::families::decoder::Decoder;
use beamline_model::step::{Plan, Progress, Slot, StepModel};
use beamline_model::task::{Answer, Found, Job};
use common::{CASES, Loaded, Running, run};
use proptest::prelude::*;

/// Scores as bits, so that equal means equal.
fn bits(found: &Found) -> Vec<(u32, u64)> {
    found.hypotheses.iter().map(|h| (h.leaf.0, h.score.to_bits())).collect()
}

fn job(loaded: &Loaded, items: &[usize], exclude: usize, allowed_set: bool) -> Job {
    let all: Vec<String> =
        loaded.catalog.items().map(|item| loaded.catalog.item_id(item).to_owned()).collect();
    let history: Vec<String> = items.iter().map(|item| all[item % all.len()].clone()).collect();
    let normalization = if allowed_set { Normalization::AllowedSet } else { Normalization::FullVocab };
    loaded.job(loaded.prompt(&history), &all[..exclude.min(all.len() - 1)], normalization)
}

/// Runs many jobs together; `schedule` says how many context rows each takes in each step and whether it
/// sits out.
fn run_together(
    executor: &mut Executor<CpuBackend<Decoder>>,
    jobs: &[(Job, usize)],
    schedule: &[usize],
) -> Vec<Found> {
    let mut next_page = 0;
    let mut running: Vec<Running> = Vec::new();
    for (index, (job, width)) in jobs.iter().enumerate() {
        running.push(Running::new(index as u32, job, *width, &mut next_page));
        executor.open(Slot(index as u32), job.clone());
    }
    let mut step = 0;
    while running.iter().any(|request| request.found.is_none()) {
        let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
        for (index, request) in running.iter_mut().enumerate() {
            let rows = schedule[(step + index * 7) % schedule.len()];
            if request.found.is_none() && (rows > 0 || step % 3 == 0) {
                request.plan(rows, &mut plan);
            }
        }
        executor.step(&plan, &mut outcomes).unwrap();
        for (slot, progress) in outcomes {
            match progress {
                Progress::Finished(found) => running[slot.0 as usize].found = Some(found),
                Progress::Failed(reason) => panic!("{reason}"),
                _ => {}
            }
        }
        step += 1;
    }
    for index in 0..jobs.len() {
        executor.close(Slot(index as u32));
    }
    running.into_iter().map(|request| request.found.and_then(Answer::into_found).unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn neither_batch_nor_chunks_nor_threads_change_a_bit(
        case in 0usize..CASES.len(),
        requests in prop::collection::vec(
            (prop::collection::vec(0usize..1000, 0..60), 1usize..60, 0usize..40, any::<bool>()), 1..6),
        schedule in prop::collection::vec(0usize..90, 1..8),
        threads in 1usize..4,
        format in 0usize..3,
        kv in prop::sample::select(KvFormat::ALL.to_vec()),
    ) {
        let loaded = Loaded::open_in(CASES[case], WeightFormat::ALL[format]);
        let jobs: Vec<(Job, usize)> = requests
            .iter()
            .map(|(items, width, exclude, allowed_set)| (job(&loaded, items, *exclude, *allowed_set), *width))
            .collect();
        let alone: Vec<Found> =
            jobs.iter().map(|(job, width)| run(&mut loaded.executor_in(kv, 512), job.clone(), *width, usize::MAX >> 1).unwrap()).collect();
        for isa in Isa::all() {
            let cpu = Arc::new(Cpu::with_isa(threads, isa).unwrap());
            let mut executor = Executor::new(Arc::clone(&loaded.model), cpu, kv, 512).unwrap();
            let together = run_together(&mut executor, &jobs, &schedule);
            for (alone, together) in alone.iter().zip(&together) {
                prop_assert_eq!(bits(alone), bits(together));
            }
        }
    }

    #[test]
    fn a_cached_prefix_changes_no_bit(
        case in 0usize..CASES.len(),
        items in prop::collection::vec(0usize..1000, 20..60),
        more in prop::collection::vec(0usize..1000, 0..8),
        width in 1usize..40,
        format in 0usize..3,
        kv in prop::sample::select(KvFormat::ALL.to_vec()),
    ) {
        let loaded = Loaded::open_in(CASES[case], WeightFormat::ALL[format]);
        let first = job(&loaded, &items, 0, false);
        let longer: Vec<usize> = items.iter().chain(&more).copied().collect();
        let second = job(&loaded, &longer, 0, false);
        let cold = run(&mut loaded.executor_in(kv, 512), second.clone(), width, 64).unwrap();

        let mut executor = loaded.executor_in(kv, 512);
        let mut next_page = 0;
        let mut running = Running::new(0, &first, width, &mut next_page);
        executor.open(Slot(0), first.clone());
        let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
        running.plan(usize::MAX >> 1, &mut plan);
        executor.step(&plan, &mut outcomes).unwrap();
        executor.close(Slot(0));

        // The second visit takes over every whole page of equal tokens.
        let equal = first.context.as_tokens().unwrap().iter().zip(second.context.as_tokens().unwrap().iter()).take_while(|(a, b)| a == b).count();
        let cached = equal / PAGE_SIZE * PAGE_SIZE;
        let mut again = Running::new(1, &second, width, &mut next_page);
        again.context_pages[..cached / PAGE_SIZE].copy_from_slice(&running.context_pages[..cached / PAGE_SIZE]);
        // At least the last row is computed, even when every page was there.
        again.done = cached.min(second.context.len() - 1);
        executor.open(Slot(1), second);
        let warm = loop {
            let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
            again.plan(5, &mut plan);
            for chunk in &mut plan.chunks {
                chunk.cached = cached;
            }
            executor.step(&plan, &mut outcomes).unwrap();
            if let Some((_, Progress::Finished(found))) = outcomes.pop() {
                break found;
            }
        };
        prop_assert_eq!(bits(&cold), bits(warm.as_found().unwrap()));
    }
}

#[test]
fn many_beams_go_in_waves_and_change_no_bit() {
    KvFormat::ALL.into_iter().for_each(check_waves);
}

fn check_waves(kv: KvFormat) {
    let loaded = Loaded::open(CASES[0]);
    let jobs: Vec<Job> =
        (0..24).map(|seed| job(&loaded, &[seed, 3 * seed + 1, 7 * seed], seed % 3, false)).collect();
    let width = 40;
    let alone: Vec<Found> = jobs
        .iter()
        .map(|job| run(&mut loaded.executor_in(kv, 512), job.clone(), width, 64).unwrap())
        .collect();
    let mut executor =
        Executor::new(Arc::clone(&loaded.model), Arc::new(Cpu::new(1).unwrap()), kv, 512).unwrap();
    let mut next_page = 0;
    let mut running: Vec<Running> = Vec::new();
    for (index, job) in jobs.iter().enumerate() {
        running.push(Running::new(index as u32, job, width, &mut next_page));
        executor.open(Slot(index as u32), job.clone());
    }
    let mut rows_of_a_step = Vec::new();
    while running.iter().any(|request| request.found.is_none()) {
        let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
        running
            .iter_mut()
            .filter(|request| request.found.is_none())
            .for_each(|request| request.plan(64, &mut plan));
        executor.step(&plan, &mut outcomes).unwrap();
        let mut rows = 0;
        for (slot, progress) in outcomes {
            match progress {
                Progress::Finished(found) => running[slot.0 as usize].found = Some(found),
                Progress::Expanded { rows: beams } => rows += beams,
                other => panic!("{other:?}"),
            }
        }
        rows_of_a_step.push(rows);
    }
    // Enough of them for waves, see `WAVES_FROM`.
    assert!(rows_of_a_step[0] >= 256, "{rows_of_a_step:?}");
    for (alone, together) in alone.iter().zip(&running) {
        assert_eq!(bits(alone), bits(together.found.as_ref().unwrap().as_found().unwrap()));
    }
}

#[test]
fn a_plan_that_shares_a_written_page_is_refused() {
    let loaded = Loaded::open(CASES[0]);
    let mut executor = loaded.executor(8);
    let job = job(&loaded, &[1, 2, 3], 0, false);
    let (mut plan, mut next_page) = (Plan::default(), 0);
    for slot in 0..2 {
        next_page = 0;
        Running::new(slot, &job, 4, &mut next_page).plan(100, &mut plan);
        executor.open(Slot(slot), job.clone());
    }
    let error = executor.step(&plan, &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("page 0 is written by two requests"), "{error}");
    assert!(next_page > 0);
}

/// A format is a format: the scores of one are not those of the other, or nothing was rounded.
#[test]
fn keys_and_values_in_bfloat16_change_scores_a_little() {
    let loaded = Loaded::open(CASES[0]);
    let job = job(&loaded, &[5, 3, 9, 4], 0, false);
    let [exact, rounded] =
        KvFormat::ALL.map(|kv| run(&mut loaded.executor_in(kv, 64), job.clone(), 20, 64).unwrap());
    assert_ne!(bits(&exact), bits(&rounded));
}
