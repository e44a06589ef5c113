//! `beamline replay`: answers a request log again, offline, and compares bit for bit.
//!
//! Online requests shared batches with any others, met a cache in any state, and were cut into
//! other chunks. None of that may change an answer. This command finds out whether it did.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use indicatif::ProgressBar;
use serde::Serialize;

use super::batch;
use super::in_flight::InFlight;
use super::lines::{Line, Lines};
use super::report;
use crate::api::{self, ErrorBody};
use crate::request_log::line::{LoggedAnswer, LoggedItem, LoggedModel};
use crate::runtime::{Runtime, Scale};
use crate::service::Service;
use crate::settings::{Flags, HttpLayer, Settings};

/// Longest line of a log that is read, in bytes.
const MAX_LINE_BYTES: usize = 256 << 20;
/// Most unreadable lines that are shown on the terminal.
const SHOWN: u64 = 5;

/// Flags of `replay`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Answers every request of a log that `beamline serve --request-log FILE` has written, and compares items and scores bit
for bit. Lines of another checkpoint or catalog are passed over and counted, and so are degraded answers, whose beams
depended on the load. Deadlines are left out. Give the limits and --history-cut that the server had.

Exits with 1 if an answer differs, or if there was none to compare. `beamline-eval replay` runs this and lists the
differences side by side.

  beamline serve --checkpoint DIR --request-log log.jsonl
  beamline replay --checkpoint DIR log.jsonl --out differences.jsonl")]
pub(super) struct Args {
    /// The request log.
    log: PathBuf,
    /// Write the differences: a JSON line with the request's id and user, the logged answer and the
    /// new one.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write the counts, with checkpoint and catalog, as one JSON object.
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,
    /// Most differences to show on the terminal.
    #[arg(long, value_name = "N", default_value_t = 5)]
    show: u64,
    /// Requests in flight at a time.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    in_flight: u32,
    #[command(flatten)]
    flags: Flags,
}

/// The result of a line of the log.
enum Outcome {
    Identical,
    Different(Box<Difference>),
    OtherModel,
    OtherCatalog,
    Degraded,
    Unreadable { line: u64, why: String },
}

/// An answer that differs from the logged one.
#[derive(Debug, Serialize)]
struct Difference {
    line: u64,
    request_id: String,
    /// The user of the request, as logged.
    #[serde(skip_serializing_if = "Option::is_none")]
    user_id: Option<String>,
    /// Rank of the first item that differs, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    first_rank: Option<usize>,
    logged: Vec<LoggedItem>,
    #[serde(flatten)]
    replayed: Replayed,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Replayed {
    Items { replayed: Vec<LoggedItem> },
    Error(ErrorBody),
}

/// The contents of the `--summary` file.
#[derive(Debug, Serialize)]
struct Summary<'a> {
    model_sha256: &'a str,
    catalog_version: &'a str,
    beamline_version: &'static str,
    #[serde(flatten)]
    counts: &'a Counts,
}

#[derive(Debug, Default, Serialize)]
struct Counts {
    identical: u64,
    different: u64,
    other_model: u64,
    other_catalog: u64,
    degraded: u64,
    unreadable: u64,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut settings = Settings::resolve(args.flags.clone(), HttpLayer::default())?;
    super::start_log(&settings.log, "warn")?;
    let in_flight = args.in_flight as usize;
    settings.engine.max_queued = settings.engine.max_queued.max(in_flight);
    let file = File::open(&args.log).with_context(|| format!("cannot read {}", args.log.display()))?;
    let lines = Lines::new(Box::new(BufReader::new(file)), MAX_LINE_BYTES);
    ensure!(args.out.as_ref() != Some(&args.log), "the differences would be written over the log");
    ensure!(args.summary.as_ref() != Some(&args.log), "the summary would be written over the log");
    let report = Report::create(args.out.as_deref(), args.show)?;
    let bar = batch::lines_bar(&args.log)?;
    let runtime = Runtime::load(&settings, Scale::Server)?;
    let service = runtime.service.clone().patient();
    let counts = replay(lines, &service, InFlight::new(in_flight)?, report, &bar)?;
    if let Some(path) = &args.summary {
        let served = service.served();
        let summary = Summary {
            model_sha256: &served.digest,
            catalog_version: served.catalog.version(),
            beamline_version: env!("CARGO_PKG_VERSION"),
            counts: &counts,
        };
        let text = serde_json::to_vec(&summary).context("cannot write the summary")?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    runtime.drain(Duration::ZERO)?;
    let Counts { identical, different, other_model, other_catalog, degraded, unreadable } = counts;
    report::line(&format!(
        "{identical} identical, {different} different; passed over: {other_model} of another checkpoint, {other_catalog} of \
         another catalog, {degraded} degraded, {unreadable} unreadable"
    ));
    if identical + different == 0 {
        bail!("the log holds no answer of this checkpoint and catalog");
    }
    Ok(if different == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn replay(
    mut lines: Lines,
    service: &Service,
    mut tasks: InFlight<Outcome>,
    mut report: Report,
    bar: &ProgressBar,
) -> anyhow::Result<Counts> {
    let mut counts = Counts::default();
    let mut number = 0;
    while let Some(line) = lines.next().context("cannot read the log")? {
        number += 1;
        if line.as_ref().is_ok_and(|line| line.trim_ascii().is_empty()) {
            bar.inc(1);
            continue;
        }
        if tasks.is_full()
            && let Some(outcome) = tasks.next(std::future::pending())?
        {
            report.add(outcome, &mut counts, bar)?;
        }
        let service = service.clone();
        tasks.start(async move { compare(&service, number, line).await });
    }
    while let Some(outcome) = tasks.next(std::future::pending())? {
        report.add(outcome, &mut counts, bar)?;
    }
    bar.finish_and_clear();
    report.finish()?;
    Ok(counts)
}

async fn compare(service: &Service, line: u64, text: Line) -> Outcome {
    let logged: LoggedAnswer = match text.and_then(|text| api::parse(&text)) {
        Ok(logged) => logged,
        Err(error) => return Outcome::Unreadable { line, why: error.to_string() },
    };
    let served = service.served();
    let LoggedModel { sha256, weight_format, kv_format } = &logged.model;
    let formats = [served.weight_format.name(), served.kv_format.name()];
    if *sha256 != served.digest || [weight_format, kv_format] != formats {
        return Outcome::OtherModel;
    }
    if logged.catalog_version != served.catalog.version() {
        return Outcome::OtherCatalog;
    }
    if logged.degraded.is_some() {
        return Outcome::Degraded;
    }
    let LoggedAnswer { mut request, request_id, items, .. } = logged;
    let user_id = request.user_id.clone();
    // The digest identifies the model, whose name may differ here. No client waits, so there is no
    // deadline.
    (request.model, request.timeout_ms, request.allow_degraded) = (None, None, None);
    let replayed = match service.recommend(request, request_id.clone()).await {
        Ok(answer) => Replayed::Items {
            replayed: answer
                .items
                .into_iter()
                .map(|item| LoggedItem { item_id: item.item_id, score: item.score })
                .collect(),
        },
        Err(error) => Replayed::Error(ErrorBody::from(&error)),
    };
    let first_rank = match &replayed {
        Replayed::Items { replayed } if *replayed == items => return Outcome::Identical,
        Replayed::Items { replayed } => {
            let same = replayed.iter().zip(&items).take_while(|(now, then)| now == then).count();
            Some(same + 1)
        }
        Replayed::Error(_) => None,
    };
    Outcome::Different(Box::new(Difference {
        line,
        request_id,
        user_id,
        first_rank,
        logged: items,
        replayed,
    }))
}

/// The outputs for differences.
struct Report {
    out: Option<BufWriter<File>>,
    /// Number of differences still to show on the terminal.
    show: u64,
}

impl Report {
    fn create(path: Option<&Path>, show: u64) -> anyhow::Result<Self> {
        let create = |path: &Path| {
            File::create(path).with_context(|| format!("cannot write {}", path.display())).map(BufWriter::new)
        };
        Ok(Self { out: path.map(create).transpose()?, show })
    }

    fn add(&mut self, outcome: Outcome, counts: &mut Counts, bar: &ProgressBar) -> anyhow::Result<()> {
        bar.inc(1);
        match outcome {
            Outcome::Identical => counts.identical += 1,
            Outcome::OtherModel => counts.other_model += 1,
            Outcome::OtherCatalog => counts.other_catalog += 1,
            Outcome::Degraded => counts.degraded += 1,
            Outcome::Unreadable { line, why } => {
                counts.unreadable += 1;
                if counts.unreadable <= SHOWN {
                    bar.suspend(|| report::line(&format!("line {line}: {why}")));
                }
            }
            Outcome::Different(difference) => {
                counts.different += 1;
                if counts.different <= self.show {
                    bar.suspend(|| report::line(&difference.describe()));
                }
                if let Some(out) = &mut self.out {
                    serde_json::to_writer(&mut *out, &difference).context("cannot write the differences")?;
                    out.write_all(b"\n").context("cannot write the differences")?;
                }
            }
        }
        Ok(())
    }

    fn finish(self) -> anyhow::Result<()> {
        self.out.map_or(Ok(()), |mut out| out.flush()).context("cannot write the differences")
    }
}

impl Difference {
    fn describe(&self) -> String {
        let place = format!("line {}, request {}", self.line, self.request_id);
        match (&self.replayed, self.first_rank) {
            (Replayed::Items { replayed }, Some(rank)) => {
                let show = |items: &[LoggedItem]| match items.get(rank - 1) {
                    Some(item) => format!("{:?} with {}", item.item_id, item.score),
                    None => "nothing".to_owned(),
                };
                format!("{place}: at rank {rank} was {}, is {}", show(&self.logged), show(replayed))
            }
            (Replayed::Error(error), _) => format!("{place}: now fails: {}", error.error.message),
            (Replayed::Items { .. }, None) => format!("{place}: differs"),
        }
    }
}
