//! All limits, checked before any work is done, and the resources that a request will need.
//!
//! Work is counted in rows. A row that attends to many positions takes longer than one that attends
//! to few, so it counts as more than one row of work; see [`SchedulerConfig::pairs_per_row`].
//!
//! Invariant: a request that passes [`Limits::demand`] is admitted by an idle scheduler. So the
//! head of the queue is never stuck.

use std::ops::Range;

use beamline_kv_cache::CacheConfig;
use beamline_model::step::ContextShape;

use crate::request::{Refusal, Request};
use crate::time::Micros;

/// How much work the scheduler accepts, and how much it does at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Most requests that may wait for admission.
    pub max_queued: usize,
    /// Most requests that may run at the same time: the slots of the model.
    pub max_running: usize,
    /// Most context positions of one request.
    pub max_context: usize,
    /// Most beams of one request.
    pub max_beam_width: usize,
    /// Most expansions of one request.
    pub max_generated_steps: usize,
    /// Most rows for which all running requests together may have been admitted: context positions
    /// that were not cached, plus beams times generated steps. This bounds how long an admitted
    /// request can take.
    pub max_running_cost: u64,
    /// Most context rows of one step.
    pub max_step_tokens: usize,
    /// Most context rows of one request in one step while others wait.
    pub max_chunk: usize,
    /// Most branch rows of one step.
    pub max_branch_rows: usize,
    /// Number of positions that a row attends to in the same time as its other work takes: the
    /// operations of a row without attention, divided by those of one position. Use the largest
    /// value if attention costs nothing.
    pub pairs_per_row: u64,
    /// How long a step should take while other requests wait, in microseconds. The measured curve
    /// turns this into a bound on the work of a step.
    pub max_step_time: Micros,
    /// Fewest rows that this bound leaves: fewer rows would take almost as long.
    pub min_step_rows: usize,
    /// How soon after its arrival a request should be answered, in microseconds. This is not a
    /// bound; it decides the order of service.
    pub objective: Micros,
    /// A request that takes long alone should be answered within this many times that time.
    pub stretch: u64,
    /// Percentage of the rows that goes to requests that missed their goal while others can still
    /// meet theirs. From 1 to 99.
    pub late_share: u64,
    /// The same percentage for batch requests, beside the requests that go before them.
    pub batch_share: u64,
    /// Most pages that one step moves to and from host memory while other requests wait for it,
    /// beyond those that it evicts. A context that comes back in more pages takes several steps, in
    /// which other requests go on.
    pub max_step_transfers: usize,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            max_queued: 1024,
            max_running: 128,
            max_context: 16_384,
            max_beam_width: 512,
            max_generated_steps: 64,
            max_running_cost: 1 << 20,
            max_step_tokens: 4096,
            max_chunk: 1024,
            max_branch_rows: 8192,
            pairs_per_row: u64::MAX,
            max_step_time: Micros(20_000),
            min_step_rows: 64,
            objective: Micros(100_000),
            stretch: 5,
            late_share: 25,
            batch_share: 10,
            max_step_transfers: 32,
        }
    }
}

/// Why a configuration cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The cache cannot be built.
    #[error("cache: {0}")]
    Cache(#[from] beamline_kv_cache::ConfigError),
    /// The limit of this name must be larger, or nothing could ever be done.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// The widest beam would never get its branch step.
    #[error("max_branch_rows is {rows}, less than max_beam_width, {width}")]
    BranchRows {
        /// Value of [`SchedulerConfig::max_branch_rows`].
        rows: usize,
        /// Value of [`SchedulerConfig::max_beam_width`].
        width: usize,
    },
    /// More slots than 32 bits can name.
    #[error("max_running is {0}, more than there are slots")]
    TooManySlots(usize),
}

/// The limits of one scheduler over one cache. They are cheap to copy, so a client can check a
/// request before submitting it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The limits that the operator set.
    pub config: SchedulerConfig,
    /// Number of pages of the cache.
    pub pages: usize,
    /// Context positions per page.
    pub page_size: usize,
    /// Words per context position.
    pub words_per_position: usize,
}

/// All resources that a request will need, computed once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Demand {
    /// Context positions that must lie in pages. A request that decodes needs all of them. A warm
    /// request needs only the whole pages that others may find.
    pub(crate) target: usize,
    /// Pages for these positions.
    pub(crate) context_pages: usize,
    /// Leading pages that other requests may find.
    pub(crate) shared_pages: usize,
    /// Pages for all branch rows.
    pub(crate) branch_pages: usize,
    /// Rows to compute when nothing is cached.
    pub(crate) cost: u64,
    /// Work to do when nothing is cached.
    pub(crate) work: u64,
}

impl Limits {
    /// Combines and checks the limits.
    ///
    /// # Errors
    ///
    /// When nothing could ever run, or not everything that the limits allow.
    pub fn new(config: SchedulerConfig, cache: &CacheConfig) -> Result<Self, ConfigError> {
        let limits = Self {
            config,
            pages: cache.pages as usize,
            page_size: cache.page_size as usize,
            words_per_position: cache.words_per_position as usize,
        };
        let positive = [
            ("max_queued", config.max_queued),
            ("max_running", config.max_running),
            ("max_context", config.max_context),
            ("max_beam_width", config.max_beam_width),
            ("max_step_tokens", config.max_step_tokens),
            ("max_chunk", config.max_chunk),
            ("min_step_rows", config.min_step_rows),
            ("late_share", config.late_share.min(100 - config.late_share.min(100)) as usize),
            ("batch_share", config.batch_share.min(100 - config.batch_share.min(100)) as usize),
            ("pairs_per_row", usize::from(config.pairs_per_row > 0)),
            ("pages", limits.pages),
            ("page_size", limits.page_size),
            ("words_per_position", limits.words_per_position),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero(name));
        }
        if config.max_branch_rows < config.max_beam_width {
            return Err(ConfigError::BranchRows {
                rows: config.max_branch_rows,
                width: config.max_beam_width,
            });
        }
        if u32::try_from(config.max_running).is_err() {
            return Err(ConfigError::TooManySlots(config.max_running));
        }
        Ok(limits)
    }

    /// Checks everything that does not depend on other requests.
    ///
    /// # Errors
    ///
    /// When the request could never be served.
    pub fn check<P>(&self, request: &Request<P>) -> Result<(), Refusal> {
        self.demand(request).map(|_| ())
    }

    /// Computes the resources that the request will need.
    pub(crate) fn demand<P>(&self, request: &Request<P>) -> Result<Demand, Refusal> {
        let Request { context_len: len, beam_width: width, generated_steps: steps, .. } = *request;
        let config = &self.config;
        if len == 0 {
            return Err(Refusal::EmptyContext);
        }
        if len > config.max_context {
            return Err(Refusal::ContextTooLong { len, limit: config.max_context });
        }
        let expected = len.saturating_mul(self.words_per_position);
        if request.words.len() != expected {
            return Err(Refusal::WordsMismatch { words: request.words.len(), expected });
        }
        if width > config.max_beam_width {
            return Err(Refusal::BeamTooWide { width, limit: config.max_beam_width });
        }
        if !request.is_warm() && !(1..=width).contains(&request.min_beam_width) {
            return Err(Refusal::BeamWidth { width, least: request.min_beam_width });
        }
        if !request.widths_fit() {
            return Err(Refusal::BeamWidths { steps, width });
        }
        if steps > config.max_generated_steps {
            return Err(Refusal::TooManySteps { steps, limit: config.max_generated_steps });
        }

        let shared_pages = request.reusable_pages(self.page_size);
        let target = if request.is_warm() { len.min(shared_pages * self.page_size) } else { len };
        if request.shape == ContextShape::Whole && target > config.max_step_tokens {
            return Err(Refusal::NeverInOneStep { len, limit: config.max_step_tokens });
        }
        let context_pages = target.div_ceil(self.page_size);
        let kept_steps = steps.saturating_sub(1).min(if request.keeps_branches { usize::MAX } else { 1 });
        let branch_pages = request.beams_of(kept_steps, width).div_ceil(self.page_size);
        let pages = context_pages.saturating_add(branch_pages);
        if pages > self.pages {
            return Err(Refusal::NeverFits { pages, pool: self.pages });
        }
        let cost = target.saturating_add(request.beams_of(steps, width)) as u64;
        if cost > config.max_running_cost {
            return Err(Refusal::TooExpensive { cost, limit: config.max_running_cost });
        }
        let work = self.context_work(0..target) + self.branch_work(request.beams_of(steps, width), target);
        Ok(Demand { target, context_pages, shared_pages, branch_pages, cost, work })
    }

    /// Number of words of a page.
    pub(crate) fn page_words(&self) -> usize {
        self.page_size * self.words_per_position
    }

    /// Work of the context rows at `positions`. Each row attends to those before it.
    pub(crate) fn context_work(&self, positions: Range<usize>) -> u64 {
        let rows = positions.len() as u64;
        let middle = (positions.start + positions.end) as u64 / 2;
        rows.saturating_add(rows.saturating_mul(middle) / self.config.pairs_per_row)
    }

    /// Work of `rows` rows that each attend to the whole context.
    pub(crate) fn branch_work(&self, rows: usize, context: usize) -> u64 {
        let rows = rows as u64;
        rows.saturating_add(rows.saturating_mul(context as u64) / self.config.pairs_per_row)
    }

    /// Number of context rows from position `start` that make up `work`; at least 1.
    pub(crate) fn context_rows_in(&self, work: u64, start: usize) -> usize {
        // Of r rows the mean attends to start + r/2 positions: r + r (start + r/2) / pairs = work.
        let pairs = u128::from(self.config.pairs_per_row.min(MOST_PAIRS));
        let (sum, work) = (pairs + start as u128, u128::from(work));
        let rows = (sum * sum + 2 * work * pairs).isqrt() - sum;
        usize::try_from(rows).unwrap_or(usize::MAX).max(1)
    }

    /// Number of branch rows over a context that make up `work`; at least 1.
    pub(crate) fn branch_rows_in(&self, work: u64, context: usize) -> usize {
        work_to_rows(work, context as u64, self.config.pairs_per_row)
    }
}

/// With more pairs per row than this, attention costs nothing. The square fits into 128 bits.
const MOST_PAIRS: u64 = 1 << 40;

/// Number of rows that make up `work` if each attends to `positions` positions; at least 1.
fn work_to_rows(work: u64, positions: u64, pairs_per_row: u64) -> usize {
    let [work, positions, pairs] = [work, positions, pairs_per_row].map(u128::from);
    let rows = work * pairs / (pairs + positions);
    usize::try_from(rows).unwrap_or(usize::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(pairs_per_row: u64) -> Limits {
        let config = SchedulerConfig { pairs_per_row, ..SchedulerConfig::default() };
        Limits { config, pages: 1, page_size: 32, words_per_position: 1 }
    }

    #[test]
    fn a_row_far_back_is_more_work_and_without_attention_all_rows_are_alike() {
        let costly = limits(1000);
        assert_eq!(costly.context_work(0..1000), 1500);
        assert_eq!(costly.context_work(1000..2000), 2500);
        assert_eq!(costly.branch_work(100, 3000), 400);
        let free = limits(u64::MAX);
        assert_eq!(free.context_work(5000..6000), 1000);
        assert_eq!(free.branch_work(100, 3000), 100);
    }

    #[test]
    fn rows_of_some_work_are_about_that_work() {
        for pairs in [100, 2000, u64::MAX] {
            let limits = limits(pairs);
            for (work, start) in [(400, 0), (400, 6000), (5000, 300)] {
                let rows = limits.context_rows_in(work, start);
                let found = limits.context_work(start..start + rows);
                assert!(found <= work * 5 / 4 && found >= work * 3 / 4, "{pairs} {work} {start}: {found}");
                let found = limits.branch_work(limits.branch_rows_in(work, start), start);
                assert!(found <= work && found + 61 >= work, "{pairs} {work} {start}: {found}");
            }
        }
        assert_eq!(limits(1).context_rows_in(1, 10_000), 1);
    }
}
