//! `beamline batch`: answers a file of requests with the same service as over HTTP.
//!
//! Requests are kept in flight up to a bound, so that they share steps, and answered in their order. Without
//! `--timings` the output is a function of checkpoint, catalog and input: what depends on the machine and on what was
//! cached is left out. The output appears under its name only when it is complete.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;
use tokio::runtime::Runtime as Tokio;
use tokio::task::JoinHandle;

use super::tokio_runtime;
use crate::api::{self, ErrorBody, RecommendRequest};
use crate::error::Error;
use crate::logging;
use crate::runtime::{Runtime, Scale};
use crate::service::Service;
use crate::settings::{Flags, HttpLayer, Settings};

/// Flags of `batch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each line of the input is the body of a POST /v1/recommend, with an extra `id` if you like. Each line of the output
holds `line`, the `id`, and the answer or its `error`. `-` is stdin or stdout.

  beamline batch --checkpoint DIR requests.jsonl answers.jsonl")]
pub(super) struct Args {
    /// Requests, one JSON object per line.
    input: PathBuf,
    /// Answers, one line per request, in the same order.
    output: PathBuf,
    /// Add request ids, timings and cache use, which differ from run to run.
    #[arg(long)]
    timings: bool,
    /// Requests in flight at a time.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    in_flight: u32,
    #[command(flatten)]
    flags: Flags,
}

/// A line of the output.
#[derive(Serialize)]
struct Line {
    line: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Value>,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Outcome {
    Answer(Value),
    Error(ErrorBody),
}

/// How many requests went how.
#[derive(Default)]
struct Counts {
    answered: u64,
    failed: u64,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut settings = Settings::resolve(args.flags.clone(), HttpLayer::default())?;
    logging::start(&settings.log, "warn")?;
    let in_flight = args.in_flight as usize;
    // Nobody else is asking, so none of ours may be refused.
    settings.engine.max_queued = settings.engine.max_queued.max(in_flight);
    let input = Input::open(&args.input, settings.http.max_body_bytes)?;
    let output = Output::create(&args.output)?;
    let runtime = Runtime::load(&settings, Scale::Server)?;
    let batch = Batch { service: runtime.service.clone().patient(), timings: args.timings, in_flight };
    let counts = batch.answer(input, output, &progress(&args.input)?)?;
    eprintln!("{} answered, {} errors", counts.answered, counts.failed);
    runtime.drain(Duration::ZERO)?;
    Ok(ExitCode::SUCCESS)
}

struct Batch {
    service: Service,
    timings: bool,
    in_flight: usize,
}

impl Batch {
    fn answer(&self, mut input: Input, mut output: Output, progress: &ProgressBar) -> anyhow::Result<Counts> {
        let tokio = tokio_runtime()?;
        let mut counts = Counts::default();
        let mut waiting = VecDeque::with_capacity(self.in_flight);
        let mut end = |task, output: &mut Output| finish(&tokio, task, output, &mut counts, progress);
        while let Some((number, line)) = input.next().context("cannot read the input")? {
            if line.as_ref().is_ok_and(|line| line.trim_ascii().is_empty()) {
                progress.inc(1);
                continue;
            }
            if waiting.len() == self.in_flight
                && let Some(first) = waiting.pop_front()
            {
                end(first, &mut output)?;
            }
            waiting.push_back(tokio.spawn(answer_line(self.service.clone(), self.timings, number, line)));
        }
        for task in waiting {
            end(task, &mut output)?;
        }
        progress.finish_and_clear();
        output.publish().context("cannot write the output")?;
        Ok(counts)
    }
}

fn finish(
    tokio: &Tokio,
    task: JoinHandle<Line>,
    output: &mut Output,
    counts: &mut Counts,
    progress: &ProgressBar,
) -> anyhow::Result<()> {
    let line = tokio.block_on(task).context("a request panicked")?;
    match line.outcome {
        Outcome::Answer(_) => counts.answered += 1,
        Outcome::Error(_) => counts.failed += 1,
    }
    progress.inc(1);
    output.write(&line).context("cannot write the output")
}

async fn answer_line(service: Service, timings: bool, number: u64, line: Result<Vec<u8>, Error>) -> Line {
    let mut id = None;
    let result = async {
        let mut value: Value = api::parse(&line?)?;
        id = value.as_object_mut().and_then(|object| object.remove("id"));
        let request: RecommendRequest = api::parse_value(value)?;
        let answer = service.recommend(request, format!("line-{number}")).await?;
        let mut answer = serde_json::to_value(answer).map_err(Error::internal)?;
        if !timings {
            strip(&mut answer);
        }
        Ok(answer)
    }
    .await;
    let outcome = match result {
        Ok(answer) => Outcome::Answer(answer),
        Err(error) => Outcome::Error(Error::body(&error)),
    };
    Line { line: number, id, outcome }
}

/// Removes what differs from run to run.
fn strip(answer: &mut Value) {
    if let Some(answer) = answer.as_object_mut() {
        answer.remove("request_id");
        answer.remove("timings_ms");
        if let Some(usage) = answer.get_mut("usage").and_then(Value::as_object_mut) {
            usage.remove("cached_tokens");
            usage.remove("steps");
        }
    }
}

/// A line with its number, or why it cannot be read as one.
type Numbered = (u64, Result<Vec<u8>, Error>);

/// Lines of bounded length.
struct Input {
    reader: Box<dyn BufRead>,
    limit: usize,
    number: u64,
}

impl Input {
    fn open(path: &Path, limit: usize) -> anyhow::Result<Self> {
        let reader: Box<dyn BufRead> = if is_dash(path) {
            Box::new(BufReader::new(io::stdin()))
        } else {
            Box::new(BufReader::new(
                File::open(path).with_context(|| format!("cannot read {}", path.display()))?,
            ))
        };
        Ok(Self { reader, limit, number: 0 })
    }

    /// The next line and its number; a line over the limit is passed over and is an error of its own.
    fn next(&mut self) -> io::Result<Option<Numbered>> {
        let mut line = Vec::new();
        let limit = self.limit as u64 + 1;
        if self.reader.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        self.number += 1;
        let whole = line.last() == Some(&b'\n') || (line.len() as u64) < limit;
        if !whole {
            self.reader.skip_until(b'\n')?;
            return Ok(Some((self.number, Err(Error::BodyTooLarge { limit: self.limit }))));
        }
        Ok(Some((self.number, Ok(line))))
    }
}

/// A file under a name of its own until it is complete, or stdout.
struct Output {
    writer: BufWriter<Box<dyn Write>>,
    rename: Option<Rename>,
}

/// Removes the unfinished file unless it was renamed.
struct Rename {
    from: PathBuf,
    to: PathBuf,
    done: bool,
}

impl Output {
    fn create(path: &Path) -> anyhow::Result<Self> {
        if is_dash(path) {
            return Ok(Self { writer: BufWriter::new(Box::new(io::stdout())), rename: None });
        }
        let mut name =
            path.file_name().with_context(|| format!("{} is not a file name", path.display()))?.to_owned();
        name.push(format!(".{}.unfinished", std::process::id()));
        let from = path.with_file_name(name);
        let file = File::create_new(&from).with_context(|| format!("cannot write {}", from.display()))?;
        let rename = Some(Rename { from, to: path.to_owned(), done: false });
        Ok(Self { writer: BufWriter::new(Box::new(file)), rename })
    }

    fn write(&mut self, line: &Line) -> io::Result<()> {
        serde_json::to_writer(&mut self.writer, line)?;
        self.writer.write_all(b"\n")
    }

    fn publish(self) -> io::Result<()> {
        let Self { mut writer, mut rename } = self;
        writer.flush()?;
        if let Some(rename) = &mut rename {
            std::fs::rename(&rename.from, &rename.to)?;
            rename.done = true;
        }
        Ok(())
    }
}

impl Drop for Rename {
    fn drop(&mut self) {
        if !self.done {
            // It is a leftover either way.
            let _ = std::fs::remove_file(&self.from);
        }
    }
}

fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// A bar with rate and remaining time on a terminal; nothing elsewhere.
fn progress(input: &Path) -> anyhow::Result<ProgressBar> {
    if is_dash(input) {
        let style = ProgressStyle::with_template("{spinner} {human_pos} requests, {per_sec}, {elapsed}")?;
        return Ok(ProgressBar::new_spinner().with_style(style));
    }
    let style =
        ProgressStyle::with_template("{bar:40} {human_pos}/{human_len} requests, {per_sec}, {eta} left")?;
    Ok(ProgressBar::new(count_lines(input)?).with_style(style))
}

fn count_lines(path: &Path) -> io::Result<u64> {
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path)?);
    let (mut lines, mut open) = (0, false);
    loop {
        let chunk = reader.fill_buf()?;
        if chunk.is_empty() {
            return Ok(lines + u64::from(open));
        }
        lines += chunk.iter().filter(|byte| **byte == b'\n').count() as u64;
        open = chunk.last() != Some(&b'\n');
        let length = chunk.len();
        reader.consume(length);
    }
}
