//! Packs what checks and times the CUDA engine on a machine that has a GPU and no toolkit: test and bench binaries, the
//! fixtures, the baselines, and a script that runs them, correctness first.
//!
//! Building needs nvcc, not a GPU. The bundle needs a driver, the CUDA 13 libraries and python3, and for the baselines PyTorch.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{cargo, root, run};

/// Most bytes of a bundle.
const MOST_BYTES: u64 = 30_000_000;
/// Targets whose executables go along.
const EXECUTABLES: [&str; 3] = ["cuda", "gpu_bench", "beamline"];

/// Flags of `gpu`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the bundle goes; what is there is replaced.
    #[arg(long, default_value = "target/gpu-bundle")]
    out: PathBuf,
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
    copy(&root().join("fixtures/hf"), &staging.join("fixtures"))?;
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
    Ok(())
}

/// Builds with CUDA, in a target folder of its own so that candle's kernels stay built.
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
