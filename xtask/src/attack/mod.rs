//! `cargo xtask attack`: hostile clients, files and signals against a server of its own, and what others
//! lose by them.
//!
//! | module | one idea |
//! | --- | --- |
//! | [`arena`] | what attacks are given: servers on ports of the system, a folder, time |
//! | [`server`] | one server: started, asked, signalled, stopped |
//! | [`wire`] | requests byte by byte, as only an attacker writes them |
//! | [`bystanders`] | who must not notice: health checks and a polite client |
//! | [`outcome`] | what was tried, what happened, what is wrong with that |
//! | [`list`] | the attacks, one file each |
//!
//! Invariants: only loopback addresses are ever contacted; every attack is bounded in time and count;
//! every server that is started is stopped.

mod arena;
mod bystanders;
mod list;
mod outcome;
mod server;
mod wire;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use arena::Arena;
use outcome::Report;

/// Flags of `attack`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// About a second for each attack, so that all take less than a minute.
    #[arg(long)]
    quick: bool,
    /// Seconds for each attack that lasts.
    #[arg(long, value_name = "S", default_value_t = 8.0, conflicts_with = "quick")]
    seconds: f64,
    /// Only attacks whose name holds this.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Longest time that a health check may take. It holds on a quiet machine.
    #[arg(long, value_name = "MS", default_value_t = 100)]
    health_ms: u64,
    /// The program to attack [default: built now].
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// The checkpoint that it serves.
    #[arg(long, value_name = "DIR", default_value = "weights/demo/checkpoint")]
    checkpoint: PathBuf,
    /// Name the attacks and do nothing.
    #[arg(long)]
    list: bool,
}

/// Attacks, prints a table, and fails if anything was lost that must not be.
///
/// # Errors
///
/// When an attack found a fault, or could not be carried out.
pub(crate) fn run(args: &Args) -> Result<()> {
    let wanted = |name: &str| args.only.as_deref().is_none_or(|part| name.contains(part));
    let attacks: Vec<_> = list::ATTACKS.iter().filter(|attack| wanted(attack.name)).collect();
    if attacks.is_empty() {
        bail!("no attack has this name; --list names all of them");
    }
    if args.list {
        let names: Vec<String> =
            attacks.iter().map(|attack| format!("{:<20} {}", attack.name, attack.what)).collect();
        eprintln!("{}", names.join("\n"));
        return Ok(());
    }
    // Attackers need many sockets.
    let _ = rlimit::increase_nofile_limit(16_384);
    let time = Duration::from_secs_f64(if args.quick { 1.0 } else { args.seconds });
    let arena = Arena::new(args.binary.clone(), &args.checkpoint, time)?;
    let health = Duration::from_millis(args.health_ms);
    let mut reports = Vec::new();
    for attack in attacks {
        eprintln!("{}: {} ...", attack.name, attack.what);
        let started = Instant::now();
        let outcome = (attack.run)(&arena);
        let report = Report::new(attack, outcome, health, started.elapsed());
        eprintln!("  {}", report.line());
        reports.push(report);
    }
    eprintln!("\n{}", outcome::table(&reports));
    eprintln!("{}", machine());
    let failed = reports.iter().filter(|report| !report.passed()).count();
    if failed > 0 {
        bail!("{failed} of {} attacks found a fault", reports.len());
    }
    Ok(())
}

/// How busy the machine was: times mean little on one that has other work.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split_whitespace().next().unwrap_or("unknown").to_owned();
    format!("{cores} cores, load average {load}")
}
