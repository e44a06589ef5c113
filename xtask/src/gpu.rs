//! Packs what checks and times the CUDA engine on a machine that has a GPU and no toolkit: test and
//! bench binaries, the fixtures, the baselines, and a script that runs them, correctness first.
//!
//! Building needs nvcc, not a GPU. The bundle needs a driver, the CUDA 13 libraries and python3, and for
//! the baselines PyTorch.
//!
//! `--rehearse` then runs the script here, with a stand-in in the place of driver, CUDA libraries and
//! GPU (`crates/compute/kernels/emulation/driver`). Anything that fails to start, run or fit together
//! fails here first. It measures nothing.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{cargo, root, run};

/// Most bytes of a bundle.
const MOST_BYTES: u64 = 30_000_000;
/// Targets whose executables go along.
const EXECUTABLES: [&str; 5] = ["cuda", "cuda_hstu", "cuda_hstu_requests", "gpu_bench", "beamline"];

/// Sources of the stand-in, beside the kernels.
const STAND_IN_SOURCES: [&str; 6] =
    ["memory.cpp", "streams.cpp", "driver.cpp", "queues.cpp", "cublas.cpp", "others.cpp"];
/// What it takes the place of: everything that is loaded when a GPU is opened.
const STAND_IN_FOR: [&str; 2] = ["libcuda.so.1", "libcublas.so.13"];

/// Flags of `gpu`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the bundle goes; what is there is replaced.
    #[arg(long, default_value = "target/gpu-bundle")]
    out: PathBuf,
    /// Then go through the bundle's script here, on a stand-in for driver and GPU. Needs a C++20
    /// compiler, no GPU; measures nothing.
    #[arg(long)]
    rehearse: bool,
    /// Order in which the stand-in does what nothing orders.
    #[arg(long, default_value_t = 1, requires = "rehearse")]
    seed: u64,
}

pub(crate) fn bundle(args: &Args) -> Result<()> {
    let executables = build()?;
    let staging = root().join("target/gpu-staging");
    for folder in [&staging, &args.out] {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("cannot replace {}", folder.display()))?;
        }
    }
    fs::create_dir_all(staging.join("bin"))?;
    fs::create_dir_all(&args.out)?;
    for (name, executable) in &executables {
        let to = staging.join("bin").join(name);
        run(Command::new("strip").arg("-o").arg(&to).arg(executable))
            .context("strip comes with the compiler")?;
    }
    for family in ["hf", "hstu-research", "hstu-research-append", "hstu-stu"] {
        copy(&root().join("fixtures").join(family), &staging.join("fixtures").join(family))?;
    }
    copy(&root().join("crates/server/tests/fixtures"), &staging.join("fixtures/served"))?;
    copy(&root().join("bench/gpu"), &staging.join("bench"))?;
    let script = root().join("bench/gpu/run.py");
    let archive = args.out.join("bundle.tar.xz");
    run(Command::new("python3").arg(root().join("bench/gpu/pack.py")).arg(&staging).arg(&archive))?;
    fs::copy(script, args.out.join("run.py"))?;
    let bytes = fs::metadata(&archive)?.len();
    if bytes > MOST_BYTES {
        bail!("the bundle takes {bytes} bytes, more than {MOST_BYTES}");
    }
    eprintln!(
        "{}: {:.1} MB. On a machine with a GPU: python3 run.py --out results",
        args.out.display(),
        bytes as f64 / 1e6
    );
    if args.rehearse { rehearse(args) } else { Ok(()) }
}

/// Runs the bundle's script on the stand-in.
fn rehearse(args: &Args) -> Result<()> {
    let folder = root().join("target/gpu-rehearsal");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot replace {}", folder.display()))?;
    }
    let libraries = folder.join("libraries");
    fs::create_dir_all(&libraries)?;
    build_stand_in(&libraries)?;
    let results = folder.join("results");
    let mut script = Command::new("python3");
    script.arg(args.out.join("run.py")).arg("--out").arg(&results).arg("--rehearse").arg(&libraries);
    let done = run(script.env("BEAMLINE_STAND_IN_SEED", args.seed.to_string()));
    eprintln!(
        "{}: a rehearsal on a stand-in. It is no GPU, and no time in there means anything.",
        results.display()
    );
    done
}

/// Compiles the stand-in under the names of everything that the binaries load.
fn build_stand_in(to: &Path) -> Result<()> {
    let emulation = root().join("crates/compute/kernels/emulation");
    let (first, others) = STAND_IN_FOR.split_first().context("a stand-in for something")?;
    let mut command = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()));
    command.args(["-std=c++20", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]);
    command.args(["-fPIC", "-shared"]).arg(format!("-Wl,-soname,{first}"));
    command.arg("-o").arg(to.join(first)).arg(emulation.join("library.cpp"));
    command.args(STAND_IN_SOURCES.map(|name| emulation.join("driver").join(name)));
    run(&mut command).context("the stand-in needs a C++20 compiler, named by CXX")?;
    for name in others {
        // One library under all names, so that all of them share one state.
        std::os::unix::fs::symlink(first, to.join(name))?;
    }
    Ok(())
}

/// Builds with CUDA, in a target folder of its own, so that the builds without it stay.
fn build() -> Result<Vec<(String, PathBuf)>> {
    let mut command = cargo(&[
        "test",
        "--no-run",
        "--release",
        "--workspace",
        "--features",
        "cuda",
        "--target-dir",
        "target/cuda",
        "--message-format",
        "json-render-diagnostics",
        "--test",
        "cuda",
        "--test",
        "cuda_hstu",
        "--test",
        "cuda_hstu_requests",
        "--test",
        "gpu_bench",
    ]);
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let output = child.stdout.take().context("cargo's messages")?;
    let mut found = Vec::new();
    for line in BufReader::new(output).lines() {
        let message: serde_json::Value = serde_json::from_str(&line?)?;
        let (name, executable) = (message["target"]["name"].as_str(), message["executable"].as_str());
        if let (Some(name), Some(executable)) = (name, executable)
            && EXECUTABLES.contains(&name)
        {
            found.push((name.to_owned(), PathBuf::from(executable)));
        }
    }
    if !child.wait()?.success() {
        bail!("the build with CUDA failed; it needs nvcc (CUDA 13), named by CUDA_HOME or on the path");
    }
    for name in EXECUTABLES {
        if found.iter().all(|(built, _)| built != name) {
            bail!("cargo built no {name}");
        }
    }
    Ok(found)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        match path.is_dir() {
            true if entry.file_name() == "__pycache__" => {}
            true => copy(&path, &to)?,
            false => drop(fs::copy(&path, &to)?),
        }
    }
    Ok(())
}
