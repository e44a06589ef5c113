//! The scheduler's gauges and counters, for metrics and tests.

use crate::event::{Ended, Ending};

/// Gauges and counters of one scheduler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Gauge: requests waiting.
    pub queued: u64,
    /// Gauge: requests in slots.
    pub running: u64,
    /// Counter: requests accepted into the queue.
    pub accepted: u64,
    /// Counter: requests refused on arrival.
    pub refused: u64,
    /// Counter: requests answered, warm ones included.
    pub finished: u64,
    /// Counter: requests that could not be computed.
    pub failed: u64,
    /// Counter: requests whose deadline came first.
    pub expired: u64,
    /// Counter: requests whose client no longer wanted the answer.
    pub cancelled: u64,
    /// Counter: requests dropped from the queue because their deadline had become impossible.
    pub dropped: u64,
    /// Counter: answers from a narrowed beam.
    pub degraded: u64,
    /// Counter: requests tried again alone after a failed step.
    pub retried: u64,
    /// Counter: context positions of admitted requests that were found in device pages.
    pub hit_tokens: u64,
    /// Counter: context positions of admitted requests that were found in host memory.
    pub restored_tokens: u64,
    /// Counter: pages that came back from host memory.
    pub restored_pages: u64,
    /// Counter: context positions of admitted requests that were found in neither.
    pub missed_tokens: u64,
    /// Counter: steps that succeeded.
    pub steps: u64,
    /// Counter: steps that failed.
    pub failed_steps: u64,
    /// Gauge: failed steps since the last one that succeeded. It grows when the model never
    /// recovers.
    pub failed_in_a_row: u64,
    /// Counter: context rows computed.
    pub context_rows: u64,
    /// Counter: branch rows computed.
    pub branch_rows: u64,
    /// Counter: microseconds that the successful steps took.
    pub step_micros: u64,
}

impl SchedulerStats {
    /// Counts a request that has ended.
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
