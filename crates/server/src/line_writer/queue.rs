//! A queue of waiting lines, bounded in bytes.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Cost of a waiting line besides its own bytes: its place in the queue, in bytes.
const LINE_OVERHEAD: usize = 64;
/// Number of bytes after which lines are written even if more are waiting.
const CHUNK: usize = 256 << 10;

/// The next work of the thread.
pub(super) struct Work {
    /// Whether to open the output again first.
    pub(super) reopen: bool,
    /// Whole lines, to be written.
    pub(super) bytes: Vec<u8>,
    /// Number of lines in `bytes`.
    pub(super) lines: u64,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    /// Cost of `lines`, in bytes.
    waiting: usize,
    dropped: u64,
    reopen: bool,
    /// Whether the thread is working on something that it took.
    writing: bool,
    closed: bool,
}

/// A queue of lines for one thread.
#[derive(Debug)]
pub(super) struct Queue {
    max_bytes: usize,
    state: Mutex<State>,
    /// Notified when there is work, or the queue is closed.
    work: Condvar,
    /// Notified when all work is done.
    idle: Condvar,
}

impl Queue {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self { max_bytes, state: Mutex::default(), work: Condvar::new(), idle: Condvar::new() }
    }

    pub(super) fn push(&self, line: Vec<u8>) {
        let mut state = self.lock();
        let cost = line.len().saturating_add(LINE_OVERHEAD);
        if state.closed || state.waiting.saturating_add(cost) > self.max_bytes {
            state.dropped += 1;
            return;
        }
        state.waiting += cost;
        state.lines.push_back(line);
        self.work.notify_one();
    }

    pub(super) fn reopen(&self) {
        self.lock().reopen = true;
        self.work.notify_one();
    }

    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.work.notify_one();
    }

    /// Waits for the next work; `None` when the queue is closed and empty.
    pub(super) fn take(&self) -> Option<Work> {
        let nothing = |state: &mut State| state.lines.is_empty() && !state.reopen && !state.closed;
        let state = self.work.wait_while(self.lock(), nothing);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        let reopen = std::mem::take(&mut state.reopen);
        let (mut bytes, mut lines) = (Vec::new(), 0);
        while bytes.len() < CHUNK
            && let Some(line) = state.lines.pop_front()
        {
            state.waiting -= line.len() + LINE_OVERHEAD;
            lines += 1;
            bytes.extend(line);
        }
        if lines == 0 && !reopen {
            return None;
        }
        state.writing = true;
        Some(Work { reopen, bytes, lines })
    }

    /// Records that the work taken last is done.
    pub(super) fn done(&self) {
        self.lock().writing = false;
        self.idle.notify_all();
    }

    pub(super) fn lost(&self, lines: u64) {
        self.lock().dropped += lines;
    }

    pub(super) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.lock().waiting
    }

    pub(super) fn flush(&self, patience: Duration) -> bool {
        let busy = |state: &mut State| !state.lines.is_empty() || state.reopen || state.writing;
        let waited = self.idle.wait_timeout_while(self.lock(), patience, busy);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Every change is a single assignment, so a panic elsewhere leaves no inconsistent state.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
