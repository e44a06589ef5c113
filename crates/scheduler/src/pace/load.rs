//! How busy the model is, and how much time saved is worth.
//!
//! A moment that is saved while requests wait is saved for all that arrive before the next pause.
//! In a queue whose server is busy for a part `load` of the time, that is `1 / (1 - load)` times on
//! average.

use crate::time::Micros;

/// Time over which the load is averaged, in microseconds.
const WINDOW: f64 = 1_000_000.0;
/// Most that a moment is worth: at a load of one it would have no bound.
const MOST: f64 = 16.0;

/// The fraction of the time in which steps run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Load {
    busy: f64,
    last: Micros,
}

impl Load {
    /// Records that a step that took `took` has ended at `now`.
    pub(super) fn observe(&mut self, now: Micros, took: Micros) {
        let elapsed = now.since(self.last).0.max(took.0).max(1) as f64;
        self.last = now;
        let weight = (elapsed / WINDOW).min(1.0);
        self.busy += (took.0 as f64 / elapsed - self.busy) * weight;
    }

    /// Factor by which time saved now is worth more than itself; from 1 to 16.
    pub(super) fn worth(&self) -> u64 {
        // The cast from a float saturates.
        (1.0 / (1.0 - self.busy).max(1.0 / MOST)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_worth_more_the_less_of_it_is_left() {
        let worth = |busy: u64| {
            let mut load = Load::default();
            for step in 1..200 {
                load.observe(Micros(step * 20_000), Micros(busy * 200));
            }
            load.worth()
        };
        assert_eq!([worth(0), worth(40), worth(60), worth(82), worth(100)], [1, 1, 2, 5, 16]);
    }
}
