//! The least pace of a transfer: a peer that sends or takes next to nothing is not waited for.
//!
//! A pure state machine: time is an argument.

use std::time::{Duration, Instant};

/// A longer window is none, and would end after the clock does.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// How slow a peer may be: in every `window`, at least `bytes` must move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeastPace {
    /// How long a peer may take for `bytes`.
    pub window: Duration,
    /// What must have moved by then.
    pub bytes: u64,
}

impl LeastPace {
    /// A least rate that holds from one window to the next.
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
    /// A transfer that begins.
    pub fn new(least: LeastPace, now: Instant) -> Self {
        Self { least, began: now, moved: 0 }
    }

    /// Bytes have moved. Once there are enough, the next window begins.
    pub fn moved(&mut self, now: Instant, bytes: u64) {
        self.moved = self.moved.saturating_add(bytes);
        if self.moved >= self.least.bytes {
            (self.began, self.moved) = (now, 0);
        }
    }

    /// When the window began in which not enough has moved yet.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// When the transfer is too slow, unless enough moves before.
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
        // A burst pays for its own window only.
        let mut burst = Pace::new(least, start);
        burst.moved(at(1), 1 << 40);
        assert_eq!(burst.deadline(), at(6));
    }
}
