//! Policies to compare with, over the same service times. None of them computes requests together,
//! none refuses on arrival, and each is as plain as possible.
//!
//! With one kind of request and Poisson arrivals, [`Policy::Fifo`] is the M/D/1 queue.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::curve::Curve;
use crate::traffic::{Class, End, Fate, Job, Traffic};

/// The order in which work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// First come, first served, each to its end.
    Fifo,
    /// First come, first served, except that a request that could only be late is given up at its
    /// turn.
    FifoInTime,
    /// All requests at once, each as fast as any other.
    Sharing,
    /// The request with the least work left, which is known beforehand; others are interrupted for
    /// it. No policy that serves one request at a time has a shorter mean.
    Shortest,
}

/// Runs the traffic and returns the fate of each request.
#[must_use]
pub fn run(policy: Policy, curve: &Curve, classes: &[Class], seed: u64) -> Vec<Fate> {
    let services: Vec<u64> = classes.iter().map(|class| curve.alone(&class.visit)).collect();
    let traffic = Traffic::new(classes, seed);
    let queue = Queue { services: &services, traffic, fates: Vec::new() };
    match policy {
        Policy::Fifo => queue.fifo(|_| None),
        Policy::FifoInTime => queue.fifo(|job| classes[job.class].patience),
        Policy::Sharing => queue.sharing(),
        Policy::Shortest => queue.shortest(),
    }
}

struct Queue<'a> {
    services: &'a [u64],
    traffic: Traffic<'a>,
    fates: Vec<Fate>,
}

impl Queue<'_> {
    fn answer(&mut self, job: Job, ended: u64) {
        self.end(job, ended, End::Answered);
    }

    fn end(&mut self, job: Job, ended: u64, ending: End) {
        let fate = Fate { job, ended, ending };
        self.traffic.over(&fate);
        self.fates.push(fate);
    }

    fn fifo(mut self, patience: impl Fn(&Job) -> Option<u64>) -> Vec<Fate> {
        let mut free_at = 0;
        while let Some(job) = self.traffic.next_job() {
            let begins = job.arrived.max(free_at);
            let ends = begins + self.services[job.class];
            if patience(&job).is_some_and(|patience| ends - job.arrived > patience) {
                self.end(job, begins, End::Lost);
            } else {
                free_at = ends;
                self.answer(job, ends);
            }
        }
        self.fates
    }

    /// Counts the work that each present request has received since the start. A request leaves
    /// when this number has grown by its own service since its arrival.
    fn sharing(mut self) -> Vec<Fate> {
        let (mut now, mut given) = (0.0, 0.0);
        // The work count at which each request leaves, and the request.
        let mut present: BinaryHeap<Reverse<(Ordered, u64, usize, u64)>> = BinaryHeap::new();
        loop {
            let leaves = present.peek().map(|Reverse((at, ..))| now + (at.0 - given) * present.len() as f64);
            let comes = self.traffic.next_at();
            match (leaves, comes) {
                (None, None) => return self.fates,
                (Some(at), comes) if comes.is_none_or(|comes| at <= comes as f64) => {
                    let Some(Reverse((work, id, class, arrived))) = present.pop() else { continue };
                    (now, given) = (at, work.0);
                    let ended = (at.round() as u64).max(arrived);
                    self.answer(Job { id, class, arrived }, ended);
                }
                _ => {
                    let Some(job) = self.traffic.next_job() else { continue };
                    // An answer may have been rounded up beyond the present.
                    let at = now.max(job.arrived as f64);
                    given += (at - now) / (present.len().max(1)) as f64;
                    now = at;
                    let leaves = Ordered(given + self.services[job.class] as f64);
                    present.push(Reverse((leaves, job.id, job.class, job.arrived)));
                }
            }
        }
    }

    fn shortest(mut self) -> Vec<Fate> {
        let mut now = 0;
        // Work left, and the request; of equal ones the first that arrived.
        let mut present: BinaryHeap<Reverse<(u64, u64, usize, u64)>> = BinaryHeap::new();
        loop {
            let comes = self.traffic.next_at();
            match (present.pop(), comes) {
                (None, None) => return self.fates,
                (Some(Reverse((left, id, class, arrived))), comes)
                    if comes.is_none_or(|comes| now + left <= comes) =>
                {
                    now += left;
                    self.answer(Job { id, class, arrived }, now);
                }
                (working, _) => {
                    let Some(job) = self.traffic.next_job() else { continue };
                    let at = now.max(job.arrived);
                    if let Some(Reverse((left, id, class, arrived))) = working {
                        present.push(Reverse((left - (at - now), id, class, arrived)));
                    }
                    now = at;
                    present.push(Reverse((self.services[job.class], job.id, job.class, job.arrived)));
                }
            }
        }
    }
}

/// A float that is not NaN, so that it can be ordered.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ordered(f64);

impl Eq for Ordered {}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::curve::Visit;
    use crate::traffic::{Arrivals, Phase};

    /// A visit takes as many microseconds as it has context positions.
    fn curve() -> Curve {
        Curve {
            name: "a microsecond a row".into(),
            source: String::new(),
            fixed_us: 0.0,
            context_row_us: 1.0,
            context_read_ns: 0.0,
            branch_us: vec![],
            branch_read_ns: 0.0,
            position_bytes: 1,
            visits: vec![],
        }
    }

    fn class(context: usize, arrivals: Arrivals) -> Class {
        let visit = Visit { name: "v".into(), context, cached: 0, beams: 1, steps: 1 };
        Class { name: "c", tenant: 0, visit, patience: None, arrivals }
    }

    /// End times by class, for one request of 30 us at 10 us and one of 5 us at 20 us.
    fn ends(policy: Policy) -> [u64; 2] {
        let at = |time, context| class(context, Arrivals::Bursts { every: time, size: 1, until: time + 1 });
        let fates = run(policy, &curve(), &[at(10, 30), at(20, 5)], 1);
        [0, 1].map(|class| fates.iter().find(|fate| fate.job.class == class).unwrap().ended)
    }

    #[test]
    fn each_policy_is_what_it_is_called() {
        assert_eq!(ends(Policy::Fifo), [40, 45]);
        // From 20 on, both run at half the speed: the short one ends at 30, and the long one has 15
        // left then.
        assert_eq!(ends(Policy::Sharing), [45, 30]);
        assert_eq!(ends(Policy::Shortest), [45, 25]);
    }

    #[test]
    fn who_could_only_be_late_is_given_up_without_work() {
        let burst = Arrivals::Bursts { every: 10, size: 4, until: 11 };
        let class = Class { patience: Some(70), ..class(30, burst) };
        let fates = run(Policy::FifoInTime, &curve(), &[class], 1);
        let ends: Vec<(u64, End)> = fates.iter().map(|fate| (fate.ended, fate.ending)).collect();
        assert_eq!(ends, [(40, End::Answered), (70, End::Answered), (70, End::Lost), (70, End::Lost)]);
    }

    #[test]
    fn no_work_is_lost_and_none_invented() {
        let poisson = |per_second| Arrivals::Poisson(vec![Phase { until: 10_000_000, per_second }]);
        let clients = Arrivals::Closed { clients: 3, retry: 1, until: 5_000_000 };
        let classes = [class(1000, poisson(300.0)), class(7000, poisson(60.0)), class(20_000, clients)];
        for policy in [Policy::Fifo, Policy::Sharing, Policy::Shortest] {
            let fates = run(policy, &curve(), &classes[..2], 3);
            let work: usize = fates.iter().map(|fate| classes[fate.job.class].visit.context).sum();
            let last = fates.iter().map(|fate| fate.ended).max().unwrap();
            assert!(last as usize >= work, "{policy:?}: {work} us of work were done in {last}");
            let fates = run(policy, &curve(), &classes, 3);
            assert!(fates.iter().filter(|fate| fate.job.class == 2).count() > 10, "{policy:?}");
            assert!(fates.iter().all(|fate| fate.ended >= fate.job.arrived));
        }
    }
}
