//! The reference queue for requests: M/D/1, Poisson arrivals at one server that takes the same time for
//! each and serves them in the order of their arrival.
//!
//! A server that takes `s` for a request that is alone, batches nothing and adds nothing, is this queue.
//! So a scheduler wins or loses against its percentiles, whatever the machine.
//!
//! All figures are exact up to rounding. The number of requests in the system is that of the chain
//! embedded at departures. Its probabilities follow from the crossings between "at most n" and "more
//! than n" in both directions. The time that a request waits follows from those (Crommelin 1932; Franx
//! 2001 in the form that is used here). Only positive terms are added, so nothing cancels, however high
//! the load.
//!
//! Times are in any unit, rates per that unit.

/// Terms of a Poisson distribution of a mean below 1 that are smaller than this are left out.
const NEGLIGIBLE: f64 = 1e-18;
/// Most requests in the system that are looked at. Only loads within a millionth of 1 have a percentile
/// beyond.
const MOST_WAITING: usize = 1 << 22;
/// Halvings of an interval: all digits of a float.
const HALVINGS: usize = 60;

/// An M/D/1 queue in its steady state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Queue {
    service: f64,
    load: f64,
}

impl Queue {
    /// A queue whose requests take `service` each and come `rate` per unit of time. `None` if it has no
    /// steady state, or the numbers mean nothing.
    pub(crate) fn new(service: f64, rate: f64) -> Option<Self> {
        let load = service * rate;
        (service > 0.0 && rate >= 0.0 && load < 1.0).then_some(Self { service, load })
    }

    /// The time from arrival to answer that this share of the requests does not exceed. `None` if the
    /// load is too close to 1.
    pub(crate) fn sojourn(self, share: f64) -> Option<f64> {
        let mut most = 16;
        let waiting = loop {
            let waiting = self.waiting_at_most(most);
            if self.waits_within(most as f64, &waiting) >= share {
                break waiting;
            }
            most *= 2;
            if most > MOST_WAITING {
                return None;
            }
        };
        if self.waits_within(0.0, &waiting) >= share {
            return Some(self.service);
        }
        let wait = bisect(0.0, most as f64, |wait| self.waits_within(wait, &waiting) < share);
        Some((1.0 + wait) * self.service)
    }

    /// The share of requests that are answered within `time` of their arrival.
    fn answered_within(self, time: f64) -> f64 {
        let wait = time / self.service - 1.0;
        if wait < 0.0 {
            return 0.0;
        }
        self.waits_within(wait, &self.waiting_at_most(wait as usize))
    }

    /// The share of requests that wait no longer than `wait` services. `waiting` must reach up to `wait`.
    fn waits_within(self, wait: f64, waiting: &[f64]) -> f64 {
        let whole = wait.floor() as usize;
        // Mean number of requests that arrive while the current service has this much left before the
        // wait would be too long.
        let mean = self.load * (1.0 - (wait - wait.floor()));
        let terms = poisson(mean);
        terms.iter().zip(waiting[..=whole].iter().rev()).map(|(term, waiting)| term * waiting).sum()
    }

    /// Element `n`: the probability that at most `n` requests wait, the one in service not counted. Up
    /// to `most`.
    fn waiting_at_most(self, most: usize) -> Vec<f64> {
        let arrivals = poisson(self.load);
        let none = arrivals[0];
        let mut at_least = arrivals;
        for index in (1..at_least.len()).rev() {
            at_least[index - 1] += at_least[index];
        }
        let at_least = |count: usize| at_least.get(count).copied().unwrap_or(0.0);
        // Probabilities of 0, 1, ... requests in the system.
        let mut states = vec![1.0 - self.load];
        for n in 0..=most {
            // From the empty system, `n + 1` arrivals lead above `n`; from `i` requests, `n + 2 - i`. A
            // service without arrivals leads down.
            let first = (n + 2).saturating_sub(40).max(1);
            let from_others: f64 = (first..=n).map(|i| states[i] * at_least(n + 2 - i)).sum();
            states.push((states[0] * at_least(n + 1) + from_others) / none);
        }
        let mut sum = states[0];
        states[1..]
            .iter()
            .map(|state| {
                sum += state;
                sum
            })
            .collect()
    }
}

/// The highest rate at which this share of the requests is answered within `objective`. 0 if one alone
/// takes longer.
pub(crate) fn highest_rate(service: f64, share: f64, objective: f64) -> f64 {
    if service <= 0.0 || service > objective {
        return 0.0;
    }
    let holds =
        |rate: f64| Queue::new(service, rate).is_some_and(|queue| queue.answered_within(objective) >= share);
    bisect(0.0, 1.0 / service, holds)
}

/// Where `below` turns from true to false, between two numbers.
fn bisect(mut low: f64, mut high: f64, below: impl Fn(f64) -> bool) -> f64 {
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(low, high);
        if below(middle) { low = middle } else { high = middle }
    }
    low
}

/// Probabilities of 0, 1, ... events, of a mean of at most 1. Fewer than 40 of them matter.
fn poisson(mean: f64) -> Vec<f64> {
    let mut terms = vec![(-mean).exp()];
    let mut last = terms[0];
    while last > NEGLIGIBLE {
        last *= mean / terms.len() as f64;
        terms.push(last);
    }
    terms
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SplitMix64, for arrivals.
    struct Random(u64);

    impl Random {
        fn gap(&mut self, rate: f64) -> f64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            let unit = (((z ^ (z >> 31)) >> 11) + 1) as f64 / (1u64 << 53) as f64;
            -unit.ln() / rate
        }
    }

    #[test]
    fn most_requests_of_an_idle_queue_do_not_wait() {
        let queue = Queue::new(20.0, 0.3 / 20.0).unwrap();
        assert_eq!(queue.sojourn(0.5), Some(20.0));
        assert!((queue.answered_within(20.0) - 0.7).abs() < 1e-12, "1 - load find nobody before them");
        assert_eq!(queue.answered_within(19.9), 0.0);
    }

    #[test]
    fn the_mean_wait_is_that_of_pollaczek_and_khinchine() {
        for load in [0.1, 0.5, 0.9, 0.97] {
            let queue = Queue::new(1.0, load).unwrap();
            let most = 2000;
            let waiting = queue.waiting_at_most(most);
            // The integral of what is not within t, by the midpoint rule.
            let step = 1.0 / 16.0;
            let points = (0..most * 16).map(|i| (f64::from(i as u32) + 0.5) * step);
            let mean: f64 = points.map(|t| (1.0 - queue.waits_within(t, &waiting)) * step).sum();
            let known = load / (2.0 * (1.0 - load));
            assert!((mean - known).abs() < 1e-3 * known, "load {load}: {mean}, {known}");
        }
    }

    #[test]
    fn percentiles_are_those_of_a_long_simulation() {
        for load in [0.3, 0.5, 0.8] {
            let (mut random, mut left) = (Random(7), 0.0_f64);
            let mut times: Vec<f64> = (0..400_000)
                .map(|_| {
                    left = (left - random.gap(load)).max(0.0) + 1.0;
                    left
                })
                .collect();
            times.sort_by(f64::total_cmp);
            let queue = Queue::new(1.0, load).unwrap();
            for share in [0.5, 0.9, 0.99] {
                let simulated = times[(share * times.len() as f64) as usize];
                let exact = queue.sojourn(share).unwrap();
                assert!((simulated - exact).abs() < 0.02 * exact, "{load}, {share}: {simulated}, {exact}");
            }
        }
    }

    #[test]
    fn the_highest_rate_just_holds_the_objective() {
        for service in [2.0, 20.0, 60.0] {
            let rate = highest_rate(service, 0.99, 100.0);
            let p99 = Queue::new(service, rate).and_then(|queue| queue.sojourn(0.99)).unwrap();
            // Where the objective lies between two whole services, the share jumps nowhere: the wait has
            // one atom, at 0.
            assert!((p99 - 100.0).abs() < 1e-6, "{service}: {rate}, {p99}");
        }
        assert_eq!(highest_rate(101.0, 0.99, 100.0), 0.0);
    }

    #[test]
    fn what_has_no_steady_state_has_no_percentiles() {
        assert_eq!(Queue::new(10.0, 0.1), None);
        assert_eq!(Queue::new(0.0, 1.0), None);
        assert_eq!(Queue::new(10.0, f64::NAN), None);
        let p99 = Queue::new(1.0, 0.999).and_then(|queue| queue.sojourn(0.99)).unwrap();
        // The tail falls by the factor e per 1 / (2 (1 - load)) services, nearly.
        assert!((2200.0..2400.0).contains(&p99), "{p99}");
    }
}
