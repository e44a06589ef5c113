//! `beamline catalog check`: reads a catalog as a server would, and reports its shape or everything
//! that is wrong. `beamline catalog push`, `patch`, `list`, `rollback`: the catalogs of a running
//! server.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use beamline_catalog::{Catalog, CatalogError, CatalogLimits, SymbolTable, WrittenSymbols};
use serde_json::{Value, json};

use super::client::{self, ModelFlag, Payload, ServerArgs};
use super::output;
use crate::api::{self, CatalogPatch};
use crate::runtime::Files;

/// Most bad records that are listed.
const LISTED: usize = 100;

/// Subcommands for catalogs.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Check a catalog file: items, SIDs, collisions, branching per level, memory; or list every
    /// bad line.
    Check(Check),
    /// Replace the catalog of a running server. It is checked there beside the old one; then new
    /// requests use it.
    Push(Push),
    /// Add, remove and retag items of a running server's catalog, all or nothing.
    Patch(Patch),
    /// List the catalogs of a running server: the one that serves, and earlier ones that are kept.
    List(List),
    /// Go back to an earlier catalog that is kept.
    Rollback(Rollback),
}

/// Flags of `catalog patch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The patch is {\"add\": [{\"item_id\", \"sid\", \"tags\", \"title\"}], \"remove\": [\"i7\"], \"retag\": [{\"item_id\", \"tags\"}]}, each part if
there is one. Items are removed, then retagged, then added. An item that is removed is also unknown in histories: to stop
selling an item that people have bought, retag it, and ask with forbid_tags.

  beamline catalog patch shop patch.json
  beamline catalog patch shop --remove i7 --remove i9")]
pub(super) struct Patch {
    /// The model (shop, shop@canary, or shop@version), then a .json file with the changes.
    #[arg(value_names = ["MODEL", "FILE"], num_args = 0..=2)]
    words: Vec<String>,
    /// An item to remove. May be given several times.
    #[arg(long, value_name = "ITEM")]
    remove: Vec<String>,
    #[command(flatten)]
    model: ModelFlag,
    #[command(flatten)]
    server: ServerArgs,
}

/// Flags of `catalog list`.
#[derive(Debug, clap::Args)]
pub(super) struct List {
    /// The model: shop, for the version that its label stable points at, or shop@canary, or
    /// shop@version.
    #[arg(value_name = "MODEL", num_args = 0..=1)]
    words: Vec<String>,
    #[command(flatten)]
    model: ModelFlag,
    /// Print the server's answer as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// Flags of `catalog rollback`.
#[derive(Debug, clap::Args)]
pub(super) struct Rollback {
    /// The model (shop, shop@canary, or shop@version), then the catalog version, as `catalog list`
    /// shows it.
    #[arg(value_names = ["MODEL", "VERSION"], num_args = 0..=2)]
    words: Vec<String>,
    #[command(flatten)]
    model: ModelFlag,
    #[command(flatten)]
    server: ServerArgs,
}

/// Flags of `catalog push`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Try it:
  beamline catalog push shop catalog.jsonl
  beamline catalog push shop@canary catalog.jsonl --server http://127.0.0.1:8080 --admin-key-file key")]
pub(super) struct Push {
    /// The model (shop, shop@canary, or shop@version), then the catalog file, .jsonl.
    #[arg(value_names = ["MODEL", "FILE"], num_args = 0..=2)]
    words: Vec<String>,
    #[command(flatten)]
    model: ModelFlag,
    #[command(flatten)]
    server: ServerArgs,
}

/// Flags of `catalog check`.
#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// The catalog, .jsonl or .parquet.
    file: PathBuf,
    /// Also check every SID against the convention and tokenizer of this checkpoint, and print the
    /// catalog version that a server would show [default: the directory of the file, if it holds a
    /// config.json].
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// The convention, if it is not in the checkpoint's directory.
    #[arg(long, value_name = "FILE|PRESET")]
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
    let (model, [file]) =
        args.model.split(&args.words, ["FILE"], "beamline catalog push shop catalog.jsonl")?;
    let path = format!("/v1/models/{}/catalog", client::reference(model)?);
    let extension = Path::new(file).extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let other = match extension.to_ascii_lowercase().as_str() {
        "parquet" => Some("Parquet"),
        "json" => Some("one JSON object"),
        "csv" => Some("CSV"),
        _ => None,
    };
    if let Some(other) = other {
        bail!("{file}: a server takes catalogs as JSON lines, an item per line, not as {other}");
    }
    let lines = std::fs::read(file).with_context(|| format!("cannot read {file}"))?;
    say(model, &args.server.call("PUT", &path, Payload::Lines(&lines))?)
}

fn patch(args: &Patch) -> anyhow::Result<ExitCode> {
    let (model, file) = match args.remove.is_empty() {
        true => {
            let usage = "beamline catalog patch shop patch.json";
            let (model, [file]) = args.model.split(&args.words, ["FILE"], usage)?;
            (model, Some(file))
        }
        // With items to remove, a file is optional.
        false => {
            let usage = "beamline catalog patch shop --remove i7";
            match args.model.split(&args.words, ["FILE"], usage) {
                Ok((model, [file])) => (model, Some(file)),
                Err(_) => (args.model.split(&args.words, [], usage)?.0, None),
            }
        }
    };
    let path = format!("/v1/models/{}/catalog", client::reference(model)?);
    let mut patch = match file {
        Some(file) => {
            let text = std::fs::read(file).with_context(|| format!("cannot read {file}"))?;
            api::parse::<CatalogPatch>(&text).map_err(|error| anyhow!("{file} is not a patch: {error}"))?
        }
        None => CatalogPatch::default(),
    };
    patch.remove.extend(args.remove.iter().cloned());
    say(model, &args.server.call("PATCH", &path, Payload::Json(serde_json::to_value(patch)?))?)
}

fn list(args: &List) -> anyhow::Result<ExitCode> {
    let (model, []) = args.model.split(&args.words, [], "beamline catalog list shop")?;
    let path = format!("/v1/models/{}/catalog", client::reference(model)?);
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
    let usage = "beamline catalog rollback shop 0011223344556677";
    let (model, [version]) = args.model.split(&args.words, ["VERSION"], usage)?;
    let path = format!("/v1/models/{}/catalog/rollback", client::reference(model)?);
    say(model, &args.server.call("POST", &path, Payload::Json(json!({"version": version})))?)
}

/// Prints which catalog serves after a change.
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
    let checkpoint = args.checkpoint.clone().or_else(|| around(&args.file));
    let catalog = match &checkpoint {
        Some(checkpoint) => {
            let convention = args.convention.clone();
            let files =
                Files { checkpoint: checkpoint.clone(), random_weights: None, catalog: None, convention };
            read(&args, &*files.symbols()?, &limits)
        }
        None => {
            WrittenSymbols::scan_path(&args.file, &limits).and_then(|symbols| read(&args, &symbols, &limits))
        }
    };
    let catalog = catalog.map_err(|error| {
        let (name, text) = (args.file.display().to_string(), error.to_string());
        // An error of reading already names the file.
        if text.contains(&name) { anyhow!("{text}") } else { anyhow!("{name} cannot be served: {text}") }
    })?;
    let report = catalog.report();
    if args.json {
        let mut json = serde_json::to_value(&report)?;
        if checkpoint.is_none() {
            // The version depends on the tokens of a checkpoint. Without a checkpoint, no version
            // would match that of a server.
            json["version"] = Value::Null;
        }
        output::print(&(serde_json::to_string_pretty(&json)? + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let text = report.to_string();
    match checkpoint {
        Some(checkpoint) => output::print(&format!("{text}  as served with {}\n", checkpoint.display()))?,
        None => {
            let name = args.file.display();
            let rest = text.split_once('\n').map_or("", |(_, rest)| rest);
            output::print(&format!(
                "catalog {name}\n{rest}  not checked against a model: name one with --checkpoint DIR, which gives the version too\n"
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The directory of the checkpoint that contains a catalog, if there is one.
fn around(file: &Path) -> Option<PathBuf> {
    let folder = match file.parent()? {
        parent if parent.as_os_str().is_empty() => Path::new("."),
        parent => parent,
    };
    folder.join("config.json").is_file().then(|| folder.to_owned())
}

fn read(args: &Check, symbols: &dyn SymbolTable, limits: &CatalogLimits) -> Result<Catalog, CatalogError> {
    Catalog::read_path(&args.file, symbols, limits)
}
