//! `beamline inspect`: what is in a checkpoint directory, and everything that is wrong with it.
//!
//! Loading stops at the first error; this goes on with what does not depend on it, so that whoever made the checkpoint
//! can fix all of it at once.
//!
//! `decoder` and `hstu` know what is special to a family.

mod decoder;
mod hstu;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use beamline_catalog::{Catalog, CatalogLimits, SymbolTable};
use beamline_model::checkpoint::Checkpoint;
use beamline_model::checkpoint::tensors::Tensors;
use beamline_model::cpu::pages::PAGE_SIZE;
use beamline_model::error::ModelError;
use beamline_model::families::hstu::config::HstuConfig;

use super::output;
use crate::runtime::{Files, LoadError};
use crate::settings::ByteSize;

/// Flags of `inspect`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The checkpoint directory.
    checkpoint: PathBuf,
    /// The convention, if it does not lie beside the checkpoint. HSTU models have none.
    #[arg(long, value_name = "FILE|PRESET")]
    convention: Option<String>,
    /// The catalog, if it does not lie beside the checkpoint.
    #[arg(long, value_name = "FILE")]
    catalog: Option<PathBuf>,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
}

/// What is found on the way.
#[derive(Default)]
struct Findings {
    text: String,
    problems: Vec<String>,
}

impl Findings {
    fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "{name:<13} {value}");
    }

    /// Keeps what went well, or notes what went wrong.
    fn take<T, E: std::fmt::Display>(&mut self, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.problems.push(error.to_string())).ok()
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut findings = Findings::default();
    let files = Files {
        random_weights: None,
        checkpoint: args.checkpoint.clone(),
        catalog: args.catalog.clone(),
        convention: args.convention.clone(),
    };
    findings.line("checkpoint", files.checkpoint.display());
    let path = files.checkpoint.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|source| ModelError::Read { path, source });
    let text = findings.take(text);
    // Without config.json it is taken for a decoder, as most are.
    if text.as_deref().is_some_and(HstuConfig::is_hstu) {
        let config = text.and_then(|text| hstu::config(&text, &mut findings));
        weights(&files, config.as_ref().map(hstu::tensors), args.tensors, &mut findings);
        let digest = Checkpoint::<HstuConfig>::open_as(&files.checkpoint);
        sha256(digest.as_ref().ok().map(Checkpoint::digest), &mut findings);
        let symbols = config.as_ref().map(crate::service::HstuSymbols::of);
        catalog(&files, symbols.as_ref().map(|symbols| symbols as &dyn SymbolTable), &mut findings);
    } else {
        let config = text.and_then(|text| decoder::config(&text, &mut findings));
        weights(&files, config.as_ref().map(decoder::tensors), args.tensors, &mut findings);
        sha256(Checkpoint::open(&files.checkpoint).as_ref().ok().map(Checkpoint::digest), &mut findings);
        let convention = decoder::convention(&files, config.as_ref(), &mut findings);
        catalog(&files, convention.as_ref().map(|symbols| symbols as &dyn SymbolTable), &mut findings);
    }

    let Findings { mut text, problems } = findings;
    if problems.is_empty() {
        text.push_str("\nno problems found\n");
    } else {
        let _ = writeln!(text, "\n{} problem{}:", problems.len(), if problems.len() == 1 { "" } else { "s" });
        for problem in &problems {
            let _ = writeln!(text, "- {}", problem.replace('\n', "\n  "));
        }
    }
    output::print(&text)?;
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Names and shapes that a configuration expects, and names that may be there.
struct Expected {
    shapes: BTreeMap<String, Vec<usize>>,
    optional: Vec<&'static str>,
}

/// What is in the files, and whether it is what the configuration expects.
fn weights(files: &Files, expected: Option<Expected>, list: bool, findings: &mut Findings) {
    let Some(tensors) = findings.take(Tensors::open(&files.checkpoint)) else { return };
    findings.line("weights", format!("{} in {}", ByteSize(tensors.bytes()), tensors.files().join(", ")));
    findings.line("parameters", format!("{} in {} tensors", tensors.parameters(), tensors.entries().len()));
    let mut dtypes: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for entry in tensors.entries().values() {
        let count = dtypes.entry(format!("{:?}", entry.dtype)).or_default();
        count.0 += 1;
        count.1 += entry.shape.iter().product::<usize>();
    }
    for (dtype, (tensors, values)) in dtypes {
        findings.line("", format!("{dtype}: {tensors} tensors, {values} values"));
    }
    if list {
        for (name, entry) in tensors.entries() {
            findings.line("", format!("{name} {:?} {:?}", entry.shape, entry.dtype));
        }
    }
    if let Some(Expected { shapes, optional }) = expected {
        match tensors.check(&shapes, &optional) {
            Ok(()) => {}
            Err(ModelError::Mismatch(problems)) => findings.problems.extend(problems),
            Err(error) => findings.problems.push(error.to_string()),
        }
    }
    for name in tensors.entries().keys() {
        if let Err(error @ ModelError::NotFinite { .. }) = tensors.load(name) {
            findings.problems.push(error.to_string());
        }
    }
}

/// Of a checkpoint that could be opened; what is wrong with the others is told elsewhere.
fn sha256(digest: Option<&str>, findings: &mut Findings) {
    if let Some(digest) = digest {
        findings.line("sha256", digest);
    }
}

fn kv_memory(page_bytes: usize, findings: &mut Findings) {
    findings.line("KV memory", format!("{} per {PAGE_SIZE} context tokens", ByteSize(page_bytes)));
}

fn catalog(files: &Files, symbols: Option<&dyn SymbolTable>, findings: &mut Findings) {
    // Without symbols the SIDs mean nothing; `beamline catalog check` looks at a catalog alone.
    let Some(symbols) = symbols else { return };
    let path = match files.catalog() {
        Ok(path) => path,
        Err(_) => {
            findings.line("catalog", "none beside the checkpoint; name one with --catalog when serving");
            return;
        }
    };
    let read = Catalog::read_path(&path, symbols, &CatalogLimits::default());
    if let Some(catalog) = findings.take(read.map_err(|error| format!("{}: {error}", path.display()))) {
        let _ = write!(findings.text, "\n{}", catalog.report());
    }
}

/// Without the directory, which was named above.
fn within(error: LoadError) -> String {
    match error {
        LoadError::Model { source, .. } => source.to_string(),
        other => other.to_string(),
    }
}
