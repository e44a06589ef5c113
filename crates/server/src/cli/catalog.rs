//! `beamline catalog check`: reads a catalog as a server would, and reports its shape or everything that is wrong.
//! `beamline catalog push`, `patch`, `list`, `rollback`: the catalogs of a running server.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use beamline_catalog::{Catalog, CatalogError, CatalogLimits, SymbolTable, WrittenSymbols};
use beamline_model::checkpoint::config::Config;
use beamline_model::checkpoint::file::{MAX_CONFIG_BYTES, read_text};
use beamline_model::convention::Convention;
use serde_json::{Value, json};

use super::client::{self, Payload, ServerArgs};
use super::output;
use crate::api::{self, CatalogPatch};
use crate::runtime::Files;

/// Bad records that are listed.
const LISTED: usize = 100;

/// What to do with a catalog.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Check a catalog file: items, SIDs, collisions, branching per level, memory; or every bad line by its number.
    Check(Check),
    /// Replace the catalog of a running server: it is checked there beside the old one, and new requests get it at once.
    Push(Push),
    /// Add, remove and retag items of a running server's catalog, all or nothing.
    Patch(Patch),
    /// The catalogs of a running server: the one that serves, and earlier ones that are kept.
    List(List),
    /// Go back to a catalog that is kept.
    Rollback(Rollback),
}

/// Flags of `catalog patch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The patch is {\"add\": [{\"item_id\", \"sid\", \"tags\", \"title\"}], \"remove\": [\"i7\"], \"retag\": [{\"item_id\", \"tags\"}]}, each part if
there is one. Items are removed, then retagged, then added.

  beamline catalog patch patch.json --model shop
  beamline catalog patch --remove i7 --remove i9 --model shop")]
pub(super) struct Patch {
    /// The changes, .json.
    #[arg(required_unless_present = "remove")]
    file: Option<PathBuf>,
    /// An item to remove; may be given several times.
    #[arg(long, value_name = "ITEM")]
    remove: Vec<String>,
    /// Whose catalog: a model, for the version that `stable` points at, or model@label, or model@version.
    #[arg(long, value_name = "NAME")]
    model: String,
    #[command(flatten)]
    server: ServerArgs,
}

/// Flags of `catalog list`.
#[derive(Debug, clap::Args)]
pub(super) struct List {
    /// Whose catalogs: a model, model@label, or model@version.
    #[arg(long, value_name = "NAME")]
    model: String,
    /// Print the server's answer as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// Flags of `catalog rollback`.
#[derive(Debug, clap::Args)]
pub(super) struct Rollback {
    /// The version to go back to, as `catalog list` names it.
    version: String,
    /// Whose catalog: a model, model@label, or model@version.
    #[arg(long, value_name = "NAME")]
    model: String,
    #[command(flatten)]
    server: ServerArgs,
}

/// Flags of `catalog push`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Try it:
  beamline catalog push catalog.jsonl --model shop
  beamline catalog push catalog.jsonl --model shop@canary --server http://127.0.0.1:8080 --admin-key-file key")]
pub(super) struct Push {
    /// The catalog, .jsonl.
    file: PathBuf,
    /// Whose catalog: a model, for the version that `stable` points at, or model@label, or model@version.
    #[arg(long, value_name = "NAME")]
    model: String,
    #[command(flatten)]
    server: ServerArgs,
}

/// Flags of `catalog check`.
#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// The catalog, .jsonl or .parquet.
    file: PathBuf,
    /// Also check every SID against the convention and tokenizer of this checkpoint.
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// The convention, if it does not lie beside the checkpoint.
    #[arg(long, value_name = "FILE|PRESET", requires = "checkpoint")]
    convention: Option<String>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Check(args) => check(args),
        Command::Push(args) => push(&args),
        Command::Patch(args) => patch(&args),
        Command::List(args) => list(&args),
        Command::Rollback(args) => roll_back(&args),
    }
}

fn push(args: &Push) -> anyhow::Result<ExitCode> {
    let path = format!("/v1/models/{}/catalog", client::reference(&args.model)?);
    let extension = args.file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let other = match extension.to_ascii_lowercase().as_str() {
        "parquet" => Some("Parquet"),
        "json" => Some("one JSON object"),
        "csv" => Some("CSV"),
        _ => None,
    };
    if let Some(other) = other {
        bail!(
            "{}: a server takes catalogs as JSON lines, an item per line, not as {other}",
            args.file.display()
        );
    }
    let lines = std::fs::read(&args.file).with_context(|| format!("cannot read {}", args.file.display()))?;
    say(&args.model, &args.server.call("PUT", &path, Payload::Lines(&lines))?)
}

fn patch(args: &Patch) -> anyhow::Result<ExitCode> {
    let path = format!("/v1/models/{}/catalog", client::reference(&args.model)?);
    let mut patch = match &args.file {
        Some(file) => {
            let text = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            api::parse::<CatalogPatch>(&text).with_context(|| format!("{} is no patch", file.display()))?
        }
        None => CatalogPatch::default(),
    };
    patch.remove.extend(args.remove.iter().cloned());
    say(&args.model, &args.server.call("PATCH", &path, Payload::Json(serde_json::to_value(patch)?))?)
}

fn list(args: &List) -> anyhow::Result<ExitCode> {
    let path = format!("/v1/models/{}/catalog", client::reference(&args.model)?);
    let answer = args.server.call("GET", &path, Payload::None)?;
    if args.json {
        output::print(&(serde_json::to_string_pretty(&answer)? + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let row = |one: &Value| {
        let state = if one["version"] == answer["current"] { "serves" } else { "kept" };
        vec![text(&one["version"]), one["items"].to_string(), state.to_owned()]
    };
    let rows: Vec<_> = answer["versions"].as_array().into_iter().flatten().map(row).collect();
    output::print(&output::table(&["catalog", "items", "state"], &[false, true, false], &rows))?;
    Ok(ExitCode::SUCCESS)
}

fn roll_back(args: &Rollback) -> anyhow::Result<ExitCode> {
    let path = format!("/v1/models/{}/catalog/rollback", client::reference(&args.model)?);
    let version = json!({"version": args.version});
    say(&args.model, &args.server.call("POST", &path, Payload::Json(version))?)
}

/// What serves after a change.
fn say(model: &str, answer: &Value) -> anyhow::Result<ExitCode> {
    let current = &answer["current"];
    let items = answer["versions"].as_array().into_iter().flatten().find(|one| one["version"] == *current);
    let items = items.map_or("?".into(), |one| one["items"].to_string());
    output::print(&format!("{model} serves catalog {}, {items} items\n", text(current)))?;
    Ok(ExitCode::SUCCESS)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("?").to_owned()
}

fn check(args: Check) -> anyhow::Result<ExitCode> {
    let limits = CatalogLimits { max_listed_problems: LISTED, ..CatalogLimits::default() };
    let catalog = match &args.checkpoint {
        Some(checkpoint) => {
            let files = Files {
                checkpoint: checkpoint.clone(),
                random_weights: None,
                catalog: None,
                convention: args.convention.clone(),
            };
            read(&args, &convention(&files)?, &limits)
        }
        None => {
            WrittenSymbols::scan_path(&args.file, &limits).and_then(|symbols| read(&args, &symbols, &limits))
        }
    };
    let report = catalog.with_context(|| format!("{} cannot be served", args.file.display()))?.report();
    if args.json {
        output::print(&(serde_json::to_string_pretty(&report)? + "\n"))?;
    } else {
        output::print(&report.to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn read(args: &Check, symbols: &dyn SymbolTable, limits: &CatalogLimits) -> Result<Catalog, CatalogError> {
    Catalog::read_path(&args.file, symbols, limits)
}

/// The convention of a checkpoint, without its weights.
fn convention(files: &Files) -> anyhow::Result<Convention> {
    let path = files.checkpoint.join("config.json");
    let vocab_size = Config::parse(&read_text(&path, MAX_CONFIG_BYTES)?)?.vocab_size;
    Ok(Convention::bind(files.format()?, &files.checkpoint, vocab_size)?)
}
