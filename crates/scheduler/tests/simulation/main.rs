//! The scheduler against a simulated model and clock.
//!
//! The model checks every plan, and the driver every event; see there for the details. A failure
//! prints the seed and the end of the trace. Replay it with `BEAMLINE_SEED=<seed> cargo test
//! --release -p beamline-scheduler --test simulation one`. Run more with `BEAMLINE_SOAK=<requests>`
//! and `soak`, which starts at that seed, too.

// A simulation is test code everywhere, also outside the functions that are marked as tests.
#![allow(clippy::expect_used, clippy::print_stdout)]

mod driver;
mod model;
mod rng;
mod scenario;
mod story;

use std::panic::{AssertUnwindSafe, catch_unwind};

use beamline_scheduler::SchedulerConfig;
use driver::{Driver, Report};
use scenario::{HostScenario, Scenario};

/// Number of requests of one scenario.
const REQUESTS: usize = 2000;

/// Number of lines of the trace that are printed.
const TRACE_TAIL: usize = 60;

fn run(scenario: &Scenario) -> Report {
    match catch_unwind(AssertUnwindSafe(|| Driver::new(scenario, None).run())) {
        Ok(report) => report,
        Err(panic) => {
            explain(scenario);
            std::panic::resume_unwind(panic)
        }
    }
}

/// Runs the scenario again, with the same result, and prints how it came to its end.
fn explain(scenario: &Scenario) {
    let mut lines = Vec::new();
    let mut sink = |line| lines.push(line);
    let again = catch_unwind(AssertUnwindSafe(|| Driver::new(scenario, Some(&mut sink)).run()));
    println!("seed {}: {scenario:#?}", scenario.seed);
    for line in &lines[lines.len().saturating_sub(TRACE_TAIL)..] {
        println!("{line}");
    }
    println!(
        "after {} lines: {}",
        lines.len(),
        if again.is_err() { "the same failure" } else { "no failure!" }
    );
}

fn add(total: &mut Report, one: &Report) {
    let Report {
        digest: _,
        answers: _,
        steps,
        answered,
        warmed,
        failed,
        expired,
        cancelled,
        dropped,
        refused,
        degraded,
        retried,
        evictions,
        duplicates,
        hit_tokens,
        restored_tokens,
        host_evictions,
        host_expirations,
        missed_tokens,
    } = one;
    total.steps += steps;
    total.answered += answered;
    total.warmed += warmed;
    total.failed += failed;
    total.expired += expired;
    total.cancelled += cancelled;
    total.dropped += dropped;
    total.refused += refused;
    total.degraded += degraded;
    total.retried += retried;
    total.evictions += evictions;
    total.duplicates += duplicates;
    total.hit_tokens += hit_tokens;
    total.restored_tokens += restored_tokens;
    total.host_evictions += host_evictions;
    total.host_expirations += host_expirations;
    total.missed_tokens += missed_tokens;
}

fn run_many(seeds: std::ops::Range<u64>) -> Report {
    let started = std::time::Instant::now();
    let requests = (seeds.end - seeds.start) * REQUESTS as u64;
    let mut total = Report::default();
    for seed in seeds {
        add(&mut total, &run(&Scenario::from_seed(seed, REQUESTS)));
    }
    let took = started.elapsed().as_secs_f64();
    println!("{requests} requests in {took:.1} s, {:.0} per second: {total:#?}", requests as f64 / took);
    total
}

#[test]
fn every_request_ends_once_and_as_it_must() {
    let total = run_many(0..100);
    assert_eq!(total.duplicates, 0, "no page is computed twice at a time");
    // The scenarios reach the cases that they are meant to reach.
    for (what, count) in [
        ("answered", total.answered),
        ("warmed", total.warmed),
        ("failed", total.failed),
        ("expired", total.expired),
        ("cancelled", total.cancelled),
        ("dropped", total.dropped),
        ("refused", total.refused),
        ("degraded", total.degraded),
        ("retried", total.retried),
        ("evictions", total.evictions),
        ("hit tokens", total.hit_tokens),
        ("restored tokens", total.restored_tokens),
        ("pages that host memory evicted", total.host_evictions),
        ("pages that outlived their time there", total.host_expirations),
    ] {
        assert!(count > 200, "only {count} {what}");
    }
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 1000..1010 {
        let scenario = Scenario::from_seed(seed, 500);
        assert_eq!(run(&scenario), run(&scenario));
    }
}

#[test]
fn an_answer_does_not_depend_on_what_shares_its_steps() {
    for seed in 2000..2020 {
        let seeded = Scenario::from_seed(seed, 300);
        // No request is refused, late, cancelled or failed, so that all are answered in both runs.
        let crowded = Scenario {
            config: SchedulerConfig {
                max_queued: 300,
                // A whole context is never too long for a step.
                max_step_tokens: seeded.config.max_step_tokens.max(seeded.config.max_context),
                ..seeded.config
            },
            quiet: 0,
            cancel: 0,
            deadline: 0,
            faulty: 0,
            failing: 0,
            ..seeded
        };
        let alone = Scenario {
            config: SchedulerConfig {
                max_running: 1,
                max_step_tokens: 1000,
                max_chunk: 1000,
                ..crowded.config
            },
            ..crowded.clone()
        };
        let (crowded, alone) = (run(&crowded), run(&alone));
        assert_eq!((crowded.answered, crowded.answers), (alone.answered, alone.answers));
        assert_eq!(crowded.answered + crowded.warmed, 300);
    }
}

#[test]
fn an_answer_does_not_depend_on_whether_its_context_was_kept_moved_or_computed() {
    let (mut restored, mut computed) = (0, [0, 0]);
    for seed in 3000..3030 {
        let seeded = Scenario::from_seed(seed, 300);
        let without = Scenario {
            config: SchedulerConfig { max_queued: 300, ..seeded.config },
            cancel: 0,
            deadline: 0,
            faulty: 0,
            host: None,
            ..seeded
        };
        let host = HostScenario { pages: 10_000, time_to_live: None, window: without.pages as usize / 2 };
        let with = Scenario { host: Some(host), ..without.clone() };
        // Failed steps fail requests that are alone in them, which differ.
        let [without, with] = [without, with].map(|scenario| run(&Scenario { failing: 0, ..scenario }));
        assert_eq!((without.answered, without.answers), (with.answered, with.answers));
        restored += with.restored_tokens;
        computed[0] += without.missed_tokens;
        computed[1] += with.missed_tokens;
    }
    println!("{restored} tokens came back, computed were {computed:?}");
    assert!(
        restored > 10_000 && computed[1] < computed[0],
        "{restored} tokens came back, computed were {computed:?}"
    );
}

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

#[test]
fn one() {
    run(&Scenario::from_seed(setting("BEAMLINE_SEED", 0), REQUESTS));
}

/// Millions of requests, over other seeds than the other tests.
#[test]
fn soak() {
    let first = setting("BEAMLINE_SEED", 1_000_000);
    let scenarios = setting("BEAMLINE_SOAK", 20_000).div_ceil(REQUESTS as u64);
    run_many(first..first + scenarios);
}
