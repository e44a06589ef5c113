//! The request log: one JSON line per answered /v1/recommend, for `beamline replay`.
//!
//! Place in the flow: the handler hands over what was asked and answered; a thread of its own writes it.
//!
//! Invariant: serving never waits for the disk. The channel is bounded; when it is full, or the disk refuses, lines are
//! dropped and counted in `beamline_request_log_dropped_total`.

pub mod line;
#[cfg(test)]
mod tests;
mod writer;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use metrics::{counter, describe_counter};

use crate::api::{RecommendRequest, RecommendResponse};
use line::{LoggedAnswer, LoggedItem, LoggedModel};
use writer::Message;

/// Lines that may wait for the disk. A line is a few kilobytes, so these are tens of megabytes at most in the usual case.
const WAITING: usize = 4096;

const DROPPED: &str = "beamline_request_log_dropped_total";

/// Where to log, and how.
#[derive(Clone, Debug)]
pub struct RequestLogSettings {
    /// The file; lines are appended.
    pub file: PathBuf,
    /// Whether users are named by a digest of their id.
    pub hash_users: bool,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the request log {}: {source}", path.display())]
pub struct RequestLogError {
    path: PathBuf,
    source: io::Error,
}

/// Takes lines.
#[derive(Debug)]
pub struct RequestLog {
    sender: SyncSender<Message>,
    thread: Mutex<Option<JoinHandle<()>>>,
    hash_users: bool,
}

/// A request that may come to be logged.
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
    /// When the file cannot be opened, or there is no thread.
    pub fn start(settings: &RequestLogSettings) -> Result<Self, RequestLogError> {
        let blame = |source| RequestLogError { path: settings.file.clone(), source };
        let (file, torn) = open(&settings.file).map_err(blame)?;
        describe_counter!(DROPPED, "Lines of the request log that were not written.");
        counter!(DROPPED).increment(0);
        let (sender, lines) = sync_channel(WAITING);
        let write = move || writer::write(&lines, file, torn, dropped);
        let thread = std::thread::Builder::new().name("beamline-request-log".into()).spawn(write);
        let thread = Mutex::new(Some(thread.map_err(blame)?));
        Ok(Self { sender, thread, hash_users: settings.hash_users })
    }

    /// Keeps what was asked until it is answered.
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
            },
            catalog_version: answer.catalog_version.clone(),
            items: answer.items.iter().map(item).collect(),
            degraded: answer.degraded.clone(),
            cached_tokens: answer.usage.cached_tokens,
        };
        if self.sender.try_send(Message::Line(Box::new(line))).is_err() {
            dropped(1);
        }
    }

    /// Writes what waits, and ends the thread. Blocks until the disk has it; what comes later is dropped.
    pub fn close(&self) {
        // An error means that the thread is gone already.
        let _ = self.sender.send(Message::Close);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

fn dropped(lines: u64) {
    counter!(DROPPED).increment(lines);
}

/// The file at its end, and whether the last line there is torn, as a crash leaves it.
fn open(path: &Path) -> io::Result<(File, bool)> {
    // Histories of people: for nobody else to read.
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
