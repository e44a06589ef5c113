//! What is going on, and what has happened: for metrics and tests.

use crate::event::{Ended, Ending};

/// Gauges and counters of one scheduler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Requests waiting now.
    pub queued: u64,
    /// Requests in slots now.
    pub running: u64,
    /// Requests taken into the queue.
    pub accepted: u64,
    /// Requests not taken.
    pub refused: u64,
    /// Requests answered, warm ones included.
    pub finished: u64,
    /// Requests that could not be computed.
    pub failed: u64,
    /// Requests whose deadline came first.
    pub expired: u64,
    /// Requests that nobody wanted any more.
    pub cancelled: u64,
    /// Requests dropped from the queue, because their deadline had become impossible.
    pub dropped: u64,
    /// Answers over a narrowed beam.
    pub degraded: u64,
    /// Requests tried again alone after a failed step.
    pub retried: u64,
    /// Context positions of admitted requests that were found in device pages.
    pub hit_tokens: u64,
    /// Context positions of admitted requests that were found in host memory.
    pub restored_tokens: u64,
    /// Pages that came back from host memory.
    pub restored_pages: u64,
    /// Context positions of admitted requests that were found in neither.
    pub missed_tokens: u64,
    /// Steps that succeeded.
    pub steps: u64,
    /// Steps that failed.
    pub failed_steps: u64,
    /// Failed steps since the last one that succeeded: a model that never recovers shows here.
    pub failed_in_a_row: u64,
    /// Context rows computed.
    pub context_rows: u64,
    /// Branch rows computed.
    pub branch_rows: u64,
    /// Microseconds that the successful steps took.
    pub step_micros: u64,
}

impl SchedulerStats {
    /// A request has ended.
    pub(super) fn count<A>(&mut self, ended: &Ended<A>) {
        match ended.ending {
            Ending::Finished(_) | Ending::Warmed => {
                self.finished += 1;
                self.degraded += u64::from(ended.usage.degraded.is_some());
            }
            Ending::Failed(_) => self.failed += 1,
            Ending::Expired => self.expired += 1,
            Ending::Dropped(_) => self.dropped += 1,
            Ending::Cancelled => self.cancelled += 1,
        }
    }
}
