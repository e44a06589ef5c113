//! The requests of the scheduler, and the reasons to refuse one at once.
//!
//! A request is plain data. The payload, which only the model understands, travels unread.

use std::sync::Arc;

use beamline_kv_cache::{Namespace, ReuseClass, SessionKey};
use beamline_model::step::ContextShape;

use crate::time::Micros;

/// Names a request from submission to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// How urgent a request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A client waits for the answer, which should come within the objective.
    #[default]
    Interactive,
    /// May wait: it is served where interactive requests leave room, and has its share in any case.
    Batch,
    /// Served only when no other request wants to be; the first to be refused.
    Shadow,
}

/// One request: a context to compute, and beams to expand over it.
#[derive(Clone, Debug)]
pub struct Request<P> {
    /// Unique among the requests that have not ended. The engine assigns its own.
    pub id: RequestId,
    /// Checkpoint and tenant whose cached pages the request may use.
    pub namespace: Namespace,
    /// The user whose newest chain of pages is remembered.
    pub session: Option<SessionKey>,
    /// Everything that goes into the context, `words_per_position` words per position. Pages are
    /// found by these words.
    pub words: Arc<[u32]>,
    /// Number of context positions.
    pub context_len: usize,
    /// Which positions another request may reuse.
    pub reuse: ReuseClass,
    /// Whether the context may be computed in parts.
    pub shape: ContextShape,
    /// Number of beams; the largest of all expansions, where they differ.
    pub beam_width: usize,
    /// Number of beams of each expansion, where they differ.
    pub beam_widths: Option<Arc<[usize]>>,
    /// The fewest acceptable beams: `beam_width` when the beam may not be narrowed. A beam that is
    /// narrowed to a width has no more than that after any expansion.
    pub min_beam_width: usize,
    /// Number of expansions. The first uses the last context row, each further one takes a branch
    /// step. 0 only warms the cache and answers nothing.
    pub generated_steps: usize,
    /// Whether the rows of every branch step are kept, as for beams, which attend to their
    /// ancestors. Candidates, which are ranked in micro-batches of `beam_width`, do not: each
    /// branch step overwrites the one before.
    pub keeps_branches: bool,
    /// The moment after which the answer is useless.
    pub deadline: Option<Micros>,
    /// How urgent the request is.
    pub priority: Priority,
    /// Input for the model. The scheduler passes it on without looking at it, so its contents
    /// cannot make the scheduler fail.
    pub payload: Arc<P>,
}

impl<P> Request<P> {
    /// Whether the request only warms the cache.
    #[must_use]
    pub fn is_warm(&self) -> bool {
        self.generated_steps == 0
    }

    /// Number of beams of an expansion.
    #[must_use]
    pub fn width_at(&self, expansion: usize) -> usize {
        self.beam_widths.as_ref().map_or(self.beam_width, |widths| widths[expansion])
    }

    /// Whether every expansion has a width, and none exceeds `beam_width`.
    pub(crate) fn widths_fit(&self) -> bool {
        let fits = |width: &usize| (1..=self.beam_width).contains(width);
        self.beam_widths
            .as_ref()
            .is_none_or(|widths| widths.len() == self.generated_steps && widths.iter().all(fits))
    }

    /// Total beams of the first `expansions` expansions, where none has more than `most`.
    pub(crate) fn beams_of(&self, expansions: usize, most: usize) -> usize {
        match &self.beam_widths {
            None => self.beam_width.min(most).saturating_mul(expansions),
            Some(widths) => widths[..expansions].iter().map(|&width| width.min(most)).sum(),
        }
    }

    /// The most beams per expansion with which the first expansions together have no more than
    /// `beams`; at least the fewest that are acceptable.
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

    /// Leading pages of the context that may be shared with other requests. A context that is
    /// computed whole shares all of its pages or none.
    pub(crate) fn reusable_pages(&self, page_size: usize) -> usize {
        match (self.reuse, self.shape) {
            (ReuseClass::Exact, _) => self.context_len.div_ceil(page_size),
            (_, ContextShape::Whole) => 0,
            (reuse, ContextShape::Causal) => reuse.reusable_positions(self.context_len) / page_size,
        }
    }

    /// The address of the context's pages. `page_words` is the number of words of a page.
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

/// The key by which the pages of a context are found.
#[derive(Clone, Debug)]
pub(crate) struct PageAddress {
    /// The request's namespace. For [`ReuseClass::Exact`], the part that only this context can
    /// address.
    pub(crate) namespace: Namespace,
    /// The words of the context. For [`ReuseClass::Exact`], padded to whole pages.
    pub(crate) words: Arc<[u32]>,
}

/// Why a request was not accepted. No work was done and nothing is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Overload: try again later.
    #[error("{limit} requests are waiting already")]
    QueueFull {
        /// Value of [`SchedulerConfig::max_queued`](crate::SchedulerConfig::max_queued).
        limit: usize,
    },
    /// Overload: by the measured pace, the pending work ends too late for the deadline.
    #[error("the answer would be late by {} ms: too much is waiting", late.0.div_ceil(1000))]
    Backlog {
        /// How much later than its deadline the request would be answered.
        late: Micros,
    },
    /// The engine is draining.
    #[error("shutting down")]
    ShuttingDown,
    /// The deadline had passed on arrival.
    #[error("the deadline has passed already")]
    DeadlinePassed,
    /// Another request with this id has not ended.
    #[error("a request with this id is in progress")]
    DuplicateId,
    /// The context has no positions.
    #[error("the context is empty")]
    EmptyContext,
    /// The context exceeds the limit.
    #[error("the context has {len} positions, the limit is {limit}")]
    ContextTooLong {
        /// Number of positions of the context.
        len: usize,
        /// Value of [`SchedulerConfig::max_context`](crate::SchedulerConfig::max_context).
        limit: usize,
    },
    /// The context cannot be cut, and it exceeds the rows of any step.
    #[error("the context has {len} positions and is computed in one step, which takes at most {limit}")]
    NeverInOneStep {
        /// Number of positions of the context.
        len: usize,
        /// Value of [`SchedulerConfig::max_step_tokens`](crate::SchedulerConfig::max_step_tokens).
        limit: usize,
    },
    /// The numbers of words and positions do not match.
    #[error("the context has {words} words, its positions need {expected}")]
    WordsMismatch {
        /// Number of words in the request.
        words: usize,
        /// Positions times words per position.
        expected: usize,
    },
    /// The beam width is zero, or less than the least acceptable one.
    #[error("a beam width of {width} with a least width of {least} means nothing")]
    BeamWidth {
        /// Number of beams requested.
        width: usize,
        /// Least acceptable number of beams.
        least: usize,
    },
    /// The widths do not match the expansions, or one exceeds the widest.
    #[error("a width for each of {steps} expansions, and none over {width}, was expected")]
    BeamWidths {
        /// Number of expansions requested.
        steps: usize,
        /// Width of the widest beam.
        width: usize,
    },
    /// The beam exceeds the limit.
    #[error("{width} beams were asked for, the limit is {limit}")]
    BeamTooWide {
        /// Number of beams requested.
        width: usize,
        /// Value of [`SchedulerConfig::max_beam_width`](crate::SchedulerConfig::max_beam_width).
        limit: usize,
    },
    /// The number of expansions exceeds the limit.
    #[error("{steps} generated steps were asked for, the limit is {limit}")]
    TooManySteps {
        /// Number of expansions requested.
        steps: usize,
        /// Value of
        /// [`SchedulerConfig::max_generated_steps`](crate::SchedulerConfig::max_generated_steps).
        limit: usize,
    },
    /// The request would not fit into an empty cache.
    #[error("{pages} pages are needed, the cache has {pool}")]
    NeverFits {
        /// Pages of context and branches together.
        pages: usize,
        /// Number of pages of the cache.
        pool: usize,
    },
    /// An idle engine would not admit the request.
    #[error("the request costs {cost} rows, the limit is {limit}")]
    TooExpensive {
        /// Context positions plus beams times generated steps.
        cost: u64,
        /// Value of
        /// [`SchedulerConfig::max_running_cost`](crate::SchedulerConfig::max_running_cost).
        limit: u64,
    },
}
