//! When requests arrive. The arrivals are the same for every policy, except those of clients that
//! wait for their answers.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::curve::Visit;
use crate::random::Random;

/// Requests of one kind.
#[derive(Clone, Debug)]
pub struct Class {
    /// Name of the class.
    pub name: &'static str,
    /// Number of the tenant that sends the requests.
    pub tenant: u8,
    /// The work of each request.
    pub visit: Visit,
    /// Time after which an answer is useless, in microseconds; `None` without a deadline.
    pub patience: Option<u64>,
    /// When the requests arrive.
    pub arrivals: Arrivals,
}

/// When requests arrive. All times are microseconds from the start.
#[derive(Clone, Debug)]
pub enum Arrivals {
    /// At random times, with a rate for each phase.
    Poisson(Vec<Phase>),
    /// Several at once, at a fixed interval.
    Bursts {
        /// Microseconds from one burst to the next.
        every: u64,
        /// Number of requests per burst.
        size: usize,
        /// Time after which no burst comes, in microseconds.
        until: u64,
    },
    /// Clients that send the next request as soon as the last one was answered.
    Closed {
        /// Number of clients.
        clients: usize,
        /// Microseconds that a client waits after a refusal.
        retry: u64,
        /// Time after which no request is sent, in microseconds.
        until: u64,
    },
}

/// A period with a constant rate.
#[derive(Clone, Copy, Debug)]
pub struct Phase {
    /// End of the period, in microseconds from the start.
    pub until: u64,
    /// Rate, in requests per second.
    pub per_second: f64,
}

/// A request that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Number of the request, by arrival.
    pub id: u64,
    /// Index of the request's class.
    pub class: usize,
    /// Time of arrival, in microseconds.
    pub arrived: u64,
}

/// The end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    /// The request that ended.
    pub job: Job,
    /// Time of the end, in microseconds.
    pub ended: u64,
    /// How the request ended.
    pub ending: End,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The request was answered.
    Answered,
    /// The request was refused on arrival.
    Refused,
    /// The request was accepted and given up for its deadline.
    Lost,
}

/// Arrivals in order of time.
#[derive(Debug)]
pub struct Traffic<'a> {
    classes: &'a [Class],
    /// Time, a number that orders equal times, and class of each known arrival.
    coming: BinaryHeap<Reverse<(u64, u64, usize)>>,
    planned: u64,
    taken: u64,
}

impl<'a> Traffic<'a> {
    /// Arrivals that are known before the first answer.
    #[must_use]
    pub fn new(classes: &'a [Class], seed: u64) -> Self {
        let mut traffic = Self { classes, coming: BinaryHeap::new(), planned: 0, taken: 0 };
        for (index, class) in classes.iter().enumerate() {
            match &class.arrivals {
                Arrivals::Poisson(phases) => {
                    traffic.poisson(index, phases, &mut Random::new(seed + index as u64));
                }
                &Arrivals::Bursts { every, size, until } => {
                    for at in (1..).map(|burst| burst * every).take_while(|at| *at < until) {
                        (0..size).for_each(|_| traffic.plan(at, index));
                    }
                }
                &Arrivals::Closed { clients, .. } => (0..clients).for_each(|_| traffic.plan(0, index)),
            }
        }
        traffic
    }

    fn poisson(&mut self, class: usize, phases: &[Phase], random: &mut Random) {
        let mut from = 0.0;
        for phase in phases {
            let (mut at, until) = (from, phase.until as f64);
            let mean = 1e6 / phase.per_second;
            loop {
                at += random.gap(mean);
                // With a rate of zero, the first request never arrives.
                if at >= until {
                    break;
                }
                self.plan(at as u64, class);
            }
            from = until;
        }
    }

    fn plan(&mut self, at: u64, class: usize) {
        self.coming.push(Reverse((at, self.planned, class)));
        self.planned += 1;
    }

    /// Time of the next arrival.
    #[must_use]
    pub fn next_at(&self) -> Option<u64> {
        self.coming.peek().map(|Reverse((at, ..))| *at)
    }

    /// Takes the next request.
    pub fn next_job(&mut self) -> Option<Job> {
        let Reverse((arrived, _, class)) = self.coming.pop()?;
        self.taken += 1;
        Some(Job { id: self.taken - 1, class, arrived })
    }

    /// Records that a request ended: a client that waited for it sends its next one.
    pub fn over(&mut self, fate: &Fate) {
        if let Arrivals::Closed { retry, until, .. } = self.classes[fate.job.class].arrivals {
            let pause = if fate.ending == End::Answered { 0 } else { retry };
            if fate.ended + pause < until {
                self.plan(fate.ended + pause, fate.job.class);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(arrivals: Arrivals) -> Class {
        let visit = Visit { name: "v".into(), context: 1, cached: 0, beams: 1, steps: 1 };
        Class { name: "c", tenant: 0, visit, patience: None, arrivals }
    }

    #[test]
    fn phases_have_their_rates_and_equal_seeds_equal_arrivals() {
        let phases = [(10_000_000, 100.0), (20_000_000, 1000.0)];
        let phases = phases.map(|(until, per_second)| Phase { until, per_second });
        let classes = [class(Arrivals::Poisson(phases.into()))];
        let times = |seed| {
            let mut traffic = Traffic::new(&classes, seed);
            std::iter::from_fn(move || traffic.next_job()).map(|job| job.arrived).collect::<Vec<_>>()
        };
        let first = times(1);
        assert!(first.is_sorted() && first == times(1) && first != times(2));
        let early = first.iter().filter(|at| **at < 10_000_000).count();
        assert!((900..1100).contains(&early), "{early}");
        assert!((9_500..10_500).contains(&(first.len() - early)), "{}", first.len());
    }

    #[test]
    fn a_client_that_waits_sends_one_at_a_time_and_waits_longer_when_refused() {
        let classes = [class(Arrivals::Closed { clients: 1, retry: 50, until: 100 })];
        let mut traffic = Traffic::new(&classes, 1);
        let job = traffic.next_job().unwrap();
        assert_eq!(traffic.next_at(), None);
        traffic.over(&Fate { job, ended: 30, ending: End::Answered });
        assert_eq!(traffic.next_at(), Some(30));
        let job = traffic.next_job().unwrap();
        traffic.over(&Fate { job, ended: 31, ending: End::Refused });
        assert_eq!(traffic.next_at(), Some(81));
        let job = traffic.next_job().unwrap();
        traffic.over(&Fate { job, ended: 100, ending: End::Answered });
        assert_eq!(traffic.next_at(), None, "the time is over");
    }

    #[test]
    fn bursts_come_at_once() {
        let classes = [class(Arrivals::Bursts { every: 10, size: 3, until: 25 })];
        let mut traffic = Traffic::new(&classes, 1);
        let times: Vec<u64> = std::iter::from_fn(|| traffic.next_job()).map(|job| job.arrived).collect();
        assert_eq!(times, [10, 10, 10, 20, 20, 20]);
    }
}
