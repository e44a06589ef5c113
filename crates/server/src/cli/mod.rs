//! The command line: what subcommands there are, and what becomes of their errors.
//!
//! Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed or problems found, 2 wrong usage.

mod batch;
mod catalog;
mod client;
mod demo;
mod files;
mod in_flight;
mod inspect;
mod lines;
mod models;
mod output;
mod recommend;
mod replay;
mod serve;
mod signals;

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::logging;

#[doc(hidden)]
pub use batch::parquet_rows;

/// Threads that read and write HTTP; the forward pass has its own.
const IO_THREADS: usize = 2;

/// Serves generative recommenders: give it a checkpoint in Hugging Face layout and an item catalog, send it a user's
/// history, get items, ranked.
///
/// Without a subcommand it serves the demo.
#[derive(Debug, Parser)]
#[command(
    name = "beamline",
    version,
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
    command: Option<Command>,
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
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let command = Cli::parse().command.or_else(|| Cli::parse_from(["beamline", "demo"]).command);
    let result = match command {
        Some(Command::Serve(args)) => serve::run(args),
        Some(Command::Demo(args)) => demo::run(args),
        Some(Command::Recommend(args)) => recommend::run(args),
        Some(Command::Batch(args)) => batch::run(args),
        Some(Command::Replay(args)) => replay::run(args),
        Some(Command::Inspect(args)) => inspect::run(&args),
        Some(Command::Catalog(command)) => catalog::run(command),
        Some(Command::Models(command)) => models::run(command),
        None => Ok(ExitCode::FAILURE),
    };
    let code = result.unwrap_or_else(|error| {
        logging::last_words(&format!("error: {error:#}"));
        ExitCode::FAILURE
    });
    logging::flush();
    code
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
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
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
