//! The request log: one JSON line per answered /v1/recommend, for `beamline replay`.
//!
//! Place in the flow: the handler passes requests and answers, and another thread writes them.
//!
//! Invariant: serving never waits for the disk. The waiting lines are bounded in bytes. When there
//! are too many, or the disk fails, lines are dropped and counted in
//! `beamline_request_log_dropped_total`.

pub mod line;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::api::{RecommendRequest, RecommendResponse};
use crate::line_writer::{LineWriter, Output, Source};
use line::{LoggedAnswer, LoggedItem, LoggedModel};

/// Most bytes of lines that may wait for the disk. A line is a few kilobytes, so these are
/// thousands.
const MAX_WAITING: usize = 64 << 20;

/// The file of the request log, and its form.
#[derive(Clone, Debug)]
pub struct RequestLogSettings {
    /// Path of the file; lines are appended.
    pub file: PathBuf,
    /// Whether users are named by a digest of their id.
    pub hash_users: bool,
}

/// Why the request log could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the request log {}: {source}", path.display())]
pub struct RequestLogError {
    path: PathBuf,
    source: io::Error,
}

/// Accepts requests and answers, and writes them.
#[derive(Debug)]
pub struct RequestLog {
    lines: LineWriter,
    hash_users: bool,
}

/// A request that will be logged if it is answered.
#[derive(Debug)]
pub struct Pending {
    request: RecommendRequest,
    received_at: u64,
}

impl RequestLog {
    /// Opens the file and starts the thread.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened, or the thread cannot be started.
    pub fn start(settings: &RequestLogSettings) -> Result<Self, RequestLogError> {
        let lines = LineWriter::start("beamline-request-log", MAX_WAITING, LogFile(settings.file.clone()))
            .map_err(|source| RequestLogError { path: settings.file.clone(), source })?;
        Ok(Self { lines, hash_users: settings.hash_users })
    }

    /// Keeps a request until it is answered.
    pub fn asked(&self, request: &RecommendRequest) -> Pending {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let received_at = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        Pending { request: request.clone(), received_at }
    }

    /// Logs an answer, unless too many lines wait.
    pub fn answered(&self, pending: Pending, answer: &RecommendResponse) {
        let Pending { mut request, received_at } = pending;
        if self.hash_users {
            request.user_id = request.user_id.as_deref().map(line::hash_user);
        }
        let item = |item: &crate::api::Item| LoggedItem { item_id: item.item_id.clone(), score: item.score };
        let line = LoggedAnswer {
            request_id: answer.request_id.clone(),
            received_at,
            request,
            model: LoggedModel {
                sha256: answer.model.sha256.clone(),
                weight_format: answer.model.weight_format.clone(),
                kv_format: answer.model.kv_format.clone(),
            },
            catalog_version: answer.catalog_version.clone(),
            items: answer.items.iter().map(item).collect(),
            degraded: answer.degraded.clone(),
            cached_tokens: answer.usage.cached_tokens,
        };
        let mut text = Vec::new();
        // Writing a line of numbers and strings to memory cannot fail.
        if serde_json::to_writer(&mut text, &line).is_ok() {
            text.push(b'\n');
            self.lines.push(text);
        }
    }

    /// Number of lines that were not written.
    pub fn dropped_lines(&self) -> u64 {
        self.lines.dropped()
    }

    /// Opens the file again under its name, as after a rotation. If that fails, the old file stays
    /// in use.
    pub fn reopen(&self) {
        self.lines.reopen();
    }

    /// Writes the waiting lines, and ends the thread. Returns whether the disk took them in time.
    /// Later lines are dropped.
    pub fn close(&self, patience: Duration) -> bool {
        self.lines.close(patience)
    }
}

/// The file of a request log.
struct LogFile(PathBuf);

impl Source for LogFile {
    fn open(&mut self) -> io::Result<Output> {
        let (file, torn) = open(&self.0)?;
        Ok(Output { writer: Box::new(file), torn })
    }

    fn failing(&mut self, error: &io::Error) {
        tracing::error!(%error, "cannot write the request log; lines are dropped and counted");
    }

    fn kept(&mut self, error: &io::Error) {
        tracing::error!(%error, "cannot open the request log again; the old file stays in use");
    }
}

/// Opens the file at its end. Also returns whether its last line is incomplete, as after a crash.
fn open(path: &Path) -> io::Result<(File, bool)> {
    // These are histories of people, so only the owner may read them.
    let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    if !file.metadata()?.is_file() {
        return Ok((file, false));
    }
    let mut last = [b'\n'];
    if file.seek(SeekFrom::End(0))? > 0 {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
    }
    Ok((file, last != *b"\n"))
}
