//! What is asked of the scheduler, and the reasons to say no at once.
//!
//! A request is plain data. What only the model understands travels in its payload, unread.

use std::sync::Arc;

use beamline_kv_cache::{Namespace, ReuseClass, SessionKey};
use beamline_model::step::ContextShape;

use crate::time::Micros;

/// Names a request from submission to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What a request may keep waiting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody waits for the answer: it should come within the objective.
    #[default]
    Interactive,
    /// It may wait: it is served where interactive requests leave room, and has its share in any
    /// case.
    Batch,
    /// It is served when nobody else wants to be, and is the first to be refused.
    Shadow,
}

/// One request: a context to compute, and beams to expand over it.
#[derive(Clone, Debug)]
pub struct Request<P> {
    /// Unique among the requests that have not ended. The engine gives its own.
    pub id: RequestId,
    /// Whose cached pages may be used: checkpoint and tenant.
    pub namespace: Namespace,
    /// The user whose newest chain of pages is remembered.
    pub session: Option<SessionKey>,
    /// Everything that goes into the context, `words_per_position` words per position. It is what
    /// pages are found by.
    pub words: Arc<[u32]>,
    /// Context positions.
    pub context_len: usize,
    /// Which positions another request may reuse.
    pub reuse: ReuseClass,
    /// Whether the context may be computed in parts.
    pub shape: ContextShape,
    /// Beams wanted; the most of any expansion, where they differ.
    pub beam_width: usize,
    /// Beams wanted of each expansion, where they differ.
    pub beam_widths: Option<Arc<[usize]>>,
    /// The fewest beams that are still an answer: `beam_width` when it may not be degraded. A beam
    /// that is narrowed to a width has no more than that after any expansion.
    pub min_beam_width: usize,
    /// Expansions: the first uses the last context row, each further one takes a branch step. 0
    /// only warms the cache and answers nothing.
    pub generated_steps: usize,
    /// Whether the rows of every branch step are kept: beams look back at their ancestors.
    /// Candidates, which are ranked in micro-batches of `beam_width`, do not: each branch step
    /// overwrites the one before.
    pub keeps_branches: bool,
    /// When the answer is of no more use.
    pub deadline: Option<Micros>,
    /// Who goes first.
    pub priority: Priority,
    /// For the model. The scheduler hands it on and never looks at it, so nothing of it can fail
    /// there.
    pub payload: Arc<P>,
}

impl<P> Request<P> {
    /// Whether the request only warms the cache.
    #[must_use]
    pub fn is_warm(&self) -> bool {
        self.generated_steps == 0
    }

    /// Beams wanted of an expansion.
    #[must_use]
    pub fn width_at(&self, expansion: usize) -> usize {
        self.beam_widths.as_ref().map_or(self.beam_width, |widths| widths[expansion])
    }

    /// Whether every expansion has a width, and none more than `beam_width`.
    pub(crate) fn widths_fit(&self) -> bool {
        let fits = |width: &usize| (1..=self.beam_width).contains(width);
        self.beam_widths
            .as_ref()
            .is_none_or(|widths| widths.len() == self.generated_steps && widths.iter().all(fits))
    }

    /// Beams of the first expansions together, none of which has more than `most`.
    pub(crate) fn beams_of(&self, expansions: usize, most: usize) -> usize {
        match &self.beam_widths {
            None => self.beam_width.min(most).saturating_mul(expansions),
            Some(widths) => widths[..expansions].iter().map(|&width| width.min(most)).sum(),
        }
    }

    /// The most beams that an expansion may have, so that those of the first expansions together
    /// are no more than `beams`; at least the fewest that are acceptable.
    pub(crate) fn widest_within(&self, expansions: usize, beams: usize) -> usize {
        let mut widths = self.min_beam_width..self.beam_width + 1;
        // Bisection: the number of beams grows with the width.
        while widths.len() > 1 {
            let middle = widths.start + widths.len() / 2;
            if self.beams_of(expansions, middle) <= beams {
                widths.start = middle;
            } else {
                widths.end = middle;
            }
        }
        widths.start
    }

    /// Leading pages of the context that may come from, or go to, another request. Of a context that
    /// is computed whole, a part is of no use: all of it, or none.
    pub(crate) fn reusable_pages(&self, page_size: usize) -> usize {
        match (self.reuse, self.shape) {
            (ReuseClass::Exact, _) => self.context_len.div_ceil(page_size),
            (_, ContextShape::Whole) => 0,
            (reuse, ContextShape::Causal) => reuse.reusable_positions(self.context_len) / page_size,
        }
    }

    /// Where the pages of the context are found. `page_words` is the number of words of a page.
    pub(crate) fn page_address(&self, page_words: usize) -> PageAddress {
        if self.reuse != ReuseClass::Exact {
            return PageAddress { namespace: self.namespace, words: Arc::clone(&self.words) };
        }
        let padding = self.words.len().next_multiple_of(page_words) - self.words.len();
        let words = self.words.iter().copied().chain(std::iter::repeat_n(0, padding)).collect();
        PageAddress { namespace: self.namespace.narrowed_to(&self.words), words }
    }

    /// Whether the deadline has come.
    pub(crate) fn is_late(&self, now: Micros) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }
}

/// What the pages of a context are found by.
#[derive(Clone, Debug)]
pub(crate) struct PageAddress {
    /// That of the request. For [`ReuseClass::Exact`], the part of it that only this context can name.
    pub(crate) namespace: Namespace,
    /// The words of the context. For [`ReuseClass::Exact`], filled up to whole pages.
    pub(crate) words: Arc<[u32]>,
}

/// Why a request was not accepted. Nothing was done for it and nothing is kept of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Overload: try again later.
    #[error("{limit} requests are waiting already")]
    QueueFull {
        /// [`SchedulerConfig::max_queued`](crate::SchedulerConfig::max_queued).
        limit: usize,
    },
    /// Overload: by the measured pace, the work at hand ends too late for the deadline.
    #[error("the answer would be late by {} ms: too much is waiting", late.0.div_ceil(1000))]
    Backlog {
        /// How much later than its deadline it would be answered.
        late: Micros,
    },
    /// The engine drains.
    #[error("shutting down")]
    ShuttingDown,
    /// It could only be late.
    #[error("the deadline has passed already")]
    DeadlinePassed,
    /// Another request of this id has not ended.
    #[error("a request with this id is in progress")]
    DuplicateId,
    /// Nothing to compute from.
    #[error("the context is empty")]
    EmptyContext,
    /// The context is over the limit.
    #[error("the context has {len} positions, the limit is {limit}")]
    ContextTooLong {
        /// Positions asked for.
        len: usize,
        /// [`SchedulerConfig::max_context`](crate::SchedulerConfig::max_context).
        limit: usize,
    },
    /// The context cannot be cut, and no step takes so many rows.
    #[error("the context has {len} positions and is computed in one step, which takes at most {limit}")]
    NeverInOneStep {
        /// Positions asked for.
        len: usize,
        /// [`SchedulerConfig::max_step_tokens`](crate::SchedulerConfig::max_step_tokens).
        limit: usize,
    },
    /// Words and positions disagree.
    #[error("the context has {words} words, its positions need {expected}")]
    WordsMismatch {
        /// Words given.
        words: usize,
        /// Positions times words per position.
        expected: usize,
    },
    /// No beams, or fewer than the least.
    #[error("a beam width of {width} with a least width of {least} means nothing")]
    BeamWidth {
        /// Beams asked for.
        width: usize,
        /// Least beams asked for.
        least: usize,
    },
    /// Widths of the expansions that are not one for each, or exceed the widest.
    #[error("a width for each of {steps} expansions, and none over {width}, was expected")]
    BeamWidths {
        /// Expansions asked for.
        steps: usize,
        /// The widest beam.
        width: usize,
    },
    /// The beam is over the limit.
    #[error("{width} beams were asked for, the limit is {limit}")]
    BeamTooWide {
        /// Beams asked for.
        width: usize,
        /// [`SchedulerConfig::max_beam_width`](crate::SchedulerConfig::max_beam_width).
        limit: usize,
    },
    /// The decode is over the limit.
    #[error("{steps} generated steps were asked for, the limit is {limit}")]
    TooManySteps {
        /// Expansions asked for.
        steps: usize,
        /// [`SchedulerConfig::max_generated_steps`](crate::SchedulerConfig::max_generated_steps).
        limit: usize,
    },
    /// It would not fit into an empty cache.
    #[error("{pages} pages are needed, the cache has {pool}")]
    NeverFits {
        /// Pages of context and branches.
        pages: usize,
        /// Pages of the cache.
        pool: usize,
    },
    /// It would not be admitted by an idle engine.
    #[error("the request costs {cost} rows, the limit is {limit}")]
    TooExpensive {
        /// Context positions plus beams times generated steps.
        cost: u64,
        /// [`SchedulerConfig::max_running_cost`](crate::SchedulerConfig::max_running_cost).
        limit: u64,
    },
}
