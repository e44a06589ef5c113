//! The real scheduler under a traffic, with a model that is only a cost curve.
//!
//! It is driven like by the engine: requests that arrived during a step are submitted after it,
//! with the time of their arrival.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Result, ensure};
use beamline_kv_cache::{CacheConfig, Namespace, ReuseClass, SessionKey};
use beamline_model::step::{ContextShape, Plan, Progress, Slot};
use beamline_scheduler::{Ending, Event, Micros, Priority, Request, RequestId, Scheduler, SchedulerConfig};

use crate::curve::{Curve, Rows, Visit};
use crate::traffic::{Class, End, Fate, Job, Traffic};

/// Pages of the pool: room for a million positions, so that memory has no effect.
const PAGES: u32 = 1 << 15;
const PAGE_SIZE: u32 = 32;
/// Number of users of a class whose visits find something cached, in turn.
const USERS: u64 = 64;
/// Ids of the visits that fill the cache begin here; those of the traffic are smaller.
const FIRST_VISITS: u64 = 1 << 40;

/// Runs the traffic and returns the fate of each request.
///
/// # Errors
///
/// When the configuration or a request is impossible for the scheduler.
pub fn run(curve: &Curve, classes: &[Class], seed: u64, config: SchedulerConfig) -> Result<Vec<Fate>> {
    let mut world = World::new(curve, config)?;
    world.first_visits(classes)?;
    world.origin = world.now;
    let mut traffic = Traffic::new(classes, seed);
    loop {
        while let Some(at) = traffic.next_at()
            && world.origin + at <= world.now
            && let Some(job) = traffic.next_job()
        {
            world.submit(job, &classes[job.class]);
        }
        let busy = world.step()?;
        for fate in &world.over {
            traffic.over(fate);
        }
        world.fates.append(&mut world.over);
        if !busy {
            // Refused clients may send again at once.
            match traffic.next_at() {
                Some(at) => world.now = world.now.max(world.origin + at),
                None => break,
            }
        }
    }
    ensure!(world.live.is_empty(), "{} requests never ended", world.live.len());
    Ok(world.fates)
}

struct World<'a> {
    curve: &'a Curve,
    scheduler: Scheduler<Visit>,
    now: u64,
    /// When the traffic begins: after the first visits.
    origin: u64,
    /// Requests of the traffic that have not ended.
    live: HashMap<RequestId, Job>,
    /// Per open slot: the visit, the expansions done, and the computed beams of the next one.
    slots: HashMap<Slot, (Arc<Visit>, usize, usize)>,
    /// Requests that ended since the last look.
    over: Vec<Fate>,
    fates: Vec<Fate>,
    plan: Plan,
    events: Vec<Event<Visit, ()>>,
    outcomes: Vec<(Slot, Progress<()>)>,
}

impl<'a> World<'a> {
    fn new(curve: &'a Curve, config: SchedulerConfig) -> Result<Self> {
        let cache = CacheConfig {
            pages: PAGES,
            page_size: PAGE_SIZE,
            words_per_position: 1,
            sessions: 1 << 10,
            hash_key: [1; 32],
        };
        // The server sets this value from the model in the same way.
        let config = SchedulerConfig { pairs_per_row: curve.pairs_per_row(), ..config };
        Ok(Self {
            curve,
            scheduler: Scheduler::new(config, cache)?,
            now: 0,
            origin: 0,
            live: HashMap::new(),
            slots: HashMap::new(),
            over: Vec::new(),
            fates: Vec::new(),
            plan: Plan::default(),
            events: Vec::new(),
            outcomes: Vec::new(),
        })
    }

    /// Puts the contexts of returning users into the cache.
    fn first_visits(&mut self, classes: &[Class]) -> Result<()> {
        for (index, class) in classes.iter().enumerate().filter(|(_, class)| class.visit.cached > 0) {
            for user in 0..USERS {
                let visit = Visit { context: class.visit.cached, cached: 0, steps: 0, ..class.visit.clone() };
                let id = FIRST_VISITS + (index as u64) * USERS + user;
                let words = (0..visit.context).map(|at| word(of_user(index, user), at)).collect();
                let request = request(id, class.tenant, user, words, visit, None);
                let taken = self.scheduler.submit(Micros(self.now), request);
                ensure!(taken.is_ok(), "a first visit was refused: {taken:?}");
                while self.step()? {}
            }
        }
        Ok(())
    }

    fn submit(&mut self, job: Job, class: &Class) {
        let (visit, user) = (&class.visit, job.id % USERS);
        let own = (job.id as u32).wrapping_mul(0x9E37_79B9);
        let words = (0..visit.context)
            .map(|at| word(if at < visit.cached { of_user(job.class, user) } else { own }, at))
            .collect();
        let at = self.origin + job.arrived;
        let deadline = class.patience.map(|patience| Micros(at + patience));
        let request = request(job.id, class.tenant, user, words, visit.clone(), deadline);
        let id = request.id;
        match self.scheduler.submit(Micros(at), request) {
            Ok(()) => drop(self.live.insert(id, job)),
            Err(_) => self.end(job, End::Refused),
        }
    }

    fn end(&mut self, job: Job, ending: End) {
        self.over.push(Fate { job, ended: self.now - self.origin, ending });
    }

    /// Runs one step, if there is anything to do. Returns whether there was.
    fn step(&mut self) -> Result<bool> {
        let mut plan = std::mem::take(&mut self.plan);
        self.scheduler.plan(Micros(self.now), &mut plan, &mut self.events);
        self.carry_out()?;
        let busy = !plan.is_empty();
        if busy {
            let took = self.compute(&plan)?;
            self.now += took;
            let mut outcomes = std::mem::take(&mut self.outcomes);
            self.scheduler.commit(Micros(self.now), Micros(took), &mut outcomes, &mut self.events);
            self.outcomes = outcomes;
            self.carry_out()?;
        }
        self.plan = plan;
        Ok(busy)
    }

    /// Computes the outcomes of the model, and the time of the step.
    fn compute(&mut self, plan: &Plan) -> Result<u64> {
        let mut rows = Rows::default();
        for chunk in &plan.chunks {
            rows.add_context(chunk.positions.start, chunk.positions.end);
            let progress = match chunk.expand {
                None => Progress::Prefilled,
                Some(beams) => self.expanded(chunk.slot, beams)?,
            };
            self.outcomes.push((chunk.slot, progress));
        }
        for branch in &plan.branches {
            let Some((visit, _, computed)) = self.slots.get_mut(&branch.slot) else {
                anyhow::bail!("a closed slot")
            };
            rows.add_branch(branch.rows, visit.context);
            let beams = visit.beams;
            *computed += branch.rows;
            let left = beams - *computed;
            let progress =
                if left > 0 { Progress::Partly { left } } else { self.expanded(branch.slot, beams)? };
            self.outcomes.push((branch.slot, progress));
        }
        Ok(self.curve.step(rows))
    }

    fn expanded(&mut self, slot: Slot, beams: usize) -> Result<Progress<()>> {
        let Some((visit, done, computed)) = self.slots.get_mut(&slot) else { anyhow::bail!("a closed slot") };
        (*done, *computed) = (*done + 1, 0);
        Ok(if *done == visit.steps { Progress::Finished(()) } else { Progress::Expanded { rows: beams } })
    }

    fn carry_out(&mut self) -> Result<()> {
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            match event {
                Event::Opened { slot, payload, .. } => drop(self.slots.insert(slot, (payload, 0, 0))),
                Event::Closed(slot) => drop(self.slots.remove(&slot)),
                Event::Ended(ended) => {
                    let ending = match ended.ending {
                        Ending::Finished(()) => End::Answered,
                        Ending::Warmed => continue,
                        Ending::Expired | Ending::Dropped(_) => End::Lost,
                        other => anyhow::bail!("a request ended as {other:?}"),
                    };
                    let job = self.live.remove(&ended.id);
                    let Some(job) = job else { anyhow::bail!("{:?} ended twice", ended.id) };
                    self.end(job, ending);
                }
            }
        }
        self.events = events;
        Ok(())
    }
}

fn request(
    id: u64,
    tenant: u8,
    user: u64,
    words: Arc<[u32]>,
    visit: Visit,
    deadline: Option<Micros>,
) -> Request<Visit> {
    let namespace = Namespace::new(b"model", &[tenant]);
    Request {
        id: RequestId(id),
        namespace,
        session: (visit.cached > 0).then(|| SessionKey::new(&namespace, &user.to_string())),
        words,
        context_len: visit.context,
        reuse: ReuseClass::CrossRequest,
        shape: ContextShape::Causal,
        beam_width: visit.beams,
        beam_widths: None,
        min_beam_width: visit.beams,
        priority: Priority::Interactive,
        generated_steps: visit.steps,
        keeps_branches: true,
        deadline,
        payload: Arc::new(visit),
    }
}

/// A word of a context. Contexts with different roots share no page.
fn word(root: u32, at: usize) -> u32 {
    root.wrapping_add(at as u32)
}

fn of_user(class: usize, user: u64) -> u32 {
    (class as u32) << 16 | (user as u32) << 8 | 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::milliseconds;
    use crate::reference::{self, Policy};
    use crate::traffic::{Arrivals, Phase};

    /// Ten microseconds a row, however many are computed together: batches save nothing.
    fn linear() -> Curve {
        Curve {
            name: "linear".into(),
            source: String::new(),
            fixed_us: 0.0,
            context_row_us: 10.0,
            context_read_ns: 0.0,
            branch_us: vec![(1.0, 10.0)],
            branch_read_ns: 0.0,
            position_bytes: 1,
            visits: vec![],
        }
    }

    fn classes(visit: Visit, load: f64, seconds: u64) -> [Class; 1] {
        let per_second = load * 1e6 / linear().alone(&visit) as f64;
        let arrivals = Arrivals::Poisson(vec![Phase { until: seconds * 1_000_000, per_second }]);
        [Class { name: "c", tenant: 0, visit, patience: None, arrivals }]
    }

    fn cold() -> Visit {
        Visit { name: "cold".into(), context: 320, cached: 0, beams: 32, steps: 3 }
    }

    fn mean_ms(fates: &[Fate]) -> f64 {
        let all = milliseconds(fates);
        all.iter().sum::<f64>() / all.len() as f64
    }

    #[test]
    fn first_come_first_served_waits_as_long_as_pollaczek_and_khinchine_say() {
        for load in [0.3, 0.7] {
            let classes = classes(cold(), load, 400);
            let service = linear().alone(&cold()) as f64 / 1e3;
            let waits = mean_ms(&reference::run(Policy::Fifo, &linear(), &classes, 5)) - service;
            let known = service * load / (2.0 * (1.0 - load));
            assert!((waits / known - 1.0).abs() < 0.06, "load {load}: {waits} ms, {known} ms");
        }
    }

    #[test]
    fn where_batches_win_nothing_no_policy_beats_the_shortest_first() {
        let classes = classes(cold(), 0.7, 60);
        let ours = run(&linear(), &classes, 5, SchedulerConfig::default()).unwrap();
        let shortest = reference::run(Policy::Shortest, &linear(), &classes, 5);
        assert_eq!(ours.len(), shortest.len(), "every request is answered");
        assert!(mean_ms(&shortest) <= mean_ms(&ours) + 1e-9);
        // The work is the same, so the machine finishes at the same time.
        let done = |fates: &[Fate]| fates.iter().map(|fate| fate.ended).max().unwrap() as f64;
        assert!((done(&ours) / done(&shortest) - 1.0).abs() < 1e-3);
    }

    #[test]
    fn the_same_seed_gives_the_same_again() {
        let classes = classes(cold(), 0.9, 10);
        let again = || run(&linear(), &classes, 5, SchedulerConfig::default()).unwrap();
        assert_eq!(again(), again());
    }

    #[test]
    fn a_returning_user_is_computed_from_the_cached_pages_on() {
        let warm = Visit { name: "warm".into(), context: 341, cached: 320, beams: 32, steps: 3 };
        let classes = classes(warm.clone(), 0.01, 60);
        let fates = run(&linear(), &classes, 5, SchedulerConfig::default()).unwrap();
        let least = milliseconds(&fates).into_iter().fold(f64::INFINITY, f64::min);
        assert_eq!(least, linear().alone(&warm) as f64 / 1e3);
    }
}
