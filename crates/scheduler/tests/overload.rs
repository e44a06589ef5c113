//! Overload and neighbours, in virtual time: how much is answered in time, and which requests wait
//! for which.
//!
//! The model is only a cost: a step takes a fixed time and a time for each row. Nothing here
//! depends on the machine.

// A simulation is test code everywhere, also outside the functions that are marked as tests.
#![allow(clippy::expect_used)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use beamline_kv_cache::{CacheConfig, Namespace, ReuseClass};
use beamline_model::step::{ContextShape, Plan, Progress, Slot};
use beamline_scheduler::{
    Ending, Event, Micros, Priority, Refusal, Request, RequestId, Scheduler, SchedulerConfig,
};

/// Fixed time of a step, and time of each row, in microseconds.
const PER_STEP: u64 = 500;
const PER_ROW: u64 = 50;
const STEPS: usize = 3;

/// When a client sends requests.
#[derive(Clone, Copy)]
enum When {
    /// One request per interval of this many microseconds.
    Every(u64),
    /// At random times, with this mean interval in microseconds.
    About(u64),
    /// A fixed number at a time: a new request is sent when an earlier one has ended.
    Closed(usize),
}

/// A client, and the requests that it sends.
#[derive(Clone, Copy)]
struct Client {
    tenant: u8,
    when: When,
    context: usize,
    beams: usize,
    patience: Option<u64>,
    priority: Priority,
}

/// The results of a client's requests, and how long the answered ones took.
#[derive(Debug, Default)]
struct Outcome {
    arrived: Vec<u64>,
    answered: Vec<u64>,
    refused: usize,
    /// Time from arrival of requests that were dropped or expired.
    lost: Vec<u64>,
    expired: usize,
}

impl Outcome {
    fn percentile(&self, percent: usize) -> u64 {
        percentile(self.answered.clone(), percent)
    }

    /// Times that the same arrivals would take in one queue, each served to its end.
    fn first_come_first_served(&self, service: u64) -> Vec<u64> {
        let mut free = 0;
        self.arrived
            .iter()
            .map(|at| {
                free = free.max(*at) + service;
                free - at
            })
            .collect()
    }
}

fn percentile(mut times: Vec<u64>, percent: usize) -> u64 {
    times.sort_unstable();
    times[(times.len() - 1) * percent / 100]
}

struct World {
    scheduler: Scheduler<()>,
    now: u64,
    next_id: u64,
    /// Client and arrival time of each request that has not ended.
    live: HashMap<RequestId, (usize, u64)>,
    /// Per open slot: expansions so far, and computed beams of the next one.
    slots: HashMap<Slot, (usize, usize)>,
    outcomes: Vec<Outcome>,
    /// Factor by which everything is slower than usual.
    slow: u64,
    dice: u64,
    /// When to stop, even if requests are left.
    halt: Option<u64>,
}

impl World {
    fn new(clients: usize) -> Self {
        Self::with_attention(clients, u64::MAX)
    }

    /// A model in which a row that attends to `pairs_per_row` positions takes twice as long.
    fn with_attention(clients: usize, pairs_per_row: u64) -> Self {
        let config = SchedulerConfig { max_generated_steps: 8, pairs_per_row, ..SchedulerConfig::default() };
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
            dice: 1,
            halt: None,
        }
    }

    /// The time until the next of events that come at random, one in `mean` microseconds.
    fn wait(&mut self, mean: u64) -> u64 {
        // The xorshift64* random number generator.
        self.dice ^= self.dice >> 12;
        self.dice ^= self.dice << 25;
        self.dice ^= self.dice >> 27;
        let uniform = (self.dice.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1_u64 << 53) as f64;
        (-(1.0 - uniform).ln() * mean as f64) as u64
    }

    /// Number of requests of a client that have not ended.
    fn live(&self, client: usize) -> usize {
        self.live.values().filter(|(of, _)| *of == client).count()
    }

    fn submit(&mut self, client: usize, from: &Client, at: u64) {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.outcomes[client].arrived.push(at);
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
            beam_widths: None,
            min_beam_width: from.beams,
            priority: from.priority,
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
        let pairs_per_row = self.scheduler.limits().config.pairs_per_row;
        let (mut rows, mut pairs) = (plan.context_rows() as u64, 0);
        for chunk in &plan.chunks {
            pairs += chunk.positions.clone().sum::<usize>() as u64;
            let progress = match chunk.expand {
                None => Progress::Prefilled,
                Some(beams) => {
                    self.slots.insert(chunk.slot, (1, 0));
                    Progress::Expanded { rows: beams }
                }
            };
            outcomes.push((chunk.slot, progress));
        }
        for branch in &plan.branches {
            let beams = branch.branch_pages.len() * 32 / (STEPS - 1);
            rows += branch.rows as u64;
            pairs += (branch.rows * branch.context_pages.len() * 32) as u64;
            let (done, computed) = self.slots.get_mut(&branch.slot).expect("it was expanded");
            *computed += branch.rows;
            let left = beams - *computed;
            if left == 0 {
                (*done, *computed) = (*done + 1, 0);
            }
            let progress = match left {
                0 if *done == STEPS => Progress::Finished(()),
                0 => Progress::Expanded { rows: beams },
                left => Progress::Partly { left },
            };
            outcomes.push((branch.slot, progress));
        }
        let took = (PER_STEP + rows * PER_ROW + pairs * PER_ROW / pairs_per_row) * self.slow;
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

/// Lets clients send at fixed rates for `time` microseconds, whether they are answered or not.
fn open_loop(clients: &[Client], time: u64) -> World {
    run(World::new(clients.len()), clients, time)
}

fn run(mut world: World, clients: &[Client], time: u64) -> World {
    let mut arrivals: BTreeMap<(u64, usize), ()> = BTreeMap::new();
    for (index, client) in clients.iter().enumerate() {
        match client.when {
            When::Every(every) => drop(arrivals.insert((world.now + every / 2, index), ())),
            When::About(mean) => drop(arrivals.insert((world.now + world.wait(mean), index), ())),
            When::Closed(_) => {}
        }
    }
    loop {
        while let Some((&(at, index), ())) = arrivals.first_key_value()
            && at <= world.now
            && at < time
        {
            arrivals.pop_first();
            world.submit(index, &clients[index], at);
            let wait = match clients[index].when {
                When::About(mean) => world.wait(mean),
                When::Every(every) => every,
                When::Closed(_) => unreachable!("it has no arrivals of its own"),
            };
            arrivals.insert((at + wait, index), ());
        }
        for (index, client) in clients.iter().enumerate() {
            if let When::Closed(many) = client.when
                && world.now < time
            {
                (world.live(index)..many).for_each(|_| world.submit(index, client, world.now));
            }
        }
        if world.halt.is_some_and(|at| world.now >= at) {
            return world;
        }
        if !world.step() {
            match arrivals.first_key_value() {
                Some((&(at, _), ())) if at < time => world.now = world.now.max(at),
                _ => return world,
            }
        }
    }
}

/// Beams are whole pages here, so that the plan shows their number.
const TYPICAL: Client = Client {
    tenant: 0,
    when: When::Closed(0),
    context: 300,
    beams: 32,
    patience: Some(10_000_000),
    priority: Priority::Interactive,
};
/// The largest request of these tests.
const HEAVY: Client = Client { context: 1300, beams: 512, ..TYPICAL };

/// Requests per second that are answered without deadlines, with many at a time.
fn capacity(client: Client) -> f64 {
    let rows = (client.context + (STEPS - 1) * client.beams) as u64;
    let busy =
        open_loop(&[Client { when: When::Every(rows * PER_ROW / 2), patience: None, ..client }], 20_000_000);
    busy.outcomes[0].answered.len() as f64 / (busy.now as f64 / 1e6)
}

#[test]
fn goodput_stays_near_capacity_under_any_overload() {
    let capacity = capacity(TYPICAL);
    for patience in [1_000_000, 10_000_000] {
        for factor in [2, 4, 16] {
            let every = (1e6 / (capacity * f64::from(factor))) as u64;
            let world = open_loop(
                &[Client { when: When::Every(every), patience: Some(patience), ..TYPICAL }],
                60_000_000,
            );
            let outcome = &world.outcomes[0];
            let goodput = outcome.answered.len() as f64 / (world.now as f64 / 1e6);
            let case = format!("{factor} times, {patience} us: {goodput:.1} of {capacity:.1} per second");
            assert!(goodput >= 0.9 * capacity, "{case}");
            // A client does not wait for an answer that does not come.
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
    let world =
        open_loop(&[Client { when: When::Every(every), patience: Some(1_000_000), ..TYPICAL }], 30_000_000);
    let Outcome { refused, lost, .. } = &world.outcomes[0];
    assert_eq!((*refused, lost.len()), (0, 0));
}

#[test]
fn a_request_that_would_be_late_alone_is_tried() {
    let mut world = open_loop(&[Client { when: When::Every(50_000), ..TYPICAL }], 2_000_000);
    let hopeless = Client { patience: Some(1000), ..TYPICAL };
    let at = world.now;
    world.submit(0, &hopeless, at);
    assert_eq!(world.outcomes[0].refused, 0, "an estimate may be wrong");
}

#[test]
fn a_greedy_tenant_costs_a_small_one_little() {
    let small = Client { tenant: 1, when: When::Every(66_000), context: 40, ..TYPICAL };
    let alone = open_loop(&[small], 20_000_000).outcomes.remove(0).percentile(99);
    // Sixteen times what the machine can do, in the largest requests.
    let greedy = Client { tenant: 2, when: When::Every(9_000), ..HEAVY };
    let world = open_loop(&[small, greedy], 60_000_000);
    let [small, greedy] = &world.outcomes[..] else { panic!("two clients") };
    assert_eq!((small.refused, small.lost.len()), (0, 0), "only the greedy one is refused");
    // A step of a beam of 512 cannot be cut. Each of the small request's three steps may meet one
    // and wait for another.
    let step = PER_STEP + 512 * PER_ROW + 20_000;
    let bound = alone + (2 + STEPS as u64) * step;
    let p99 = small.percentile(99);
    assert!(p99 <= bound, "{p99} us, {alone} us alone, the bound is {bound} us");
    assert!(greedy.answered.len() > 50, "and it is served all the same: {}", greedy.answered.len());
}

#[test]
fn tenants_that_always_wait_get_equal_shares_whatever_their_requests_cost() {
    let of = |tenant, context, every| Client {
        tenant,
        when: When::Every(every),
        context,
        patience: Some(5_000_000),
        ..TYPICAL
    };
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
    let mut world = open_loop(&[Client { when: When::Every(20_000), ..TYPICAL }], 2_000_000);
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
fn a_step_of_somebody_alone_has_a_bound() {
    let mut world = World { slow: 10, ..World::new(1) };
    world = run(world, &[Client { when: When::Every(1_000_000), ..TYPICAL }], 8_000_000);
    let at = world.now;
    world.submit(0, &Client { context: 4000, ..TYPICAL }, at);
    world.step();
    let took = world.now - at;
    assert!(took <= 16 * 20_000 + 10 * PER_STEP, "whoever comes next waits for {took} us");
    assert!(took >= 10 * 20_000, "{took} us: short steps would cost more");
}

#[test]
fn a_small_tenant_waits_for_a_few_small_steps_however_slow_the_model() {
    // A model on which a beam of 512 takes many times as long as a step should.
    let slow = 20;
    let patience = Some(60_000_000);
    let small = Client { tenant: 1, when: When::Every(1_500_000), context: 40, patience, ..TYPICAL };
    let greedy = Client { tenant: 2, when: When::Every(500_000), patience, ..HEAVY };
    let mut world = World::new(2);
    world.slow = slow;
    let world = run(world, &[small, greedy], 120_000_000);
    let [small, greedy] = &world.outcomes[..] else { panic!("two clients") };
    assert_eq!((small.refused, small.lost.len()), (0, 0));
    // The bound: the step that the request met, and those that the other is owed meanwhile; its own
    // three, beside chunks of the other's. None is longer than twice the fewest rows that are worth
    // a step.
    let bound = (4 + STEPS as u64) * (PER_STEP + (64 + 64) * PER_ROW) * slow;
    let p99 = small.percentile(99);
    assert!(p99 <= bound, "{p99} us, the bound is {bound} us");
    assert!(!greedy.answered.is_empty());
}

/// The time that a request takes alone.
fn service(client: Client) -> u64 {
    let rows = client.context + (STEPS - 1) * client.beams;
    STEPS as u64 * PER_STEP + rows as u64 * PER_ROW
}

#[test]
fn equal_requests_wait_no_longer_than_in_one_queue() {
    for load in [0.1, 0.3, 0.5, 0.7, 0.9] {
        let when = When::About((service(TYPICAL) as f64 / load) as u64);
        let world = open_loop(&[Client { when, ..TYPICAL }], 100_000_000);
        let outcome = &world.outcomes[0];
        let queue = outcome.first_come_first_served(service(TYPICAL));
        let (ours, theirs) = (outcome.percentile(50), percentile(queue.clone(), 50));
        assert!(ours * 100 <= theirs * 102, "P50 at {load}: {ours} us, {theirs} us in one queue");
        let (ours, theirs) = (outcome.percentile(99), percentile(queue.clone(), 99));
        if theirs <= 100_000 {
            assert!(ours * 100 <= theirs * 102, "P99 at {load}: {ours} us, {theirs} us in one queue");
        }
        let missed = |times: &[u64]| times.iter().filter(|took| **took > 100_000).count();
        let (ours, theirs) = (missed(&outcome.answered), missed(&queue));
        assert!(ours <= theirs, "at {load}, {ours} miss the objective, {theirs} in one queue");
    }
}

#[test]
fn small_requests_wait_little_beside_large_ones_of_their_own_tenant() {
    let small = Client { when: When::About(66_000), context: 100, ..TYPICAL };
    let alone = open_loop(&[small], 60_000_000).outcomes.remove(0).percentile(99);
    for many in [1, 16] {
        let heavy = Client { when: When::Closed(many), patience: None, ..HEAVY };
        let world = open_loop(&[small, heavy], 60_000_000);
        let p99 = world.outcomes[0].percentile(99);
        assert_eq!((world.outcomes[0].refused, world.outcomes[0].lost.len()), (0, 0));
        // The bound includes the step that the request meets, however long its own takes.
        let bound = 5 * alone / 2 + 20_000;
        assert!(p99 <= bound, "{p99} us beside {many}, {alone} us alone");
        assert!(world.outcomes[1].answered.len() > 300, "{}", world.outcomes[1].answered.len());
    }
}

#[test]
fn steps_are_as_short_at_the_end_of_a_long_context_as_at_its_beginning() {
    let small = Client { when: When::About(66_000), context: 100, ..TYPICAL };
    let alone = run(World::with_attention(1, 1000), &[small], 60_000_000).outcomes.remove(0).percentile(99);
    let heavy = Client { context: 6500, when: When::Closed(2), patience: None, ..HEAVY };
    let world = run(World::with_attention(2, 1000), &[small, heavy], 60_000_000);
    let p99 = world.outcomes[0].percentile(99);
    assert!(p99 <= 5 * alone / 2 + 20_000, "{p99} us beside 2, {alone} us alone");
    // One takes 2.1 seconds alone: beams at the end of the context are eight times as much work.
    assert!(world.outcomes[1].answered.len() >= 20, "{}", world.outcomes[1].answered.len());
}

#[test]
fn under_overload_most_of_what_is_answered_meets_the_objective() {
    let capacity = capacity(TYPICAL);
    let when = When::About((1e6 / (capacity * 2.0)) as u64);
    let world = open_loop(&[Client { when, ..TYPICAL }], 60_000_000);
    let outcome = &world.outcomes[0];
    let in_time = outcome.answered.iter().filter(|took| **took <= 100_000).count();
    assert!(in_time * 3 >= outcome.answered.len() * 2, "{in_time} of {}", outcome.answered.len());
}

#[test]
fn batch_requests_take_what_is_left_and_have_their_share() {
    let shoppers = |load: f64| When::About((service(TYPICAL) as f64 / load) as u64);
    let alone = open_loop(&[Client { when: shoppers(0.5), ..TYPICAL }], 60_000_000);
    let replay = Client { when: When::Closed(8), priority: Priority::Batch, patience: None, ..TYPICAL };
    for (load, least) in [(0.5, 40), (3.0, 7)] {
        let world = open_loop(&[Client { when: shoppers(load), ..TYPICAL }, replay], 60_000_000);
        let rows: Vec<usize> = world.outcomes.iter().map(|outcome| outcome.answered.len()).collect();
        let share = rows[1] * 100 / (rows[0] + rows[1]);
        assert!(share >= least, "{share} percent at {load}");
        if load < 1.0 {
            let p99 = world.outcomes[0].percentile(99);
            let bound = alone.outcomes[0].percentile(99) * 3 / 2;
            assert!(p99 <= bound, "{p99} us beside a replay, {bound} us is the bound");
        }
    }
}

#[test]
fn a_large_request_does_not_starve_beside_more_small_ones_than_can_be_served() {
    let when = When::About((service(TYPICAL) as f64 / 2.0) as u64);
    let small = Client { when, patience: Some(1_000_000), ..TYPICAL };
    for priority in [Priority::Interactive, Priority::Batch] {
        let heavy = Client { when: When::Closed(1), patience: None, priority, ..HEAVY };
        let world = open_loop(&[small, heavy], 60_000_000);
        let SchedulerConfig { objective, stretch, batch_share, .. } = SchedulerConfig::default();
        let bound = match priority {
            // It waits no longer, in proportion to its own time, than the small ones that come
            // late.
            Priority::Interactive => stretch * service(HEAVY) * (1_000_000 / objective.0),
            // It gets its share from the first step on.
            _ => 2 * service(HEAVY) * 100 / batch_share,
        };
        let longest = world.outcomes[1].percentile(100);
        assert!(longest <= bound, "{priority:?}: {longest} us, the bound is {bound} us");
    }
}

#[test]
fn recovery_from_overload_is_quick() {
    let capacity = capacity(TYPICAL);
    let burst = Client { when: When::About((1e6 / (capacity * 4.0)) as u64), ..TYPICAL };
    let calm = Client { when: When::About((1e6 / (capacity * 0.3)) as u64), ..TYPICAL };
    let world = World { halt: Some(10_000_000), ..World::new(2) };
    let mut world = run(world, &[burst, Client { when: When::Closed(0), ..TYPICAL }], 10_000_000);
    assert!(world.live(0) > 8, "the burst has left work behind");
    world.halt = None;
    // From now on the second client sends at its moderate rate.
    let begin = world.now;
    let world = run(world, &[Client { when: When::Closed(0), ..burst }, calm], begin + 20_000_000);
    let p99 = world.outcomes[1].percentile(99);
    assert!(p99 <= 120_000, "{p99} us");
    assert_eq!(world.outcomes[1].lost.len() + world.outcomes[1].refused, 0);
}
