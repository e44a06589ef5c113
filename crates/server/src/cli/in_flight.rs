//! Tasks in flight up to a bound. Their results come back in the order in which they were started.

use std::collections::VecDeque;
use std::future::Future;

use anyhow::Context;
use tokio::runtime::Runtime as Tokio;
use tokio::task::JoinHandle;

use super::tokio_runtime;

/// The tasks, and the runtime that runs them.
pub(super) struct InFlight<T> {
    tokio: Tokio,
    tasks: VecDeque<JoinHandle<T>>,
    limit: usize,
}

impl<T: Send + 'static> InFlight<T> {
    /// Allows at most `limit` tasks.
    pub(super) fn new(limit: usize) -> anyhow::Result<Self> {
        Ok(Self { tokio: tokio_runtime()?, tasks: VecDeque::with_capacity(limit), limit })
    }

    /// The runtime that runs the tasks.
    pub(super) fn tokio(&self) -> &Tokio {
        &self.tokio
    }

    /// Whether the oldest task must be waited for before another can start.
    pub(super) fn is_full(&self) -> bool {
        self.tasks.len() >= self.limit
    }

    /// Starts a task.
    pub(super) fn start(&mut self, task: impl Future<Output = T> + Send + 'static) {
        self.tasks.push_back(self.tokio.spawn(task));
    }

    /// Waits for the oldest task. `None` if there is none, or if `unless` ended before.
    pub(super) fn next(&mut self, unless: impl Future<Output = ()>) -> anyhow::Result<Option<T>> {
        let Some(task) = self.tasks.pop_front() else { return Ok(None) };
        let done = self.tokio.block_on(async {
            tokio::select! {
                biased;
                () = unless => None,
                done = task => Some(done),
            }
        });
        done.transpose().context("a request panicked")
    }
}
