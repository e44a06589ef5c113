//! The minimum pace of a transfer: the server does not wait for a peer that sends or takes next to
//! nothing.
//!
//! This is a pure state machine: time is an argument.

use std::time::{Duration, Instant};

/// Longest window. A longer one has no effect, and would end after the clock does.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// The minimum pace of a peer: in every `window`, at least `bytes` must move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeastPace {
    /// Time in which `bytes` must move.
    pub window: Duration,
    /// Number of bytes that must move in each window.
    pub bytes: u64,
}

impl LeastPace {
    /// A minimum rate that must hold in each window.
    pub fn new(window: Duration, bytes_per_second: u64) -> Self {
        let window = window.min(LONGEST);
        let bytes = window.as_secs_f64() * bytes_per_second as f64;
        Self { window, bytes: (bytes as u64).max(1) }
    }
}

/// A transfer under way.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    least: LeastPace,
    began: Instant,
    moved: u64,
}

impl Pace {
    /// A transfer that begins now.
    pub fn new(least: LeastPace, now: Instant) -> Self {
        Self { least, began: now, moved: 0 }
    }

    /// Records that bytes have moved. Once there are enough, the next window begins.
    pub fn moved(&mut self, now: Instant, bytes: u64) {
        self.moved = self.moved.saturating_add(bytes);
        if self.moved >= self.least.bytes {
            (self.began, self.moved) = (now, 0);
        }
    }

    /// The start of the current window, in which not enough bytes have moved yet.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// The moment at which the transfer is too slow, unless enough bytes move before.
    pub fn deadline(&self) -> Instant {
        self.began + self.least.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trickle_is_late_and_a_steady_transfer_never_is() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let least = LeastPace::new(Duration::from_secs(5), 1000);
        let mut trickle = Pace::new(least, start);
        for second in 1..5 {
            trickle.moved(at(second), 999);
            assert_eq!(trickle.deadline(), at(5));
        }
        let mut steady = Pace::new(least, start);
        for second in 1..1000 {
            assert!(at(second) <= steady.deadline());
            steady.moved(at(second), 1000);
        }
        // A burst counts only for its own window.
        let mut burst = Pace::new(least, start);
        burst.moved(at(1), 1 << 40);
        assert_eq!(burst.deadline(), at(6));
    }
}
