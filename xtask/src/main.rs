//! The project's own chores: `cargo xtask <chore>`.
//!
//! Each chore is a thin wrapper over commands one could type, printed before they run; only `bench` measures by itself.

mod bench;
mod gpu;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Parser;

/// Chores of the beamline workspace.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Chore {
    /// Run every test: the workspace's, and those of the Python tools (standard library only).
    Test,
    /// Simulate millions of requests against the scheduler and the cache; or with --swaps, swap checkpoints and
    /// catalogs of a real server under load.
    Soak {
        /// Requests to simulate.
        #[arg(long, default_value_t = 5_000_000)]
        requests: u64,
        /// Instead: swaps of checkpoints, and as many changes of catalogs, while every answer is checked.
        #[arg(long, conflicts_with = "requests")]
        swaps: Option<u64>,
    },
    /// Measure what coarse cuts of long histories are worth, and write bench/results/history-cuts.json.
    HistoryCuts,
    /// Write crates/server/openapi.json anew from the code.
    Openapi,
    /// Measure a server on the standard workloads, against other engines if wanted.
    Bench(Box<bench::Args>),
    /// Build with CUDA and pack what checks and times it on a machine with a GPU.
    Gpu(gpu::Args),
}

fn main() -> Result<()> {
    match Chore::parse() {
        Chore::Test => test(),
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
        Chore::HistoryCuts => history_cuts(),
        Chore::Openapi => {
            let check = ["test", "--release", "--workspace", "--test", "server", "the_committed_description"];
            run(cargo(&check).env("UPDATE_OPENAPI", "1"))
        }
        Chore::Bench(args) => bench::run(*args),
        Chore::Gpu(args) => gpu::bundle(&args),
    }
}

fn test() -> Result<()> {
    // One invocation and one profile, so that nothing is built twice.
    run(&mut cargo(&["test", "--release", "--workspace"]))?;
    let system = PathBuf::from("python3");
    run(&mut python(&system, "weights/tests")).context("the Python tools need python3, without packages")?;
    // The evaluation package's own dependencies, where they can be had; without them its tests skip what needs them
    // and say so.
    let own = evaluation_python().unwrap_or_else(|error| {
        eprintln!("warning: the evaluation package is tested without its dependencies: {error:#}");
        system
    });
    run(&mut python(&own, "eval/tests"))
}

fn history_cuts() -> Result<()> {
    run(&mut cargo(&["build", "--release", "--package", "beamline"]))?;
    let checkpoint = ["--checkpoint", "weights/demo/checkpoint"];
    let example = ["run", "--release", "--package", "beamline", "--example", "history_cuts", "--"];
    let path = root().join("bench/results/history-cuts.json");
    let file = std::fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    run(cargo(&example).args(checkpoint).stdout(file))
}

fn python(python: &Path, tests: &str) -> Command {
    let mut command = Command::new(python);
    command.args(["-m", "unittest", "discover", "-s", tests]).current_dir(root());
    command
}

/// A virtual environment under `target` with what `eval/pyproject.toml` declares.
fn evaluation_python() -> Result<PathBuf> {
    let home = root().join("target/eval-python");
    let python = home.join("bin/python");
    if !python.exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&home))?;
    }
    run(Command::new(&python)
        .args(["-m", "pip", "install", "--quiet", "--editable", "./eval"])
        .current_dir(root()))?;
    Ok(python)
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
