//! `beamline inspect`: what is in a checkpoint directory, and everything that is wrong with it.
//!
//! Loading stops at the first error; this goes on with what does not depend on it, so that whoever made the checkpoint
//! can fix all of it at once.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use beamline_catalog::{Catalog, CatalogLimits};
use beamline_model::checkpoint::Checkpoint;
use beamline_model::checkpoint::config::Config;
use beamline_model::checkpoint::tensors::Tensors;
use beamline_model::convention::Convention;
use beamline_model::convention::format::Format;
use beamline_model::cpu::pages::{PAGE_SIZE, PageStore};
use beamline_model::error::ModelError;
use beamline_model::families::qwen::expected_tensors;

use super::output;
use crate::runtime::{Files, LoadError};
use crate::settings::ByteSize;

/// Tensors that a tied model may store and nobody reads.
const IGNORED_WHEN_TIED: [&str; 1] = ["lm_head.weight"];

/// Flags of `inspect`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The checkpoint directory.
    checkpoint: PathBuf,
    /// The convention, if it does not lie beside the checkpoint.
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
        checkpoint: args.checkpoint.clone(),
        catalog: args.catalog.clone(),
        convention: args.convention.clone(),
    };
    findings.line("checkpoint", files.checkpoint.display());
    let config = config(&files, &mut findings);
    weights(&files, config.as_ref(), args.tensors, &mut findings);
    let convention = convention(&files, config.as_ref(), &mut findings);
    catalog(&files, convention.as_ref(), &mut findings);

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

fn config(files: &Files, findings: &mut Findings) -> Option<Config> {
    let path = files.checkpoint.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|source| ModelError::Read { path, source });
    let config = findings.take(text.and_then(|text| Config::parse(&text)))?;
    findings.line("architecture", config.architecture.name());
    findings.line(
        "sizes",
        format!(
            "{} layers, hidden {}, feed-forward {}, {} heads of {} over {} key-value heads",
            config.layers,
            config.hidden_size,
            config.intermediate_size,
            config.heads,
            config.head_dim,
            config.kv_heads
        ),
    );
    let head = if config.tied_head { "tied" } else { "untied" };
    findings.line("vocabulary", format!("{} rows, {head} output matrix", config.vocab_size));
    findings.line("positions", config.max_positions);
    let page = PageStore::bytes_per_page(config.layers, config.kv_heads, config.head_dim);
    findings.line("KV memory", format!("{} per {PAGE_SIZE} context tokens", ByteSize(page)));
    Some(config)
}

fn weights(files: &Files, config: Option<&Config>, list: bool, findings: &mut Findings) {
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
    if let Some(config) = config {
        let ignored: &[&str] = if config.tied_head { &IGNORED_WHEN_TIED } else { &[] };
        match tensors.check(&expected_tensors(config), ignored) {
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
    // What is wrong with the files was told above.
    if let Ok(checkpoint) = Checkpoint::open(&files.checkpoint) {
        findings.line("sha256", checkpoint.digest());
    }
}

fn convention(files: &Files, config: Option<&Config>, findings: &mut Findings) -> Option<Convention> {
    let format: Format = findings.take(files.format().map_err(within))?;
    findings.line("SID", format.level_token_patterns.join(" "));
    findings
        .line("codes", format.level_code_counts.iter().map(u32::to_string).collect::<Vec<_>>().join(", "));
    // Without config.json the vocabulary's size is unknown; the tokenizer can be looked at all the same.
    let vocab_size = config.map_or(format.vocab_size.unwrap_or(usize::MAX), |config| config.vocab_size);
    let convention = findings.take(Convention::bind(format, &files.checkpoint, vocab_size))?;
    findings.line("generated", format!("{} tokens per item", convention.steps().len()));
    match convention.prompt(std::iter::empty::<&[u32]>()) {
        Ok(prompt) => findings.line(
            "prompt",
            format!("{} tokens without items, {} more per item", prompt.len(), convention.tokens_per_item()),
        ),
        Err(error) => findings.problems.push(error.to_string()),
    }
    Some(convention)
}

fn catalog(files: &Files, convention: Option<&Convention>, findings: &mut Findings) {
    // Without a convention the SIDs mean nothing; `beamline catalog check` looks at a catalog alone.
    let Some(convention) = convention else { return };
    let path = match files.catalog() {
        Ok(path) => path,
        Err(_) => {
            findings.line("catalog", "none beside the checkpoint; name one with --catalog when serving");
            return;
        }
    };
    let read = Catalog::read_path(&path, convention, &CatalogLimits::default());
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
