//! The CUDA kernels, compiled by the host's C++ compiler and run on the CPU: what each
//! `kernels/emulation/test_*.cpp` promises.
//!
//! No GPU and no CUDA toolkit is needed; without a C++20 compiler the test says so and does nothing.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const FLAGS: [&str; 7] = [
    "-std=c++20",
    "-O2",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
];

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned())
}

/// Whether there is a compiler that knows what the emulation needs.
fn compiler_is_there() -> bool {
    let probe = Command::new(compiler())
        .args(["-std=c++20", "-fsyntax-only", "-x", "c++", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut probe) = probe else { return false };
    // A compiler that has gone already says so by its status.
    let _ = probe.stdin.take().unwrap().write_all(b"#include <source_location>\nint main() {}\n");
    probe.wait().is_ok_and(|status| status.success())
}

fn test_programs() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/emulation");
    let files = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let is_test = |path: &PathBuf| {
        path.extension() == Some(OsStr::new("cpp"))
            && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("test_"))
    };
    let mut tests: Vec<_> = files.filter(is_test).collect();
    tests.sort();
    tests
}

/// What a program printed, if it did not succeed.
fn complaint(what: &str, source: &Path, output: &Output) -> Option<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).chars().take(4000).collect::<String>();
    let failed = || {
        format!(
            "{what} {}: {}\n{}{}",
            source.display(),
            output.status,
            text(&output.stdout),
            text(&output.stderr)
        )
    };
    (!output.status.success()).then(failed)
}

fn compile_and_run(source: &Path) -> Option<String> {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(source.file_stem().unwrap());
    let compiled = Command::new(compiler()).args(FLAGS).arg(source).arg("-o").arg(&program).output().unwrap();
    complaint("compiling", source, &compiled)
        .or_else(|| complaint("running", source, &Command::new(&program).output().unwrap()))
}

#[test]
fn kernels_do_on_the_cpu_what_they_promise() {
    if !compiler_is_there() {
        // Past the capture of the test runner: this must be seen.
        let message = format!("SKIPPED: no C++20 compiler ({}), CUDA kernels were not tested\n", compiler());
        std::io::stderr().write_all(message.as_bytes()).unwrap();
        return;
    }
    let tests = test_programs();
    assert!(!tests.is_empty(), "there are test programs");
    let complaints: Vec<String> = std::thread::scope(|scope| {
        let running: Vec<_> =
            tests.iter().map(|source| scope.spawn(move || compile_and_run(source))).collect();
        running.into_iter().filter_map(|test| test.join().unwrap()).collect()
    });
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
