//! `beamline batch`: answers a file of requests with the same service as over HTTP.
//!
//! ```text
//! input   lines or rows -> records, numbered and digested
//! answer  a record -> its line of the output, and its rows of the TREC run
//! run     records in flight up to a bound, so that they share steps; written in their order
//! output  unfinished files, checkpoints, publication
//! ```
//!
//! Invariant: without `--timings` the output is a function of checkpoint, catalog, settings and
//! input, even if the run was interrupted. It appears under its final name only when it is
//! complete.

mod answer;
mod columns;
mod input;
mod job;
mod manifest;
mod output;
mod parquet;
mod progress;
mod run;
mod stop;
mod trec;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};

use super::in_flight::InFlight;
use super::report;
use crate::runtime::{Runtime, Scale};
use crate::settings::{Flags, HttpLayer, Settings};
use answer::Answerer;
use input::Input;
use output::Output;
pub(super) use progress::lines_bar;
use run::End;
use stop::Stop;
use trec::{TrecRun, TrecScores};

/// Exit code of a run with more errors than allowed.
const TOO_MANY_ERRORS: u8 = 3;

/// Flags of `batch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each line of the input is the body of a POST /v1/recommend, with an extra `id` if you like. A Parquet file has a row
per request and columns with the names of the fields. Each line of the output holds `line`, the `id`, and the answer or
its `error`. `-` is stdin or stdout.

  beamline batch --checkpoint DIR requests.jsonl answers.jsonl
  beamline batch --checkpoint DIR requests.parquet answers.jsonl --trec run.trec

Until it is complete, the output is OUTPUT.partial, with its progress in OUTPUT.partial.json. The same command goes on
where an interrupted one stopped, and the result is byte for byte the same. If input, checkpoint, catalog or settings
have changed since, it says what differs and does nothing; --restart begins anew. An output that is there already is
never written over without --restart.

The exit code is 1 when nothing could be done or no request was answered, and 3 with more errors than --max-errors.")]
pub(super) struct Args {
    /// Requests: JSON lines, or Parquet if the name ends in .parquet.
    input: PathBuf,
    /// Answers, one JSON line per request, in the same order.
    output: PathBuf,
    /// Also write a TREC run: `qid Q0 docid rank score tag`. The qid is the request's `id`, else
    /// its `user_id`, else the number of its line. The docid is the item id. Ids with white space
    /// are an error, because the format cannot hold them.
    #[arg(long, value_name = "FILE")]
    trec: Option<PathBuf>,
    /// Name of the run, which is the last column.
    #[arg(long, value_name = "TAG", default_value = "beamline", value_parser = trec::tag)]
    trec_tag: String,
    /// Scores of the run. trec_eval orders by score, not by rank. It treats scores that are equal
    /// in single precision as ties, and puts the larger docid of a tie first. Items of one semantic
    /// ID share their score and would change places. So `rank` writes num_items, num_items - 1,
    /// ..., which keeps the order of the slate. `log-probability` writes the model's scores, for
    /// combining runs.
    #[arg(long, value_name = "WHICH", default_value = "rank")]
    trec_scores: TrecScores,
    /// Ignore columns of a Parquet input that are not fields of a request. Otherwise they are an
    /// error.
    #[arg(long)]
    ignore_unknown_columns: bool,
    /// Start over: ignore the progress of an interrupted run, and overwrite an existing output.
    #[arg(long)]
    restart: bool,
    /// Exit with code 3 when more requests than this have an error. The output is complete in any
    /// case.
    #[arg(long, value_name = "N")]
    max_errors: Option<u64>,
    /// Add request ids, timings and cache use, which differ from run to run.
    #[arg(long)]
    timings: bool,
    /// Requests in flight at a time.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    in_flight: u32,
    /// How often the progress is made safe on disk, in milliseconds. A power failure loses at most
    /// this much work.
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    checkpoint_ms: u64,
    #[command(flatten)]
    flags: Flags,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut settings = Settings::resolve(args.flags.clone(), HttpLayer::default())?;
    super::start_log(&settings.log, "warn")?;
    let in_flight = args.in_flight as usize;
    // The batch is the only client, so none of its requests may be refused.
    settings.engine.max_queued = settings.engine.max_queued.max(in_flight);
    let trec_file = args.trec.as_deref();
    ensure!(
        !trec_file.is_some_and(is_dash),
        "the TREC run needs a file of its own: stdout is for the answers"
    );
    ensure!(trec_file != Some(args.output.as_path()), "the answers and the TREC run are the same file");
    if !args.restart {
        output::refuse_to_overwrite([Some(args.output.as_path()), trec_file])?;
    }
    let mut input = Input::open(&args.input, settings.http.max_body_bytes, args.ignore_unknown_columns)?;
    let bar = progress::bar(&args.input, &input)?;

    let runtime = Runtime::load(&settings, Scale::Server)?;
    let service = runtime.service.clone().patient();
    let trec = trec_file.is_some().then(|| TrecRun::new(args.trec_tag.clone(), args.trec_scores));
    if trec.is_some() {
        trec::check_catalog(&service.served().catalog)?;
    }
    let job = job::describe(&settings, service.served(), args.timings, trec_file.zip(trec.as_ref()))?;
    let pause = Duration::from_millis(args.checkpoint_ms);
    let mut output = Output::open(&args.output, trec_file, job, args.restart, pause)?;
    if output.finish_publication()? {
        report::line(&format!("{} was complete already", args.output.display()));
        let counts = output.progress();
        return Ok(verdict(counts.answered, counts.failed, args.max_errors));
    }
    let resumed = output.progress().line;
    if resumed > 0 {
        report::line(&format!("going on after line {resumed}"));
        input.skip(resumed, &output.progress().input_sha256, &bar)?;
    }

    let mut tasks = InFlight::new(in_flight)?;
    let stop = if output.is_resumable() { Stop::on_signals(tasks.tokio())? } else { Stop::never() };
    let answerer = Arc::new(Answerer { service, timings: args.timings, trec });
    let end = match run::answer_all(&mut input, &mut output, &answerer, &mut tasks, &stop, &bar) {
        Ok(end) => end,
        Err(error) => {
            // Finished work is kept if possible; the error of the run matters more than that of the
            // checkpoint.
            let _ = output.checkpoint();
            return Err(error.context(kept(&output)));
        }
    };
    bar.finish_and_clear();
    let counts = output.progress().clone();
    let code = match end {
        End::Complete => {
            output.publish().context("cannot write the output")?;
            report::line(&format!("{} answered, {} errors", counts.answered, counts.failed));
            verdict(counts.answered, counts.failed, args.max_errors)
        }
        End::Stopped(code) => {
            output.checkpoint().context("cannot write the output")?;
            report::line(&format!("stopped. {}", kept(&output)));
            ExitCode::from(code)
        }
    };
    runtime.drain(Duration::ZERO)?;
    Ok(code)
}

/// The exit code of a complete run, for jobs that depend on it.
fn verdict(answered: u64, failed: u64, max_errors: Option<u64>) -> ExitCode {
    if answered == 0 && failed > 0 {
        report::line("error: no request was answered; the first lines of the output say why");
        return ExitCode::FAILURE;
    }
    match max_errors {
        Some(most) if failed > most => {
            report::line(&format!("error: {failed} errors are more than --max-errors {most}"));
            ExitCode::from(TOO_MANY_ERRORS)
        }
        _ => ExitCode::SUCCESS,
    }
}

/// A message about what an interrupted run leaves.
fn kept(output: &Output) -> String {
    let line = output.progress().line;
    match output.is_resumable() {
        true => format!("Answers up to line {line} are kept: run the same command again to go on"),
        false => format!("Answers up to line {line} were written"),
    }
}

fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Reads every row of a Parquet file of requests, as a batch does. An entry point for fuzz targets.
///
/// # Errors
///
/// When the file is damaged.
#[doc(hidden)]
pub fn parquet_rows(path: &Path) -> anyhow::Result<u64> {
    let mut rows = parquet::Rows::open(std::fs::File::open(path)?, 1 << 20, true)?;
    let mut read = 0;
    while rows.next()?.is_some() {
        read += 1;
    }
    Ok(read)
}
