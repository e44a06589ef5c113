//! The project's own chores: `cargo xtask <chore>`.
//!
//! Each chore is a thin wrapper over commands one could type, printed before they run; only `bench` and
//! `tidy` do their work by themselves.

mod attack;
mod bench;
mod gpu;
mod hit_rate;
mod mdone;
mod plot;
mod python;
mod simulate;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Parser;

/// Chores of the beamline workspace.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Chore {
    /// Run every test: the workspace's, those of the Python tools, and those of other projects' clients.
    Test {
        /// Only the Python tests, on the release binary as it was last built.
        #[arg(long)]
        python: bool,
        /// Only the Python tests, with torch and all else that any of them needs, in a virtual
        /// environment of several gigabytes; on the release binary as it was last built.
        #[arg(long, conflicts_with = "python")]
        python_all: bool,
        /// Where these packages cannot be installed, say so and fail nothing.
        #[arg(long, requires = "python_all")]
        or_skip: bool,
    },
    /// Simulate millions of requests against the scheduler and the cache; or with --swaps, swap
    /// checkpoints and catalogs of a real server under load.
    Soak {
        /// Requests to simulate.
        #[arg(long, default_value_t = 5_000_000)]
        requests: u64,
        /// Instead: swaps of checkpoints, and as many changes of catalogs, while every answer is checked.
        #[arg(long, conflicts_with = "requests")]
        swaps: Option<u64>,
    },
    /// Run a folder of bug reports (inputs, and the value that is right) on the release build.
    Bugs {
        /// The folder of folders; xtask/bugs/run.py says what one holds.
        #[arg(env = "BEAMLINE_BUGS", value_name = "DIR")]
        folder: PathBuf,
        /// Only folders whose name contains this.
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
    },
    /// Try every parser with mutated inputs; fuzz/README.md says what fails and where inputs are kept.
    Fuzz {
        /// Targets, and options of the driver: --seconds, --seed.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Measure what coarse cuts of long histories are worth, and write bench/results/history-cuts.json.
    HistoryCuts,
    /// Write crates/server/openapi.json anew from the code.
    Openapi,
    /// Measure a server on the standard workloads, against other engines if wanted.
    Bench(Box<bench::Args>),
    /// Simulate the scheduler in virtual time beside reference policies, and write bench/results/simulate.*.
    Simulate(simulate::Args),
    /// Replay real logs against the bookkeeping of the cache, and write bench/results/hit-rate.*.
    HitRate(hit_rate::Args),
    /// Kill and damage a server with KV pages on disk under its users, and compare every answer.
    DiskTier(bench::disk_tier::Args),
    /// Attack a server of its own as hostile clients and files would, and say what was lost.
    Attack(attack::Args),
    /// Measure the kernels of the CPU against plain loops of the same instructions; `-- --help` says how.
    Kernels {
        /// Options of the measurement: --isa, --only, --threads, --json, --check, --quick.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Check rules that the compiler does not know: layers, lengths, wording, links, documented commands.
    Tidy(tidy::Args),
    /// Build with CUDA and pack what checks and times it on a machine with a GPU.
    Gpu(gpu::Args),
}

fn main() -> Result<()> {
    match Chore::parse() {
        Chore::Test { python_all: true, or_skip, .. } => python::test_all(&binary(), or_skip),
        Chore::Test { python, .. } => test(python),
        Chore::Soak { swaps: Some(swaps), .. } => {
            let server = [
                "test",
                "--release",
                "--workspace",
                "--test",
                "server",
                "fifty_updates",
                "--",
                "--nocapture",
            ];
            run(cargo(&server).env("BEAMLINE_SWAPS", swaps.to_string()))
        }
        Chore::Soak { requests, swaps: None } => {
            let simulation = ["test", "--release", "--workspace", "--test", "simulation", "soak"];
            run(cargo(&simulation).env("BEAMLINE_SOAK", requests.to_string()))
        }
        Chore::Bugs { folder, only } => {
            build(&["--bin", "beamline"])?;
            python::bugs(&folder, only.as_deref())
        }
        Chore::Fuzz { options } => fuzz(&options),
        Chore::HistoryCuts => history_cuts(),
        Chore::Openapi => {
            let check = ["test", "--release", "--workspace", "--test", "server", "the_committed_description"];
            run(cargo(&check).env("UPDATE_OPENAPI", "1"))
        }
        Chore::Bench(args) => bench::run(*args),
        Chore::Simulate(args) => simulate::run(&args),
        Chore::HitRate(args) => hit_rate::run(&args),
        Chore::DiskTier(args) => bench::disk_tier::run(&args),
        Chore::Attack(args) => attack::run(&args),
        Chore::Kernels { options } => {
            build(&["--example", "kernels"])?;
            run(Command::new(root().join("target/release/examples/kernels")).args(options))
        }
        Chore::Tidy(args) => tidy::run(&args),
        Chore::Gpu(args) => gpu::bundle(&args),
    }
}

fn test(only_python: bool) -> Result<()> {
    if !only_python {
        // One invocation and one profile, so that nothing is built twice. One seed, so that a change is
        // judged by itself and not by chance; PROPTEST_RNG_SEED names another.
        let seed = std::env::var("PROPTEST_RNG_SEED").unwrap_or_else(|_| "1".into());
        run(cargo(&["test", "--release", "--workspace"]).env("PROPTEST_RNG_SEED", seed))?;
    }
    python::test(&binary())?;
    tidy::check_commands(&binary())
}

/// The binary that the tests of clients start.
fn binary() -> PathBuf {
    root().join("target/release/beamline")
}

fn fuzz(options: &[String]) -> Result<()> {
    // As the tests build it, so that nothing is built twice: the binary comes with its package's tests.
    run(&mut cargo(&["test", "--release", "--workspace", "--test", "corpus", "--no-run"]))?;
    // An input that asks for all memory must end the driver and not the machine. The limit is in KiB.
    let script = format!("ulimit -v {}; exec target/release/beamline-fuzz \"$@\"", 16 << 20);
    let mut driver = Command::new("sh");
    driver.args(["-c", &script, "sh"]).args(options).current_dir(root());
    if Path::new("/dev/shm").is_dir() {
        // Targets that read files are as fast as those that read memory.
        driver.env("TMPDIR", "/dev/shm");
    }
    run(&mut driver).context("the input lies under target/fuzz: fuzz/README.md says what to do with it")
}

fn history_cuts() -> Result<()> {
    build(&["--bin", "beamline", "--example", "history_cuts"])?;
    let checkpoint = ["--checkpoint", "weights/demo/checkpoint"];
    let path = root().join("bench/results/history-cuts.json");
    let file = std::fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let example = root().join("target/release/examples/history_cuts");
    run(Command::new(example).args(checkpoint).current_dir(root()).stdout(file))
}

/// Builds some targets as the tests build them. For one package alone, cargo would take other features
/// and build the large dependencies once more.
fn build(targets: &[&str]) -> Result<()> {
    run(cargo(&["build", "--release", "--workspace"]).args(targets))
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    command
}

fn run(command: &mut Command) -> Result<()> {
    eprintln!("$ {command:?}");
    let status = command.status().with_context(|| format!("cannot start {command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

/// The root of the workspace.
fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}
