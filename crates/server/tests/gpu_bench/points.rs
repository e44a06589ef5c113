//! Batches of requests that arrive together: latency of the whole batch.

use std::sync::Arc;

use beamline_compute::cpu::pages::PAGE_SIZE;
use beamline_compute::cuda::device::Device;
use beamline_model::checkpoint::config::Config;
use serde_json::{Value, json};

use crate::profile::Profile;
use crate::world::World;
use crate::{Args, Output, shapes};

/// A tenant that no request had before.
fn fresh() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

/// Sorted milliseconds, the first of which are thrown away.
fn times(repetitions: usize, mut once: impl FnMut() -> f64) -> Vec<f64> {
    for _ in 0..repetitions.div_ceil(10) {
        once();
    }
    let mut times: Vec<f64> = (0..repetitions).map(|_| once()).collect();
    times.sort_by(f64::total_cmp);
    times
}

/// How long the context takes and each branch step, with its expansion. Every step is waited for, so the
/// sum exceeds the time of a request without waits.
fn phases(world: &World, repetitions: usize, mut once: impl FnMut() -> f64) -> (f64, Vec<f64>) {
    let mut all: Vec<(f64, Vec<f64>)> = (0..repetitions)
        .map(|_| {
            *world.timed.lock().unwrap() = Some(Vec::new());
            once();
            let steps = world.timed.lock().unwrap().take().unwrap();
            let context = steps.iter().filter(|(context, _)| *context).map(|(_, took)| took).sum();
            (context, steps.into_iter().filter(|(context, _)| !context).map(|(_, took)| took).collect())
        })
        .collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    all.swap_remove(all.len() / 2)
}

fn result(args: &Args, engine: &str, (batch, beam, context): (usize, usize, usize), times: &[f64]) -> Value {
    json!({
        "engine": engine, "shape": args.shape, "batch": batch, "beam": beam, "context": context,
        "levels": shapes::LEVELS, "items": args.items, "repetitions": times.len(),
        "median_ms": percentile(times, 0.5), "p90_ms": percentile(times, 0.9), "fastest_ms": times[0],
    })
}

/// Batches, beams and contexts.
fn sweep(args: &Args) -> Vec<(usize, usize, usize)> {
    if args.shape == "tiny" {
        return vec![(1, 4, 40), (2, 8, 70)];
    }
    let mut all: Vec<(usize, usize, usize)> = Vec::new();
    for context in [1000, 5000] {
        all.extend([1, 2, 4, 8].map(|batch| (batch, 256, context)));
    }
    if !args.quick {
        all.extend([1, 2, 4, 8, 16, 32].map(|batch| (batch, 128, 1000)));
        all.extend([32, 64, 128, 512, 1024].map(|beam| (4, beam, 1000)));
        all.extend([512, 2048, 4096, 8192].map(|context| (4, 256, context)));
    }
    all
}

/// Nobody was here before.
pub(crate) fn measure(world: &World, args: &Args, output: &mut Output) {
    for (batch, beam, context) in sweep(args) {
        let times = times(args.repetitions, || {
            let request = |_| world.request(world.history(fresh(), context), beam, fresh());
            world.answer((0..batch).map(request).collect()).0
        });
        let once = || {
            let request = |_| world.request(world.history(fresh(), context), beam, fresh());
            world.answer((0..batch).map(request).collect()).0
        };
        let (prefill, steps) = phases(world, args.repetitions.div_ceil(4), once);
        let mut result = result(args, "beamline", (batch, beam, context), &times);
        (result["prefill_ms"], result["step_ms"]) = (json!(prefill), json!(steps));
        output.put(&result);
    }
}

/// Everybody comes back with a few new items: the context is in pages.
pub(crate) fn measure_reuse(world: &World, args: &Args, output: &mut Output) {
    let new = 12;
    for (batch, beam, context) in sweep(args) {
        let mut cached = 0;
        let times = times(args.repetitions, || {
            let users: Vec<(u64, Vec<u32>)> =
                (0..batch).map(|_| (fresh(), world.history(fresh(), context))).collect();
            let first = |(tenant, tokens): &(u64, Vec<u32>)| {
                world.request(tokens[..context - new].to_vec(), beam, *tenant)
            };
            world.answer(users.iter().map(first).collect());
            let again = users.into_iter().map(|(tenant, tokens)| world.request(tokens, beam, tenant));
            let (took, found) = world.answer(again.collect());
            cached = found;
            took
        });
        let mut result = result(args, "beamline, context cached", (batch, beam, context), &times);
        result["cached_tokens"] = json!(cached);
        output.put(&result);
    }
}

/// One user comes back whose context went to host memory, because another took its place.
pub(crate) fn measure_host(device: &Arc<dyn Device>, config: &Config, args: &Args, output: &mut Output) {
    let (beam, context, new): (usize, usize, usize) =
        if args.shape == "tiny" { (4, 150, 12) } else { (256, 5000, 12) };
    // Room for one of them and a half.
    let pages = (context + 2 * beam).div_ceil(PAGE_SIZE) * 3 / 2;
    let world = World::with_host(device, args, config, Some(pages), Some(16 << 30));
    let mut cached = 0;
    let times = times(args.repetitions, || {
        let (tenant, tokens) = (fresh(), world.history(fresh(), context));
        world.answer(vec![world.request(tokens[..context - new].to_vec(), beam, tenant)]);
        world.answer(vec![world.request(world.history(fresh(), context), beam, fresh())]);
        let (took, found) = world.answer(vec![world.request(tokens, beam, tenant)]);
        cached = found;
        took
    });
    let mut result = result(args, "beamline, context in host memory", (1, beam, context), &times);
    (result["cached_tokens"], result["pages"]) = (json!(cached), json!(pages));
    output.put(&result);
}

/// The widest beams.
pub(crate) fn measure_wide(world: &World, args: &Args, output: &mut Output) {
    let widths: &[usize] = if args.shape == "tiny" { &[100] } else { &[2048, 5000] };
    for &beam in widths {
        let context = if args.shape == "tiny" { 40 } else { 1000 };
        let times = times(args.repetitions, || {
            world.answer(vec![world.request(world.history(fresh(), context), beam, fresh())]).0
        });
        output.put(&result(args, "beamline", (1, beam, context), &times));
    }
}

/// Where the time of a request goes: every kernel waited for, so the sum is more than the request takes.
pub(crate) fn measure_profile(world: &World, profile: &Profile, args: &Args, output: &mut Output) {
    for (batch, beam, context) in sweep(args).into_iter().take(8) {
        let run = || {
            let request = |_| world.request(world.history(fresh(), context), beam, fresh());
            world.answer((0..batch).map(request).collect()).0
        };
        run();
        profile.start();
        let whole = run();
        let parts = profile.stop();
        let sum: f64 = parts.values().map(|(_, took)| took).sum();
        let parts: Value = parts
            .into_iter()
            .map(|(name, (calls, took))| (name, json!({"calls": calls, "ms": took})))
            .collect::<serde_json::Map<_, _>>()
            .into();
        output.put(&json!({
            "engine": "beamline", "section": "profile", "shape": args.shape, "batch": batch, "beam": beam,
            "context": context, "whole_ms": whole, "sum_ms": sum, "parts": parts,
        }));
    }
}
