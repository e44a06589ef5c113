//! Where the work before the engine is done: looking up ids, composing filters, tokenising.
//!
//! Two threads serve all of HTTP, so long work must not run on them: a long prompt, long lists, a
//! filter by tags over a large catalog. The work is estimated. Work over the threshold waits for a
//! place beside the engine's cores. There are few such places, so the other requests keep their CPU
//! time, and the memory of requests under preparation is bounded.

use std::sync::LazyLock;
use std::thread::available_parallelism;
use std::time::Duration;

use beamline_scheduler::Micros;
use tokio::sync::Semaphore;

use super::family::Family;
use super::{Served, Service};
use crate::api::{HistoryAction, RecommendRequest};
use crate::error::Error;

/// A request with more work than this is prepared on another thread than those that serve HTTP.
const LONG: Duration = Duration::from_micros(500);
/// One core in this many may prepare long requests.
const CORES_PER_PLACE: usize = 4;

// Times of single operations on a slow core, in nanoseconds.
const TOKENISE_BYTE: usize = 200;
const TOKENISE_ITEM: usize = 10_000;
const LOOK_UP: usize = 200;
const PASS_ITEM: usize = 2;

/// Places for long preparations. They belong to the whole process, because the cores do.
static PLACES: LazyLock<Semaphore> = LazyLock::new(|| {
    let cores = available_parallelism().map_or(1, usize::from);
    Semaphore::new((cores / CORES_PER_PLACE).max(1))
});

/// Estimated time to prepare a request for items.
pub(super) fn work(served: &Served, request: &RecommendRequest) -> Duration {
    let prompt = request.prompt.as_ref().map_or(0, String::len);
    let filters = request.filters.as_ref();
    let lists = filters.map_or(0, |filters| {
        let allowed = filters.allow_items.as_ref().map_or(0, Vec::len);
        filters.exclude_items.len() + allowed + filters.require_tags.len() + filters.forbid_tags.len()
    });
    let by_tags = filters.is_some_and(|f| !f.require_tags.is_empty() || !f.forbid_tags.is_empty());
    let passed = if by_tags { served.catalog.num_items() } else { 0 };
    let nanos = prompt
        .saturating_mul(TOKENISE_BYTE)
        .saturating_add(lists.saturating_mul(LOOK_UP))
        .saturating_add(passed.saturating_mul(PASS_ITEM));
    nanoseconds(nanos).saturating_add(work_of_history(served, request.history.as_deref().unwrap_or_default()))
}

/// Estimated time to turn a history into a context.
pub(super) fn work_of_history(served: &Served, history: &[HistoryAction]) -> Duration {
    let each = match &served.family {
        // Items of such a history are tokenised as text.
        Family::Tokens(model) if !model.convention.composes() => TOKENISE_ITEM,
        Family::Tokens(_) | Family::Hstu(_) => LOOK_UP,
    };
    nanoseconds(history.len().saturating_mul(each))
}

fn nanoseconds(count: usize) -> Duration {
    Duration::from_nanos(count as u64)
}

impl Service {
    /// Prepares a request. Short work is done here. Long work waits for a place, at most until the
    /// deadline.
    pub(super) async fn prepare<T>(
        &self,
        work: Duration,
        deadline: Option<Micros>,
        prepare: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        if work <= LONG {
            return prepare();
        }
        let place = match deadline {
            None => PLACES.acquire().await,
            Some(deadline) => {
                let left = Duration::from_micros(deadline.since(self.served.engine.now()).0);
                let waited = tokio::time::timeout(left, PLACES.acquire()).await;
                waited.map_err(|_| Error::DeadlineExceeded)?
            }
        };
        let _place = place.map_err(Error::internal)?;
        tokio::task::block_in_place(prepare)
    }
}
