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
use beamline_model::checkpoint::config::Config;
use beamline_model::checkpoint::described::Described;
use beamline_model::checkpoint::file::{MAX_CONFIG_BYTES, read_text};
use beamline_model::checkpoint::tensors::Tensors;
use beamline_model::checkpoint::{Checkpoint, Examined};
use beamline_model::cpu::pages::PAGE_SIZE;
use beamline_model::error::ModelError;
use beamline_model::escaped::Escaped;
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
    notes: Vec<String>,
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
    // What is wrong with it is told below.
    let text = read_text(&files.checkpoint.join("config.json"), MAX_CONFIG_BYTES).ok();
    // Without config.json it is taken for a decoder, as most are.
    if text.as_deref().is_some_and(HstuConfig::is_hstu) {
        let config = text.and_then(|text| hstu::config(&text, &mut findings));
        weights::<HstuConfig>(&files, args.tensors, &mut findings);
        let symbols = config.as_ref().map(crate::service::HstuSymbols::of);
        catalog(&files, symbols.as_ref().map(|symbols| symbols as &dyn SymbolTable), &mut findings);
    } else {
        let config = text.and_then(|text| decoder::config(&text, &mut findings));
        weights::<Config>(&files, args.tensors, &mut findings);
        let convention = decoder::convention(&files, config.as_ref(), &mut findings);
        catalog(&files, convention.as_ref().map(|symbols| symbols as &dyn SymbolTable), &mut findings);
    }

    let Findings { mut text, problems, notes } = findings;
    if !notes.is_empty() {
        text.push_str("\nworth knowing:\n");
        notes.iter().for_each(|note| text.push_str(&format!("- {note}\n")));
    }
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

/// What is in the files, and all that is wrong with them.
fn weights<C: Described>(files: &Files, list: bool, findings: &mut Findings) {
    let Examined { tensors, digest, problems, notes, .. } = Checkpoint::<C>::examine(&files.checkpoint);
    if let Some(tensors) = &tensors {
        describe(tensors, list, findings);
    }
    if let Some(digest) = digest {
        findings.line("sha256", digest);
    }
    for problem in problems {
        match problem {
            ModelError::Mismatch(problems) => findings.problems.extend(problems),
            other => findings.problems.push(other.to_string()),
        }
    }
    findings.notes.extend(notes.iter().map(ToString::to_string));
}

fn describe(tensors: &Tensors, list: bool, findings: &mut Findings) {
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
            findings.line("", format!("{} {:?} {:?}", Escaped(name), entry.shape, entry.dtype));
        }
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
