//! The driver that needs stable Rust only: mutates, runs, keeps what has a new outcome, and stops at the
//! first failure.
//!
//! A failing input lies under `target/fuzz`, where `cargo test` finds it too. Put it into
//! `fuzz/corpus/TARGET`, so that it is tried from now on.
//!
//! Invariant: whatever ends the process, the input that was being run is in a file.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a tool for people")]

use std::collections::HashSet;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use beamline_fuzz::failed::{Current, keep};
use beamline_fuzz::{TARGETS, Target, limits, mutate, seeds};
use clap::Parser;
use fastrand::Rng;

/// Try parsers with mutated inputs.
#[derive(Parser)]
struct Args {
    /// Targets; all of them if none is named.
    targets: Vec<String>,
    /// How long to try each.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Where mutations begin; printed, so that a run can be done again.
    #[arg(long)]
    seed: Option<u64>,
}

/// Inputs after which memory is looked at.
const LOOK: u64 = 64;

/// How often it is told how far a target is.
const PROGRESS: Duration = Duration::from_secs(10);

/// Most inputs to mutate that are kept.
const MOST_INPUTS: usize = 5_000;

/// The input that is being run, and since when, for the watchdog.
type Running = Arc<Mutex<Option<(Instant, &'static str, Vec<u8>)>>>;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let known = || TARGETS.map(|target| target.name).join(", ");
    for name in &args.targets {
        if !TARGETS.iter().any(|target| target.name == name) {
            bail!("there is no target {name}; there are {}", known());
        }
    }
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    let running = Running::default();
    watch(&running);
    // Decoders of other projects panic and are caught; only what reaches this driver counts.
    panic::set_hook(Box::new(|_| {}));
    for target in TARGETS
        .iter()
        .filter(|target| args.targets.is_empty() || args.targets.iter().any(|name| name == target.name))
    {
        eprintln!("{}: seed {seed}", target.name);
        fuzz(target, args, seed, &running)?;
    }
    Ok(())
}

fn fuzz(target: &Target, args: &Args, seed: u64, running: &Running) -> Result<()> {
    let time = Duration::from_secs(args.seconds);
    let mut inputs =
        seeds::seeds(target).with_context(|| format!("cannot read the seeds of {}", target.name))?;
    let mut random = Rng::with_seed(seed);
    let (mut outcomes, mut count) = (HashSet::new(), 0_u64);
    let begun = Instant::now();
    let mut memory = resident();
    let mut recent = Vec::new();
    let first = inputs.len() as u64;
    let current = Current::of(target.name)?;
    if let Some(left) = current.left_behind() {
        eprintln!("{}: an earlier run ended while it ran {}", target.name, left.display());
    }
    let mut told = begun;
    while count < first || begun.elapsed() < time {
        // Seeds first, as they are.
        let input = match inputs.get(count as usize).filter(|_| count < first) {
            Some(seed) => seed.clone(),
            None => mutate::mutate(&mut random, target.shape, &inputs),
        };
        current.set(&input)?;
        let outcome = attempt(target, &input, running)?;
        if outcomes.insert(without_details(&outcome)) && count >= first && inputs.len() < MOST_INPUTS {
            inputs.push(input.clone());
        }
        count += 1;
        if told.elapsed() >= PROGRESS {
            let (past, found) = (begun.elapsed().as_secs(), outcomes.len());
            eprintln!("{}: {past} of {} s, {count} inputs, {found} outcomes", target.name, args.seconds);
            told = Instant::now();
        }
        recent.push(input);
        if count % LOOK == 0 {
            let now = peak();
            if now > memory.saturating_add(limits::MEMORY) {
                let worst = greediest(target, &recent)?;
                bail!(
                    "{}: {} MiB for one input: {}",
                    target.name,
                    (now - memory) >> 20,
                    keep(target.name, &worst)?.display()
                );
            }
            recent.clear();
            forget_peak();
            memory = resident();
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{:12} {count:8} inputs in {seconds:5.1} s, {:4} outcomes, seed {seed}",
        target.name,
        outcomes.len()
    );
    Ok(())
}

/// Runs one input; a panic is an error that says where the input lies.
fn attempt(target: &Target, input: &[u8], running: &Running) -> Result<String> {
    *running.lock().unwrap_or_else(PoisonError::into_inner) =
        Some((Instant::now(), target.name, input.to_vec()));
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    *running.lock().unwrap_or_else(PoisonError::into_inner) = None;
    match outcome {
        Ok(outcome) => Ok(outcome),
        Err(payload) => {
            let said = payload.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a panic");
            bail!("{}: {said}: {}", target.name, keep(target.name, input)?.display())
        }
    }
}

/// Ends the process when an input takes too long: nothing else can interrupt it.
fn watch(running: &Running) {
    let running = Arc::clone(running);
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let current = running.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((since, target, input)) = current.as_ref()
                && since.elapsed() > limits::TIME
            {
                let place = keep(target, input)
                    .map_or_else(|error| error.to_string(), |place| place.display().to_string());
                eprintln!("error: {target}: longer than {:?}: {place}", limits::TIME);
                std::process::exit(1);
            }
        }
    });
}

/// Of inputs that took too much memory together, the one that takes most.
fn greediest(target: &Target, inputs: &[Vec<u8>]) -> Result<Vec<u8>> {
    let cost = |input: &Vec<u8>| {
        forget_peak();
        let before = resident();
        let _ = panic::catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
        peak().saturating_sub(before)
    };
    inputs.iter().max_by_key(|input| cost(input)).cloned().context("no input")
}

/// An outcome without its digits and without what it quotes: a message about another number or name is
/// the same outcome.
fn without_details(outcome: &str) -> String {
    let mut quote = None;
    let mut kept = String::new();
    for c in outcome.chars() {
        match quote {
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if c == '`' || c == '"' => quote = Some(c),
            None if c.is_ascii_digit() => {}
            None => kept.push(c),
        }
    }
    kept.truncate(kept.char_indices().nth(300).map_or(kept.len(), |(at, _)| at));
    kept
}

/// Resident memory in bytes; 0 where the system does not say.
fn resident() -> usize {
    memory("VmRSS:")
}

/// The most that was resident since [`forget_peak`].
fn peak() -> usize {
    memory("VmHWM:")
}

fn memory(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<usize>().ok());
    kilobytes.unwrap_or(0) << 10
}

/// Begins a new measurement of the peak, where the system can.
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
