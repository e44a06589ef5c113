//! Compiles the CUDA kernels, where the feature is on: one file that holds code for every architecture.

#![allow(clippy::expect_used, clippy::panic, reason = "a build script fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// Architectures with code of their own. Newer ones compile the newest intermediate code when the
/// kernels are loaded.
const ARCHITECTURES: [u32; 2] = [80, 90];

fn main() {
    // Not the folder: it holds the emulation, too, which nvcc never sees.
    for entry in std::fs::read_dir("kernels").expect("the kernels are there") {
        let path = entry.expect("the kernels are there").path();
        if path.extension().is_some_and(|extension| extension == "cu" || extension == "cuh") {
            println!("cargo:rerun-if-changed={}", path.display());
        }
    }
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-env-changed=BEAMLINE_WITHOUT_NVCC");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let kernels = out.join("kernels.fatbin");
        if std::env::var_os("BEAMLINE_WITHOUT_NVCC").is_some() {
            // For type checks: what is built opens no GPU, and says why.
            std::fs::write(&kernels, []).expect("the folder of this build can be written");
        } else {
            compile(Path::new("kernels/all.cu"), &kernels);
        }
    }
}

fn compile(source: &Path, to: &Path) {
    let nvcc = match std::env::var_os("CUDA_HOME") {
        Some(home) => PathBuf::from(home).join("bin/nvcc"),
        None => PathBuf::from("nvcc"),
    };
    let newest = ARCHITECTURES[ARCHITECTURES.len() - 1];
    let mut command = Command::new(&nvcc);
    command.args(["-std=c++17", "-O3", "--fatbin", "-lineinfo"]);
    for architecture in ARCHITECTURES {
        command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
    }
    command.arg(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    command.arg("-o").arg(to).arg(source);
    let status = command.status().unwrap_or_else(|error| {
        panic!(
            "the feature `cuda` needs nvcc, of CUDA 12.8 or newer: {}: {error}; set CUDA_HOME, or BEAMLINE_WITHOUT_NVCC=1 for a type check",
            nvcc.display()
        )
    });
    assert!(status.success(), "{command:?} failed");
}
