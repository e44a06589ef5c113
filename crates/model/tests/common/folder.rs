//! Where fixtures lie, which cases there are, and how close a case must come.
//!
//! Conformance tests take their folder from `BEAMLINE_CONFORMANCE`, so that anyone can run them on other
//! fixtures of the same format; by default it is the repository's. Cases that the folder lacks, and
//! families that are not served, are skipped loudly.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]

use std::path::{Path, PathBuf};

use serde_json::Value;

/// Architectures that are decoders of semantic IDs here.
const SERVED: [&str; 3] = ["Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM"];
/// The encoder-decoder of semantic IDs.
const ENCODER_DECODER: &str = "T5ForConditionalGeneration";

/// The repository's fixtures; `BEAMLINE_FIXTURES` says where they are on a machine without a checkout.
pub fn repository() -> PathBuf {
    let of_checkout = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    std::env::var_os("BEAMLINE_FIXTURES").map_or_else(of_checkout, PathBuf::from)
}

/// The fixtures of conformance tests.
pub fn conformance() -> PathBuf {
    let folder = std::env::var_os("BEAMLINE_CONFORMANCE").map_or_else(repository, PathBuf::from);
    assert!(folder.is_dir(), "{} is no folder; BEAMLINE_CONFORMANCE names one", folder.display());
    folder
}

/// The file or folder of this name among the conformance fixtures; where there is none, says so.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = conformance().join(name);
    if !path.exists() {
        skipped(&format!("{} does not exist", path.display()));
        return None;
    }
    Some(path)
}

/// Says that something was not checked. Shown with `--nocapture`, and whenever a test fails.
pub fn skipped(what: &str) {
    eprintln!("SKIPPED: {what}");
}

pub fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Folders below a family's folder that hold this file, in order of their names.
fn cases_with(family: &str, file: &str) -> Vec<PathBuf> {
    let Some(folder) = find(family) else { return Vec::new() };
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut cases: Vec<PathBuf> = entries.filter(|path| path.join(file).exists()).collect();
    cases.sort();
    cases
}

/// Checkpoints of semantic-ID decoders, `hf/<case>`; those of families that are not served are left out.
pub fn decoders() -> Vec<PathBuf> {
    of_architectures(&SERVED)
}

/// Checkpoints that read tokens, of every family that is served, `hf/<case>`.
pub fn token_models() -> Vec<PathBuf> {
    let mut all = decoders();
    all.extend(encoder_decoders());
    all
}

/// Checkpoints of encoder-decoders of semantic IDs, `hf/<case>`.
pub fn encoder_decoders() -> Vec<PathBuf> {
    of_architectures(&[ENCODER_DECODER])
}

fn of_architectures(wanted: &[&str]) -> Vec<PathBuf> {
    let mut cases = cases_with("hf", "convention.json");
    cases.retain(|case| {
        let architecture = architecture(case);
        if !SERVED.contains(&architecture.as_str()) && architecture != ENCODER_DECODER {
            skipped(&format!("{}: {architecture} is not served", case.display()));
        }
        wanted.contains(&architecture.as_str())
    });
    cases
}

/// Checkpoints with settings that a loader may not know, `hf-variants/<case>`.
pub fn variants() -> Vec<PathBuf> {
    cases_with("hf-variants", "cases.json")
}

/// What config.json calls the architecture.
pub fn architecture(case: &Path) -> String {
    read_json(&case.join("config.json"))["architectures"][0].as_str().unwrap_or_default().to_owned()
}

/// How far single precision may be from double: a value that suits a model of a few layers, or ten times
/// the error of the fixture's own single precision, whichever is more.
pub fn tolerance(least: f64, measured: &Value) -> f64 {
    least.max(10.0 * measured.as_f64().unwrap_or(0.0))
}
