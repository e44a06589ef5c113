//! The Python tests: the tools' own, the evaluation package's, and those of foreign clients against the server. Before
//! them, ruff reads all Python files.
//!
//! What they import lives in a virtual environment under `target/`. Where it cannot be made (no network, no pip), the
//! tests run on the system's Python, and each one that lacks a package is skipped and says so.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{root, run};

const REQUIREMENTS: &str = "xtask/requirements.txt";
const ENVIRONMENT: &str = "target/venv";
/// Tests of the server by clients that others wrote.
const CLIENTS: &str = "crates/server/tests/clients";

/// Runs every Python test. `beamline` is the binary that the tests of clients start.
pub(crate) fn test(beamline: &Path) -> Result<()> {
    let system = PathBuf::from("python3");
    run(&mut unittest(&system, "weights/tests"))
        .context("the Python tools need python3, without packages")?;
    run(&mut unittest(&system, "xtask/bugs/tests"))?;
    let python = environment_or(system);
    lint()?;
    run(unittest(&python, "eval/tests").env("BEAMLINE", beamline))?;
    run(unittest(&python, CLIENTS).env("BEAMLINE", beamline))
}

/// Holds every Python file against `ruff.toml`, with the ruff of the virtual environment.
fn lint() -> Result<()> {
    let ruff = root().join(ENVIRONMENT).join("bin/ruff");
    if !ruff.exists() {
        eprintln!("SKIPPED: Python files are not linted, because {ENVIRONMENT} has no ruff");
        return Ok(());
    }
    run(Command::new(ruff).args(["check", "--quiet", "--no-cache"]).current_dir(root()))
}

/// Tells which bug reports of a folder are answered right.
pub(crate) fn bugs(folder: &Path, only: Option<&str>) -> Result<()> {
    let mut command = Command::new(environment_or(PathBuf::from("python3")));
    command.arg(root().join("xtask/bugs/run.py")).arg(folder);
    command.args(only.into_iter().flat_map(|text| ["--only", text]));
    run(&mut command)
}

/// The Python that has the packages, or the system's, with a loud word.
fn environment_or(system: PathBuf) -> PathBuf {
    environment().unwrap_or_else(|error| {
        eprintln!(
            "SKIPPED: {REQUIREMENTS} cannot be installed, so what needs a package is skipped: {error:#}"
        );
        system
    })
}

/// The Python of `target/venv`, which has what `xtask/requirements.txt` names.
///
/// The requirements are copied into the environment after they were installed, so that a second run needs no network.
fn environment() -> Result<PathBuf> {
    let home = root().join(ENVIRONMENT);
    let python = home.join("bin/python");
    let wanted = std::fs::read_to_string(root().join(REQUIREMENTS))?;
    let installed = home.join("installed.txt");
    if python.exists() && std::fs::read_to_string(&installed).is_ok_and(|text| text == wanted) {
        return Ok(python);
    }
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&home))?;
    ensure!(python.exists(), "python3 -m venv made no {}", python.display());
    let install =
        ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", REQUIREMENTS];
    run(Command::new(&python).args(install).current_dir(root()))?;
    std::fs::write(&installed, wanted)?;
    Ok(python)
}

fn unittest(python: &Path, tests: &str) -> Command {
    let mut command = Command::new(python);
    command.args(["-m", "unittest", "discover", "-s", tests, "-t", tests]).current_dir(root());
    command
}
