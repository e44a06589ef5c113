//! The Python tests: the tools' own, the evaluation package's, and those of foreign clients against the
//! server. Before them, ruff reads all Python files.
//!
//! Their packages lie in a virtual environment under `target/`. Where it cannot be made (no network, no
//! pip), the tests run on the system's Python, and each one that lacks a package is skipped and says so.
//!
//! What trains or converts models needs torch, which is large. Its tests have an environment of their own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{root, run};

/// A virtual environment: its folder, and the files that say what it holds, the first of which is installed.
struct Environment {
    home: &'static str,
    requirements: &'static [&'static str],
}

const CLIENTS_ENVIRONMENT: Environment =
    Environment { home: "target/venv", requirements: &["xtask/requirements.txt"] };
const WHOLE_ENVIRONMENT: Environment = Environment {
    home: "target/venv-all",
    requirements: &["xtask/requirements-all.txt", "xtask/requirements.txt"],
};
/// Longest time to install an environment.
const PATIENCE: Duration = Duration::from_secs(600);
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
    let ruff = root().join(CLIENTS_ENVIRONMENT.home).join("bin/ruff");
    if !ruff.exists() {
        eprintln!("SKIPPED: Python files are not linted, because {} has no ruff", CLIENTS_ENVIRONMENT.home);
        return Ok(());
    }
    run(Command::new(ruff).args(["check", "--quiet", "--no-cache"]).current_dir(root()))
}

/// Runs every Python test with every package, so that none is skipped, except where its data is not
/// there.
///
/// `or_skip`: where the packages cannot be had, this is said and nothing fails.
pub(crate) fn test_all(beamline: &Path, or_skip: bool) -> Result<()> {
    ensure!(beamline.exists(), "{} is not there: build it first", beamline.display());
    let python = match WHOLE_ENVIRONMENT.python() {
        Ok(python) => python,
        Err(error) if or_skip => {
            eprintln!("SKIPPED: what needs torch is NOT tested, because it cannot be installed: {error:#}");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    for tests in ["weights/tests", "xtask/bugs/tests", "eval/tests", CLIENTS] {
        let mut command = Command::new(&python);
        run(command.args(["xtask/unskipped.py", tests]).current_dir(root()).env("BEAMLINE", beamline))?;
    }
    Ok(())
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
    CLIENTS_ENVIRONMENT.python().unwrap_or_else(|error| {
        eprintln!(
            "SKIPPED: {} cannot be installed, so what needs a package is skipped: {error:#}",
            CLIENTS_ENVIRONMENT.requirements[0]
        );
        system
    })
}

impl Environment {
    /// The Python of this environment, which is made where it is not there or is another.
    ///
    /// The requirements are copied into it after they were installed, so that a second run needs no network.
    fn python(&self) -> Result<PathBuf> {
        let home = root().join(self.home);
        let python = home.join("bin/python");
        let mut wanted = String::new();
        for file in self.requirements {
            wanted += &std::fs::read_to_string(root().join(file))?;
        }
        let installed = home.join("installed.txt");
        if python.exists() && std::fs::read_to_string(&installed).is_ok_and(|text| text == wanted) {
            return Ok(python);
        }
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&home))?;
        ensure!(python.exists(), "python3 -m venv made no {}", python.display());
        let end = Instant::now() + PATIENCE;
        let install = run_until(pip(&python).args(["--requirement", self.requirements[0]]), end);
        if install.is_err() {
            // A part of some gigabytes is of no use, and a disk that is full fails what comes next.
            std::fs::remove_dir_all(&home).ok();
        }
        install?;
        std::fs::write(&installed, wanted)?;
        Ok(python)
    }
}

fn pip(python: &Path) -> Command {
    let mut command = Command::new(python);
    command.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).current_dir(root());
    command
}

/// Runs a command, and ends it where it takes longer.
fn run_until(command: &mut Command, end: Instant) -> Result<()> {
    eprintln!("$ {command:?}");
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => bail!("{command:?}: {status}"),
            None if Instant::now() >= end => {
                child.kill()?;
                child.wait()?;
                bail!("{command:?} took too long");
            }
            None => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

fn unittest(python: &Path, tests: &str) -> Command {
    let mut command = Command::new(python);
    command.args(["-m", "unittest", "discover", "-s", tests, "-t", tests]).current_dir(root());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_takes_too_long_is_ended() {
        let soon = || Instant::now() + Duration::from_millis(300);
        assert!(run_until(&mut Command::new("true"), soon()).is_ok());
        assert!(run_until(&mut Command::new("false"), soon()).is_err());
        let start = Instant::now();
        let error = run_until(Command::new("sleep").arg("60"), soon()).err().map(|error| error.to_string());
        assert!(error.is_some_and(|text| text.ends_with("took too long")));
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
