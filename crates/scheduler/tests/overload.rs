//! Overload and neighbours, in virtual time: how much is answered in time, and who waits for whom.
//!
//! The model is a cost: a step takes a fixed time and a time for each row. Nothing here depends on
//! the machine.

// A simulation is a test all over, also outside the functions that are marked as such.
#![allow(clippy::expect_used)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use beamline_kv_cache::{CacheConfig, Namespace, ReuseClass};
use beamline_model::step::{ContextShape, Plan, Progress, Slot};
use beamline_scheduler::{Ending, Event, Micros, Refusal, Request, RequestId, Scheduler, SchedulerConfig};

/// Microseconds of a step, whatever is in it, and of each row.
const PER_STEP: u64 = 500;
const PER_ROW: u64 = 50;
const STEPS: usize = 3;

/// Requests that one client sends, one every so many microseconds.
#[derive(Clone, Copy)]
struct Client {
    tenant: u8,
    every: u64,
    context: usize,
    beams: usize,
    patience: Option<u64>,
}

/// What became of the requests of a client, and how long those that were answered took.
#[derive(Debug, Default)]
struct Outcome {
    answered: Vec<u64>,
    refused: usize,
    /// Dropped or expired: time from arrival.
    lost: Vec<u64>,
    expired: usize,
}

impl Outcome {
    fn percentile(&self, percent: usize) -> u64 {
        let mut times = self.answered.clone();
        times.sort_unstable();
        times[(times.len() - 1) * percent / 100]
    }
}

struct World {
    scheduler: Scheduler<()>,
    now: u64,
    next_id: u64,
    /// Client and arrival of each request that has not ended.
    live: HashMap<RequestId, (usize, u64)>,
    /// Beams of open slots, and expansions that they had.
    slots: HashMap<Slot, usize>,
    outcomes: Vec<Outcome>,
    /// How many times longer than usual everything takes.
    slow: u64,
}

impl World {
    fn new(clients: usize) -> Self {
        let config = SchedulerConfig { max_generated_steps: 8, ..SchedulerConfig::default() };
        let cache = CacheConfig {
            pages: 1 << 15,
            page_size: 32,
            words_per_position: 1,
            sessions: 8,
            hash_key: [1; 32],
        };
        Self {
            scheduler: Scheduler::new(config, cache).expect("it works"),
            now: 0,
            next_id: 0,
            live: HashMap::new(),
            slots: HashMap::new(),
            outcomes: (0..clients).map(|_| Outcome::default()).collect(),
            slow: 1,
        }
    }

    fn submit(&mut self, client: usize, from: &Client, at: u64) {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let words: Vec<u32> = (0..from.context as u32).map(|word| (id.0 as u32) << 12 | word).collect();
        let request = Request {
            id,
            namespace: Namespace::new(b"model", &[from.tenant]),
            session: None,
            words: words.into(),
            context_len: from.context,
            reuse: ReuseClass::CrossRequest,
            shape: ContextShape::Causal,
            beam_width: from.beams,
            min_beam_width: from.beams,
            generated_steps: STEPS,
            keeps_branches: true,
            deadline: from.patience.map(|patience| Micros(at + patience)),
            payload: Arc::new(()),
        };
        match self.scheduler.submit(Micros(at), request) {
            Ok(()) => drop(self.live.insert(id, (client, at))),
            Err(Refusal::Backlog { .. } | Refusal::QueueFull { .. }) => self.outcomes[client].refused += 1,
            Err(other) => panic!("{other}"),
        }
    }

    /// One step, if there is anything to do. Returns whether there was.
    fn step(&mut self) -> bool {
        let (mut plan, mut events, mut outcomes) = (Plan::default(), Vec::new(), Vec::new());
        self.scheduler.plan(Micros(self.now), &mut plan, &mut events);
        self.take(&mut events);
        if plan.is_empty() {
            return false;
        }
        let mut rows = plan.context_rows() as u64;
        for chunk in &plan.chunks {
            let progress = match chunk.expand {
                None => Progress::Prefilled,
                Some(beams) => {
                    self.slots.insert(chunk.slot, 1);
                    Progress::Expanded { rows: beams }
                }
            };
            outcomes.push((chunk.slot, progress));
        }
        for branch in &plan.branches {
            let beams = branch.branch_pages.len() * 32 / (STEPS - 1);
            rows += beams as u64;
            let done = self.slots.get_mut(&branch.slot).expect("it was expanded");
            *done += 1;
            let over = *done == STEPS;
            outcomes.push((
                branch.slot,
                if over { Progress::Finished(()) } else { Progress::Expanded { rows: beams } },
            ));
        }
        let took = (PER_STEP + rows * PER_ROW) * self.slow;
        self.now += took;
        self.scheduler.commit(Micros(self.now), Micros(took), &mut outcomes, &mut events);
        self.take(&mut events);
        true
    }

    fn take(&mut self, events: &mut Vec<Event<(), ()>>) {
        for event in events.drain(..) {
            let Event::Ended(ended) = event else { continue };
            let (client, arrived) = self.live.remove(&ended.id).expect("it ends once");
            let (took, outcome) = (self.now - arrived, &mut self.outcomes[client]);
            match ended.ending {
                Ending::Finished(()) => outcome.answered.push(took),
                Ending::Expired => {
                    outcome.expired += 1;
                    outcome.lost.push(took);
                }
                Ending::Dropped(_) => outcome.lost.push(took),
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Clients that send at fixed rates, whatever comes of it, for so many microseconds.
fn open_loop(clients: &[Client], time: u64) -> World {
    run(World::new(clients.len()), clients, time)
}

fn run(mut world: World, clients: &[Client], time: u64) -> World {
    let mut arrivals: BTreeMap<(u64, usize), ()> =
        clients.iter().enumerate().map(|(index, client)| ((client.every / 2, index), ())).collect();
    loop {
        while let Some((&(at, index), ())) = arrivals.first_key_value()
            && at <= world.now
            && at < time
        {
            arrivals.pop_first();
            world.submit(index, &clients[index], at);
            arrivals.insert((at + clients[index].every, index), ());
        }
        if !world.step() {
            match arrivals.first_key_value() {
                Some((&(at, _), ())) if at < time => world.now = world.now.max(at),
                _ => return world,
            }
        }
    }
}

/// Beams are whole pages here, so that their number can be told from the plan.
const TYPICAL: Client = Client { tenant: 0, every: 0, context: 300, beams: 32, patience: Some(10_000_000) };

/// Requests per second that are answered when nobody is ever late: many at a time, no deadlines.
fn capacity(client: Client) -> f64 {
    let rows = (client.context + (STEPS - 1) * client.beams) as u64;
    let busy = open_loop(&[Client { every: rows * PER_ROW / 2, patience: None, ..client }], 20_000_000);
    busy.outcomes[0].answered.len() as f64 / (busy.now as f64 / 1e6)
}

#[test]
fn goodput_stays_near_capacity_under_any_overload() {
    let capacity = capacity(TYPICAL);
    for patience in [1_000_000, 10_000_000] {
        for factor in [2, 4, 16] {
            let every = (1e6 / (capacity * f64::from(factor))) as u64;
            let world = open_loop(&[Client { every, patience: Some(patience), ..TYPICAL }], 60_000_000);
            let outcome = &world.outcomes[0];
            let goodput = outcome.answered.len() as f64 / (world.now as f64 / 1e6);
            let case = format!("{factor} times, {patience} us: {goodput:.1} of {capacity:.1} per second");
            assert!(goodput >= 0.85 * capacity, "{case}");
            // Nobody waits for an answer that does not come.
            let late = outcome.lost.iter().filter(|took| **took >= patience).count();
            assert!(late * 100 <= outcome.answered.len(), "{case}, {late} waited in vain");
            assert!(outcome.refused > 0, "{case}");
        }
    }
}

#[test]
fn nobody_is_refused_below_capacity() {
    let capacity = capacity(TYPICAL);
    let every = (1e6 / (capacity * 0.7)) as u64;
    let world = open_loop(&[Client { every, patience: Some(1_000_000), ..TYPICAL }], 30_000_000);
    let Outcome { refused, lost, .. } = &world.outcomes[0];
    assert_eq!((*refused, lost.len()), (0, 0));
}

#[test]
fn a_request_that_would_be_late_alone_is_tried() {
    let mut world = open_loop(&[Client { every: 50_000, ..TYPICAL }], 2_000_000);
    let hopeless = Client { patience: Some(1000), ..TYPICAL };
    let at = world.now;
    world.submit(0, &hopeless, at);
    assert_eq!(world.outcomes[0].refused, 0, "an estimate may be wrong");
}

#[test]
fn a_greedy_tenant_costs_a_small_one_little() {
    let small = Client { tenant: 1, every: 66_000, context: 40, beams: 32, patience: Some(10_000_000) };
    let alone = open_loop(&[small], 20_000_000).outcomes.remove(0).percentile(99);
    // Sixteen times what the machine can do, of the largest requests.
    let greedy = Client { tenant: 2, every: 9_000, context: 1300, beams: 512, patience: Some(10_000_000) };
    let world = open_loop(&[small, greedy], 60_000_000);
    let [small, greedy] = &world.outcomes[..] else { panic!("two clients") };
    assert_eq!((small.refused, small.lost.len()), (0, 0), "only the greedy one is refused");
    // A step of a beam of 512 cannot be cut; each of the small one's three steps may meet one, and
    // wait for another.
    let step = PER_STEP + 512 * PER_ROW + 20_000;
    let bound = alone + (2 + STEPS as u64) * step;
    let p99 = small.percentile(99);
    assert!(p99 <= bound, "{p99} us, {alone} us alone, the bound is {bound} us");
    assert!(greedy.answered.len() > 50, "and it is served all the same: {}", greedy.answered.len());
}

#[test]
fn tenants_that_always_wait_get_equal_shares_whatever_their_requests_cost() {
    let of = |tenant, context, every| Client { tenant, every, context, beams: 32, patience: Some(5_000_000) };
    let clients = [of(1, 1000, 10_000), of(2, 250, 3_000), of(3, 60, 1_500)];
    let world = open_loop(&clients, 60_000_000);
    let rows: Vec<usize> = (0..3)
        .map(|index| {
            let rows = clients[index].context + (STEPS - 1) * clients[index].beams;
            world.outcomes[index].answered.len() * rows
        })
        .collect();
    let (least, most) = (rows.iter().min().expect("three"), rows.iter().max().expect("three"));
    assert!(*least * 4 >= *most * 3, "{rows:?}");
}

#[test]
fn a_step_is_short_while_others_wait_and_whole_when_nobody_does() {
    let mut world = open_loop(&[Client { every: 20_000, ..TYPICAL }], 2_000_000);
    let long = Client { context: 4000, ..TYPICAL };
    let at = world.now;
    world.submit(0, &long, at);
    world.step();
    assert!(world.now - at >= 4000 * PER_ROW, "alone, it is computed at once");
    while world.step() {}
    let at = world.now;
    for _ in 0..4 {
        world.submit(0, &long, at);
    }
    let mut longest = 0;
    let mut before = world.now;
    while world.step() {
        longest = longest.max(world.now - before);
        before = world.now;
    }
    assert!(longest <= 25_000, "{longest} us");
}

#[test]
fn a_small_tenant_waits_for_two_wide_beams_at_most_however_slow_the_model() {
    // Where a beam of 512 takes many times as long as a step should.
    let slow = 20;
    let small = Client { tenant: 1, every: 1_500_000, context: 40, beams: 32, patience: Some(60_000_000) };
    let greedy = Client { tenant: 2, every: 500_000, context: 1300, beams: 512, patience: Some(60_000_000) };
    let mut world = World::new(2);
    world.slow = slow;
    let world = run(world, &[small, greedy], 120_000_000);
    let [small, greedy] = &world.outcomes[..] else { panic!("two clients") };
    assert_eq!((small.refused, small.lost.len()), (0, 0));
    let widest = (PER_STEP + 512 * PER_ROW) * slow;
    // The step that it met, and one that the other is owed meanwhile; beside its own three, chunks
    // of the other's.
    let bound = 2 * widest + (2 + STEPS as u64) * (PER_STEP + (64 + 64) * PER_ROW) * slow;
    let p99 = small.percentile(99);
    assert!(p99 <= bound, "{p99} us, the bound is {bound} us, the widest step takes {widest} us");
    assert!(!greedy.answered.is_empty());
}
