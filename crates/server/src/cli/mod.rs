//! The command line: its subcommands, and how their errors are reported.
//!
//! Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed or problems found,
//! 2 wrong usage.

mod batch;
mod catalog;
mod client;
mod completions;
mod demo;
mod files;
mod in_flight;
mod inspect;
mod lines;
mod models;
mod output;
mod recommend;
mod replay;
mod report;
mod serve;
mod signals;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};

use crate::logging;
use crate::settings::{LogSettings, environment};

#[doc(hidden)]
pub use batch::parquet_rows;

/// Threads that read and write HTTP. The forward pass has its own threads.
const IO_THREADS: usize = 2;
/// Version, commit and features, for bug reports.
#[cfg(feature = "cuda")]
const VERSION: &str =
    concat!(env!("CARGO_PKG_VERSION"), " (commit ", env!("BEAMLINE_COMMIT"), ", with CUDA)");
/// Version, commit and features, for bug reports.
#[cfg(not(feature = "cuda"))]
const VERSION: &str =
    concat!(env!("CARGO_PKG_VERSION"), " (commit ", env!("BEAMLINE_COMMIT"), ", without CUDA)");
/// The subcommand that runs when none is named.
const DEFAULT_COMMAND: &str = "demo";
/// Exit code of a command line that cannot be parsed.
const WRONG_USAGE: u8 = 2;

/// Serves generative recommenders: give it a checkpoint in Hugging Face layout and an item catalog,
/// send it a user's history, get items, ranked.
///
/// Without a subcommand it serves the demo, with any flags of `beamline demo`.
#[derive(Debug, Parser)]
#[command(
    name = "beamline",
    version = VERSION,
    after_help = "\
Start here:
  beamline                                          serve the demo, and print a request to try
  beamline inspect DIR                              what is in a checkpoint, and what is wrong with it
  beamline serve --checkpoint DIR                   serve your own
  beamline recommend --checkpoint DIR --history a,b one request, answered as a table
  beamline models list                              what a running server has loaded

Every flag has an environment twin (--max-beam-width is BEAMLINE_MAX_BEAM_WIDTH) and a key in the config file
(--config FILE). A flag wins over the environment, the environment over the file."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a checkpoint over HTTP.
    Serve(serve::Args),
    /// Serve the demo: a small trained model over a made-up shop.
    Demo(demo::Args),
    /// Ask for items once and print them as a table.
    Recommend(recommend::Args),
    /// Answer a file of requests, in order.
    Batch(batch::Args),
    /// Answer a request log again and compare bit for bit.
    Replay(replay::Args),
    /// Show what is in a checkpoint, and everything that is wrong with it.
    Inspect(inspect::Args),
    /// Work with catalogs.
    #[command(subcommand)]
    Catalog(catalog::Command),
    /// See and change what a running server has loaded.
    #[command(subcommand)]
    Models(models::Command),
    /// Print a script that completes commands and flags in your shell.
    Completions(completions::Args),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(with_default_command(std::env::args_os())) {
        Ok(cli) => cli,
        // Help and the version are no errors, and go to stdout.
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => {
            report::line(report::usage(&error).trim_end());
            return ExitCode::from(WRONG_USAGE);
        }
    };
    let result = match cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Recommend(args) => recommend::run(args),
        Command::Batch(args) => batch::run(args),
        Command::Replay(args) => replay::run(args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Catalog(command) => catalog::run(command),
        Command::Models(command) => models::run(command),
        Command::Completions(args) => completions::run(&args),
    };
    let code = result.unwrap_or_else(|error| {
        report::line(&format!("error: {}", report::text(&error)));
        ExitCode::FAILURE
    });
    logging::flush();
    code
}

/// The arguments, with `demo` put in where no subcommand is named: `beamline --listen 9000` serves
/// the demo there.
fn with_default_command(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    const OWN: [&str; 4] = ["-h", "--help", "-V", "--version"];
    let mut arguments: Vec<OsString> = arguments.collect();
    if arguments.is_empty() {
        arguments.push("beamline".into());
    }
    let named = arguments.get(1).is_some_and(|first| {
        let text = first.to_string_lossy();
        !text.starts_with('-') || OWN.contains(&text.as_ref())
    });
    if !named {
        arguments.insert(1, DEFAULT_COMMAND.into());
    }
    arguments
}

/// Starts the log, and warns of variables that look like settings but are not.
///
/// # Errors
///
/// When the filter of the log cannot be understood.
fn start_log(settings: &LogSettings, default: &str) -> anyhow::Result<()> {
    logging::start(settings, default).context("--log")?;
    for warning in unknown_variables() {
        tracing::warn!("{warning}");
    }
    Ok(())
}

/// As [`start_log`] for subcommands that have no log.
fn warn_of_variables() {
    for warning in unknown_variables() {
        report::line(&format!("warning: {warning}"));
    }
}

fn unknown_variables() -> Vec<String> {
    let mut flags = BTreeSet::new();
    collect_variables(&Cli::command(), &mut flags);
    let present = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())));
    environment::warnings(&flags, present)
}

/// The variables of a command's flags, and of its subcommands'.
fn collect_variables(command: &clap::Command, into: &mut BTreeSet<String>) {
    let variables = command.get_arguments().filter_map(|argument| argument.get_env());
    into.extend(variables.map(|name| name.to_string_lossy().into_owned()));
    for subcommand in command.get_subcommands() {
        collect_variables(subcommand, into);
    }
}

/// The asynchronous runtime of a subcommand.
fn tokio_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(IO_THREADS)
        .thread_name("beamline-io")
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_without_a_subcommand_are_those_of_the_demo() {
        let parsed = |arguments: &[&str]| {
            let arguments = std::iter::once("beamline").chain(arguments.iter().copied()).map(OsString::from);
            with_default_command(arguments)
        };
        assert_eq!(parsed(&[]), ["beamline", "demo"]);
        assert_eq!(parsed(&["--listen", "9000"]), ["beamline", "demo", "--listen", "9000"]);
        for named in [["--help"], ["-V"], ["serve"], ["srve"]] {
            assert_eq!(parsed(&named), ["beamline", named[0]]);
        }
        assert_eq!(with_default_command(std::iter::empty()), ["beamline", "demo"]);
    }

    #[test]
    fn every_flag_of_a_setting_has_its_environment_twin() {
        let command = Cli::command();
        let serve = command.find_subcommand("serve").unwrap();
        for argument in serve
            .get_arguments()
            .filter(|argument| !["help", "version"].contains(&argument.get_id().as_str()))
        {
            let name = argument.get_id().as_str();
            let twin = argument.get_env().unwrap_or_else(|| panic!("{name} has no twin")).to_str().unwrap();
            assert_eq!(twin, format!("BEAMLINE_{}", name.to_uppercase()));
        }
    }
}
