//! `beamline inspect`: the contents of a checkpoint directory, and everything that is wrong with
//! it.
//!
//! ```text
//! layout    which files are there             as `serve` asks
//! family    config, weights, convention       by the functions of `serve`, going on after a problem
//! catalog   items and their semantic IDs      likewise
//! serve     load, start, probe, stop          the very same function as `serve`, if nothing was wrong before
//! ```
//!
//! Loading stops at the first error. This command goes on with the parts that do not depend on it,
//! so that the author of a checkpoint can fix everything at once.
//!
//! Invariant: "no problems found" means that `serve` with the same settings would now be ready.

mod findings;
mod hstu;
mod limits;
mod token_model;
mod weights;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use beamline_catalog::{Catalog, CatalogLimits, SymbolTable};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::error::ModelError;
use beamline_model::families::hstu::config::HstuConfig;
use beamline_model::families::{self, tokens};

use super::output;
use crate::registry::Registry;
use crate::runtime::{Files, LoadError, layout, sid_form};
use crate::settings::{
    AdminLayer, ByteSize, EngineLayer, Flags, HttpLayer, LimitsLayer, LogLayer, ModelLayer, Settings,
};
use findings::Findings;

/// Flags of `inspect`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Try it:
  beamline inspect DIR                      everything, and whether it would serve
  beamline inspect DIR --quick              without loading the weights
  beamline inspect DIR --verify             and compare the model with a second implementation
  beamline inspect --limits                 what the server accepts at most, and the flags that change it

The exit status is 0 when `beamline serve` with the same flags would serve this checkpoint, and 1 when it would not.")]
pub(super) struct Args {
    /// The checkpoint directory.
    #[arg(required_unless_present = "limits")]
    checkpoint: Option<PathBuf>,
    /// The convention, if it is not in the checkpoint's directory. HSTU models have none.
    #[arg(long, value_name = "FILE|PRESET", env = "BEAMLINE_CONVENTION")]
    convention: Option<String>,
    /// The catalog, if it is not in the checkpoint's directory.
    #[arg(long, value_name = "FILE", env = "BEAMLINE_CATALOG")]
    catalog: Option<PathBuf>,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    /// Check only the files: do not load the weights, and do not run the model.
    #[arg(long)]
    quick: bool,
    /// Compare the model with a second implementation in double precision, on random prompts. Takes
    /// about 12 bytes of memory and a microsecond for each parameter.
    #[arg(long, conflicts_with = "quick")]
    verify: bool,
    /// Print every limit of the server and the flag that changes it.
    #[arg(long)]
    limits: bool,
    /// Config file (TOML) of the server that will serve this checkpoint.
    #[arg(long, value_name = "FILE", env = "BEAMLINE_CONFIG")]
    config: Option<PathBuf>,
    /// Memory for all models of that server [default: three quarters of the machine's].
    #[arg(long, value_name = "SIZE", env = "BEAMLINE_MODEL_MEMORY")]
    model_memory: Option<ByteSize>,
    #[command(flatten)]
    engine: EngineLayer,
    #[command(flatten)]
    requests: LimitsLayer,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    super::warn_of_variables();
    let settings = settings(args)?;
    if args.limits {
        output::print(&limits::table(&settings))?;
    }
    let Some(checkpoint) = &args.checkpoint else { return Ok(ExitCode::SUCCESS) };
    let files = Files {
        random_weights: None,
        checkpoint: checkpoint.clone(),
        catalog: settings.model.catalog.clone(),
        convention: settings.model.convention.clone(),
    };
    let mut findings = Findings::default();
    findings.line("checkpoint", files.checkpoint.display());
    findings.layout(layout::problems(&files.checkpoint));
    if files.checkpoint.join("config.json").is_file() {
        let symbols = family(&files, settings.engine.kv_format, args.tensors, &mut findings);
        catalog(&files, symbols.as_deref(), &mut findings);
    }
    if findings.is_clean() && args.verify {
        verify(&files, &settings, &mut findings);
    }
    if findings.is_clean() && !args.quick {
        serve_once(settings, &mut findings)?;
    }
    output::print(&findings.text(args.quick))?;
    Ok(if findings.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn settings(args: &Args) -> anyhow::Result<Settings> {
    let model = ModelLayer {
        checkpoint: args.checkpoint.clone(),
        catalog: args.catalog.clone(),
        convention: args.convention.clone(),
        ..ModelLayer::default()
    };
    let flags = Flags {
        config: args.config.clone(),
        model,
        engine: args.engine.clone(),
        limits: args.requests.clone(),
        log: LogLayer::default(),
    };
    let admin = AdminLayer { model_memory: args.model_memory, ..AdminLayer::default() };
    let mut settings = Settings::resolve_server(flags, HttpLayer::default(), admin)?;
    // Other files that a server may load, keep or write are not checked.
    (settings.admin.model_root, settings.admin.state, settings.request_log) = (None, None, None);
    if let Some(disk) = &mut settings.kv_disk {
        disk.count_only = true;
    }
    if settings.model.random_weights.is_some() {
        bail!("the config file names random_weights, which are no checkpoint to inspect");
    }
    Ok(settings)
}

/// Adds config, weights and convention. Returns the meaning of semantic IDs, if it is known.
fn family(
    files: &Files,
    kv_format: KvFormat,
    list: bool,
    findings: &mut Findings,
) -> Option<Box<dyn SymbolTable>> {
    if layout::is_hstu(&files.checkpoint) {
        let examined = Checkpoint::<HstuConfig>::examine(&files.checkpoint);
        let config = examined.config.clone();
        if let Some(config) = &config {
            hstu::describe(config, kv_format, findings);
        }
        weights::describe(examined, list, findings);
        return config
            .map(|config| Box::new(crate::service::HstuSymbols::of(&config)) as Box<dyn SymbolTable>);
    }
    let examined = tokens::examine(&files.checkpoint, kv_format);
    let summary = examined.config.clone();
    if let Some(summary) = &summary {
        token_model::describe(summary, kv_format, findings);
    }
    weights::describe(examined, list, findings);
    let convention = token_model::convention(files, summary.as_ref(), findings);
    convention.map(|convention| Box::new(convention) as Box<dyn SymbolTable>)
}

/// Compares the model with its second implementation.
fn verify(files: &Files, settings: &Settings, findings: &mut Findings) {
    let cpu = Cpu::new(settings.engine.threads).map(Arc::new).map_err(ModelError::from);
    let verified = cpu.and_then(|cpu| match layout::is_hstu(&files.checkpoint) {
        true => families::hstu::verify(&Checkpoint::open_as(&files.checkpoint)?, &cpu),
        false => tokens::open(&files.checkpoint)?.verify(&cpu),
    });
    match verified {
        Ok(verified) if verified.agrees() => findings.line("verified", verified),
        Ok(verified) => findings.problem(format!("{verified}: please report this as a bug")),
        Err(error) => findings.model_error(&error),
    }
}

fn catalog(files: &Files, symbols: Option<&dyn SymbolTable>, findings: &mut Findings) {
    let Some(path) = findings.take(files.catalog().map_err(within)) else { return };
    // Without symbols, SIDs have no meaning. `beamline catalog check` checks a catalog alone.
    let Some(symbols) = symbols else { return };
    let read = Catalog::read_path(&path, symbols, &CatalogLimits::default());
    if let Some(catalog) = findings.take(read.map_err(|error| format!("{}: {error}", path.display()))) {
        findings.paragraph(&catalog.report().to_string());
        // An HSTU model has no convention.
        if let Ok(format) = files.format() {
            findings.notes(sid_form(&format, &catalog).as_slice());
        }
    }
}

/// Does everything that `serve` does up to its first request.
fn serve_once(settings: Settings, findings: &mut Findings) -> anyhow::Result<()> {
    let started = super::tokio_runtime()?
        .block_on(async { tokio::task::spawn_blocking(move || Registry::start(settings)).await });
    match started {
        Ok(Ok(registry)) => {
            let (used, limit) = registry.memory();
            let limit = limit.map_or(String::new(), |limit| format!(" of {}", ByteSize(limit)));
            findings.line("memory", format!("{}{limit}: weights, contexts and catalog", ByteSize(used)));
            // The model has answered the probe, so the result of its engine does not matter.
            let _ = registry.drain(Duration::ZERO);
        }
        Ok(Err(error)) => findings.problem(within(error)),
        Err(_) => findings.problem("loading it ends in an internal error: please report this as a bug"),
    }
    Ok(())
}

/// The error without the directory, which was named before.
fn within(error: LoadError) -> String {
    match error {
        LoadError::Model { source, .. } => source.to_string(),
        LoadError::Layout { problems, .. } => {
            problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        }
        LoadError::NoCatalog { ref path, .. } | LoadError::NoConvention(ref path) => {
            let text = error.to_string();
            text.strip_prefix(&format!("checkpoint {}: ", path.display())).unwrap_or(&text).to_owned()
        }
        other => other.to_string(),
    }
}
