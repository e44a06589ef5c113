//! Keeps records in flight up to a bound, so that they share steps, and writes them in their order.

use std::sync::Arc;

use indicatif::ProgressBar;
use sha2::Sha256;

use super::answer::{Answered, Answerer};
use super::input::Input;
use super::output::Output;
use super::stop::Stop;
use crate::cli::in_flight::InFlight;

/// An answer, with the record that it belongs to.
pub(super) struct Done {
    number: u64,
    digest: Sha256,
    answered: anyhow::Result<Answered>,
}

/// How a run ended.
pub(super) enum End {
    /// All requests are answered.
    Complete,
    /// A signal came; the process should exit with this code.
    Stopped(u8),
}

/// Answers all remaining records.
pub(super) fn answer_all(
    input: &mut Input,
    output: &mut Output,
    answerer: &Arc<Answerer>,
    tasks: &mut InFlight<Done>,
    stop: &Stop,
    bar: &ProgressBar,
) -> anyhow::Result<End> {
    let mut write = |done: Done, bar: &ProgressBar| {
        let answered = done.answered?;
        bar.inc(1);
        output.write(done.number, &done.digest, &answered)
    };
    while let Some(record) = input.next()? {
        if let Some(code) = stop.code() {
            return Ok(End::Stopped(code));
        }
        if record.is_blank() {
            bar.inc(1);
            continue;
        }
        if tasks.is_full()
            && let Some(done) = tasks.next(stop.wait())?
        {
            write(done, bar)?;
        }
        let answerer = Arc::clone(answerer);
        tasks.start(async move {
            let answered = answerer.answer(record.number, record.json).await;
            Done { number: record.number, digest: record.digest, answered }
        });
    }
    while let Some(done) = tasks.next(stop.wait())? {
        write(done, bar)?;
    }
    // The loop also ends when a signal comes while it waits for a task.
    Ok(stop.code().map_or(End::Complete, End::Stopped))
}
