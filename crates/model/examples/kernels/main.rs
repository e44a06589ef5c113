//! How near the kernels of the CPU come to what its instructions can do: `cargo xtask kernels`.
//!
//! Each case is timed on one thread and on all, with every instruction set that has a kernel of its own
//! for it. Its rate stands beside that of a plain loop of the same instruction, on registers alone, in
//! the same run: so a slow kernel shows on any machine. The best of many runs counts. Long runs on one
//! thread are timed by its own clock, so that other work on the machine matters little there.
//!
//! To add a family of kernels, write a file with its `cases` and list it in [`all_cases`].

#![allow(clippy::expect_used, clippy::print_stdout, reason = "a measurement for people to run")]

mod attention;
mod case;
mod peaks;
mod pointwise;
mod products;
mod report;
mod retrieval;

use std::path::PathBuf;
use std::process::ExitCode;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::isa::Isa;
use case::{Case, Effort};
use clap::Parser;
use report::Figure;

/// Measure the kernels of the CPU against plain loops of the same instructions.
#[derive(Parser)]
struct Options {
    /// Only this instruction set (avx2, avx512, ..); it may be `portable`, which is left out otherwise.
    #[arg(long)]
    isa: Option<String>,
    /// Only cases whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Threads of the second measurement; all cores if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Write the figures to this file as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Fail if a kernel is below the share of the plain loop that is demanded of it, on one thread.
    #[arg(long)]
    check: bool,
    /// Fewer and shorter runs.
    #[arg(long)]
    quick: bool,
}

fn all_cases() -> Vec<Case> {
    [products::cases(), attention::cases(), pointwise::cases(), retrieval::cases()]
        .into_iter()
        .flatten()
        .collect()
}

fn main() -> ExitCode {
    let options = Options::parse();
    let Some(isas) = instruction_sets(options.isa.as_deref()) else {
        let names: Vec<&str> = Isa::all().into_iter().map(Isa::name).collect();
        eprintln!("error: --isa takes an instruction set of this machine: {}", names.join(", "));
        return ExitCode::FAILURE;
    };
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    let most = options.threads.unwrap_or(all).max(1);
    let mut threads = vec![1, most];
    threads.dedup();
    let figures = measure(&options, &isas, &threads);
    report::print(&figures);
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&figures).expect("figures are plain data");
        if let Err(error) = std::fs::write(path, json + "\n") {
            eprintln!("error: cannot write {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    let slow = report::below_demand(&figures);
    if options.check && slow > 0 {
        eprintln!(
            "error: {slow} kernels are slower than demanded; run again on a quiet machine, then look at the marked ones"
        );
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// The one asked for, or all but the portable one; none if the machine has no such one.
fn instruction_sets(asked: Option<&str>) -> Option<Vec<Isa>> {
    let all = Isa::all();
    match asked {
        Some(name) => all.into_iter().find(|isa| isa.name() == name).map(|isa| vec![isa]),
        None => Some(all.into_iter().filter(|isa| isa.name() != "portable").collect()),
    }
}

fn measure(options: &Options, isas: &[Isa], threads: &[usize]) -> Vec<Figure> {
    let mut cases = all_cases();
    cases.retain(|case| case.title().contains(&options.only));
    let mut figures = Vec::new();
    for &isa in isas {
        for &threads in threads {
            let effort = Effort::new(options.quick, threads);
            let cpu = Cpu::with_isa(threads, isa).expect("threads");
            let mut peaks = peaks::Peaks::new(isa, threads, effort);
            for case in &mut cases {
                // A set without a kernel of its own runs that of a lower one, which is measured there.
                if options.isa.is_none() && !case.differs_at.contains(&isa.name()) {
                    continue;
                }
                let peak = case.instruction.and_then(|instruction| peaks.rate(instruction));
                let seconds = effort.best(&cpu, &mut *case.kernel);
                figures.push(Figure::new(case, isa, threads, seconds, peak));
                eprint!("\r{} {threads} threads: {} figures", isa.name(), figures.len());
            }
        }
    }
    eprintln!();
    figures
}
