//! Who asks when: the same arrivals for every policy, but for clients that wait for their answers.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::curve::Visit;
use crate::random::Random;

/// Requests of one kind.
#[derive(Clone, Debug)]
pub struct Class {
    /// What it is called.
    pub name: &'static str,
    /// Whose requests they are.
    pub tenant: u8,
    /// What each asks for.
    pub visit: Visit,
    /// Microseconds after which an answer is of no more use.
    pub patience: Option<u64>,
    /// When they come.
    pub arrivals: Arrivals,
}

/// When requests come. All times are microseconds from the start.
#[derive(Clone, Debug)]
pub enum Arrivals {
    /// At random times, at so many a second until so late, then the next rate.
    Poisson(Vec<Phase>),
    /// So many at once, every so often.
    Bursts {
        /// Microseconds from one to the next.
        every: u64,
        /// Requests of each.
        size: usize,
        /// The end.
        until: u64,
    },
    /// Clients that send the next request as soon as the last one was answered.
    Closed {
        /// How many.
        clients: usize,
        /// Microseconds that a client waits when it was refused.
        retry: u64,
        /// The end.
        until: u64,
    },
}

/// A part of the time.
#[derive(Clone, Copy, Debug)]
pub struct Phase {
    /// Its end.
    pub until: u64,
    /// Requests a second.
    pub per_second: f64,
}

/// A request that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Numbered by arrival.
    pub id: u64,
    /// Which of the classes.
    pub class: usize,
    /// When it came.
    pub arrived: u64,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    /// Which one.
    pub job: Job,
    /// When it was over.
    pub ended: u64,
    /// How.
    pub ending: End,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With an answer.
    Answered,
    /// Not taken.
    Refused,
    /// Taken, and given up for its deadline.
    Lost,
}

/// Arrivals in order of time.
#[derive(Debug)]
pub struct Traffic<'a> {
    classes: &'a [Class],
    /// Time, a number that orders equal times, class.
    coming: BinaryHeap<Reverse<(u64, u64, usize)>>,
    planned: u64,
    taken: u64,
}

impl<'a> Traffic<'a> {
    /// All that is known before the first answer.
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
                // Of no requests a second, the first comes never.
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

    /// When the next request comes.
    #[must_use]
    pub fn next_at(&self) -> Option<u64> {
        self.coming.peek().map(|Reverse((at, ..))| *at)
    }

    /// The next request.
    pub fn next_job(&mut self) -> Option<Job> {
        let Reverse((arrived, _, class)) = self.coming.pop()?;
        self.taken += 1;
        Some(Job { id: self.taken - 1, class, arrived })
    }

    /// A request is over: a client that waited sends its next one.
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
