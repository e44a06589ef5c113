//! The state machine by example, one rule per test. The simulation shows that the rules hold
//! together.

// Helper functions are test code too.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use beamline_kv_cache::{CacheConfig, Namespace, ReuseClass, SessionKey};
use beamline_model::step::{ContextShape, Plan, Progress, Slot};
use beamline_scheduler::{
    ConfigError, Degraded, Ended, Ending, Event, Failure, Micros, Priority, Refusal, Request, RequestId,
    Scheduler, SchedulerConfig, Usage,
};

const CONFIG: SchedulerConfig = SchedulerConfig {
    max_queued: 8,
    max_running: 4,
    max_context: 64,
    max_beam_width: 16,
    max_generated_steps: 4,
    max_running_cost: 1000,
    max_step_tokens: 32,
    max_chunk: 8,
    max_branch_rows: 16,
    max_step_transfers: 4,
    pairs_per_row: u64::MAX,
    max_step_time: Micros(20_000),
    min_step_rows: 4,
    objective: Micros(100_000),
    stretch: 5,
    late_share: 25,
    batch_share: 10,
};

const CACHE: CacheConfig =
    CacheConfig { pages: 64, page_size: 4, words_per_position: 1, sessions: 8, hash_key: [1; 32] };

/// A scheduler, its clock, and the events that it produced.
struct Bench {
    scheduler: Scheduler<()>,
    now: Micros,
    plan: Plan,
    events: Vec<Event<(), u64>>,
    per_step: u64,
    per_row: u64,
}

impl Bench {
    fn new(config: SchedulerConfig) -> Self {
        let scheduler = Scheduler::new(config, CACHE).unwrap();
        Self { scheduler, now: Micros(0), plan: Plan::default(), events: Vec::new(), per_step: 0, per_row: 1 }
    }

    fn submit(&mut self, request: Request<()>) {
        assert_eq!(self.scheduler.submit(self.now, request), Ok(()));
    }

    fn plan(&mut self) {
        self.scheduler.plan(self.now, &mut self.plan, &mut self.events);
    }

    /// Commits the step. By default it takes a microsecond per row, and a branch step counts as one
    /// row. Beams stay whole, and the second step of each is the last.
    fn commit(&mut self) {
        let rows = self.plan.context_rows() as u64 + self.plan.branches.len() as u64;
        let took = Micros(self.per_step + self.per_row * rows);
        let chunks = self.plan.chunks.iter().map(|chunk| match chunk.expand {
            Some(rows) => (chunk.slot, Progress::Expanded { rows }),
            None => (chunk.slot, Progress::Prefilled),
        });
        let branches = self.plan.branches.iter().map(|branch| (branch.slot, Progress::Finished(7)));
        let mut outcomes = chunks.chain(branches).collect();
        self.now = self.now.after(Duration::from_micros(took.0));
        self.scheduler.commit(self.now, took, &mut outcomes, &mut self.events);
    }

    fn step(&mut self) {
        self.plan();
        self.commit();
    }

    fn fail(&mut self) {
        self.scheduler.fail_step(self.now, Failure::Step("smoke".into()), &mut self.events);
    }

    /// The chunks in the plan: slot and rows.
    fn chunks(&self) -> Vec<(u32, std::ops::Range<usize>)> {
        self.plan.chunks.iter().map(|chunk| (chunk.slot.0, chunk.positions.clone())).collect()
    }

    /// The slots that take a branch step.
    fn branches(&self) -> Vec<u32> {
        self.plan.branches.iter().map(|branch| branch.slot.0).collect()
    }

    fn ended(&mut self) -> Vec<Ended<u64>> {
        let ended = |event| if let Event::Ended(ended) = event { Some(ended) } else { None };
        self.events.drain(..).filter_map(ended).collect()
    }

    /// Runs steps until no request is left.
    fn finish(&mut self) -> Vec<Ended<u64>> {
        while !self.scheduler.is_idle() {
            self.step();
        }
        self.scheduler.check_invariants();
        self.ended()
    }
}

/// A decode of three expansions over a context of `len` positions that no other id shares.
fn request(id: u64, len: usize, beam_width: usize) -> Request<()> {
    Request {
        id: RequestId(id),
        namespace: Namespace::new(b"model", b"tenant"),
        session: None,
        words: (0..len).map(|position| (id * 1000) as u32 + position as u32).collect(),
        context_len: len,
        reuse: ReuseClass::CrossRequest,
        shape: ContextShape::Causal,
        beam_width,
        beam_widths: None,
        min_beam_width: beam_width,
        priority: Priority::Interactive,
        keeps_branches: true,
        generated_steps: 3,
        deadline: None,
        payload: Arc::new(()),
    }
}

fn warm(id: u64, len: usize) -> Request<()> {
    Request { generated_steps: 0, ..request(id, len, 1) }
}

/// The same context under another id.
fn again(id: u64, request: &Request<()>) -> Request<()> {
    Request { id: RequestId(id), ..request.clone() }
}

#[test]
fn a_context_then_a_branch_step_per_further_expansion() {
    let mut bench = Bench::new(CONFIG);
    bench.submit(request(1, 10, 3));
    bench.plan();
    let chunk = &bench.plan.chunks[0];
    assert_eq!((chunk.positions.clone(), chunk.cached, chunk.expand), (0..10, 0, Some(3)));
    assert_eq!(bench.plan.pages.len(), 3);
    bench.commit();
    bench.plan();
    let branch = &bench.plan.branches[0];
    // Three beams, two steps: six rows in two pages of four.
    assert_eq!((branch.context_pages.len(), branch.branch_pages.len()), (3, 2));
    bench.commit();
    let ended = bench.ended().pop().unwrap();
    assert_eq!(ended.ending, Ending::Finished(7));
    let usage = Usage { context_tokens: 10, beam_width: 3, steps: 2, ..Usage::default() };
    assert_eq!(ended.usage, usage);
    assert_eq!((ended.timings.prefilled_at, ended.timings.finished_at), (Some(Micros(10)), Micros(11)));
}

#[test]
fn a_width_for_each_expansion_counts_row_by_row() {
    let widths = |widths: [usize; 3]| Request {
        beam_widths: Some(Arc::from(widths)),
        min_beam_width: 1,
        ..request(1, 10, 5)
    };
    let mut bench = Bench::new(CONFIG);
    bench.submit(widths([1, 3, 5]));
    bench.plan();
    // The first expansion finds at most one beam, even if the widest may hold more.
    assert_eq!(bench.plan.chunks[0].expand, Some(5));
    let mut outcomes = vec![(Slot(0), Progress::Expanded { rows: 1 })];
    bench.scheduler.commit(bench.now, Micros(1), &mut outcomes, &mut bench.events);
    bench.plan();
    // One row and three: one page of four, where five beams of two steps would take three.
    assert_eq!(bench.plan.branches[0].branch_pages.len(), 1);
    let mut outcomes = vec![(Slot(0), Progress::Expanded { rows: 4 })];
    bench.scheduler.commit(bench.now, Micros(1), &mut outcomes, &mut bench.events);
    assert!(matches!(bench.ended()[0].ending, Ending::Failed(Failure::Protocol(_))), "four beams of three");

    bench.submit(widths([1, 3, 5]));
    bench.plan();
    let mut outcomes = vec![(Slot(0), Progress::Expanded { rows: 2 })];
    bench.scheduler.commit(bench.now, Micros(1), &mut outcomes, &mut bench.events);
    assert!(matches!(bench.ended()[0].ending, Ending::Failed(Failure::Protocol(_))), "two beams of one");
    bench.scheduler.check_invariants();
}

/// A bench that has measured steps: a fixed time, and a time for each row.
fn measured(config: SchedulerConfig, per_step: u64, per_row: u64) -> Bench {
    let mut bench = Bench::new(config);
    (bench.per_step, bench.per_row) = (per_step, per_row);
    for id in 1000..1040 {
        bench.submit(request(id, 30, 4));
        bench.finish();
    }
    bench.now = bench.now.after(Duration::from_secs(10));
    bench
}

#[test]
fn where_rows_take_the_time_requests_are_served_one_after_the_other() {
    let mut bench = measured(SchedulerConfig { min_step_rows: 32, ..CONFIG }, 1, 100);
    for id in 0..3 {
        bench.submit(request(id, 30, 4));
    }
    let order: Vec<u64> = bench.finish().iter().map(|ended| ended.id.0).collect();
    assert_eq!(order, [0, 1, 2]);
    bench.submit(request(3, 30, 4));
    bench.submit(request(4, 30, 4));
    bench.plan();
    assert_eq!((bench.plan.chunks.len(), bench.plan.branches.len()), (1, 0));
}

#[test]
fn where_steps_take_the_time_requests_share_them() {
    let mut bench = measured(CONFIG, 10_000, 1);
    for id in 0..3 {
        bench.submit(request(id, 8, 4));
    }
    bench.plan();
    assert_eq!(bench.plan.chunks.len(), 3);
    bench.commit();
    bench.plan();
    assert_eq!(bench.plan.branches.len(), 3);
}

#[test]
fn a_small_request_goes_before_a_large_one_that_has_begun() {
    let config = SchedulerConfig { min_step_rows: 8, max_step_time: Micros(800), ..CONFIG };
    let mut bench = measured(SchedulerConfig { objective: Micros(2_000), ..config }, 1, 100);
    bench.submit(request(0, 64, 16));
    bench.submit(request(1, 64, 16));
    bench.step();
    bench.submit(request(2, 8, 1));
    bench.step();
    let ended = bench.finish();
    let order: Vec<u64> = ended.iter().map(|ended| ended.id.0).collect();
    assert_eq!(order, [2, 0, 1]);
}

#[test]
fn whoever_can_wait_does() {
    let mut bench = measured(CONFIG, 1, 100);
    let priority = |id, priority| Request { priority, ..request(id, 30, 4) };
    bench.submit(priority(0, Priority::Shadow));
    bench.submit(priority(1, Priority::Batch));
    bench.submit(priority(2, Priority::Interactive));
    let order: Vec<u64> = bench.finish().iter().map(|ended| ended.id.0).collect();
    assert_eq!(order, [2, 1, 0]);
}

#[test]
fn the_same_context_is_computed_once_for_two_who_ask_together() {
    let mut bench = Bench::new(CONFIG);
    let first = request(1, 40, 2);
    bench.submit(first.clone());
    bench.submit(again(2, &first));
    let ended = bench.finish();
    let cached: Vec<usize> = ended.iter().map(|ended| ended.usage.cached_tokens).collect();
    assert_eq!((cached, bench.scheduler.cache().stats().duplicates), (vec![0, 40], 0));
    let rows = bench.scheduler.stats().context_rows;
    assert_eq!(rows, 40 + 1, "of the second, the last row alone");
}

#[test]
fn a_returning_context_is_found_and_only_its_last_row_is_computed_again() {
    let mut bench = Bench::new(CONFIG);
    let first = request(1, 8, 2);
    bench.submit(first.clone());
    bench.finish();
    bench.submit(again(2, &first));
    bench.plan();
    let chunk = &bench.plan.chunks[0];
    assert_eq!((chunk.positions.clone(), chunk.cached, chunk.expand), (7..8, 8, Some(2)));
    bench.commit();
    assert_eq!(bench.finish()[0].usage.cached_tokens, 8);
}

#[test]
fn a_user_who_returns_with_a_longer_history_is_remembered() {
    let mut bench = Bench::new(CONFIG);
    let session = SessionKey::new(&Namespace::new(b"model", b"tenant"), "user");
    let visit = |id, len| Request { id: RequestId(id), session: Some(session), ..request(1, len, 2) };
    bench.submit(visit(1, 22));
    bench.finish();
    bench.submit(visit(2, 31));
    assert_eq!(bench.finish()[0].usage.cached_tokens, 20);
    assert_eq!(bench.scheduler.cache().stats().session_hit_positions, 20);
}

#[test]
fn the_reuse_class_is_obeyed() {
    for (class, cached) in [
        (ReuseClass::CrossRequest, 8),
        (ReuseClass::CrossRequestMinusLast, 4),
        (ReuseClass::WithinRequest, 0),
        (ReuseClass::Exact, 8),
    ] {
        let mut bench = Bench::new(CONFIG);
        let first = Request { reuse: class, ..request(1, 8, 2) };
        bench.submit(first.clone());
        bench.finish();
        assert_eq!(bench.scheduler.cache().stats().published, cached / 4, "{class:?}");
        bench.submit(again(2, &first));
        assert_eq!(bench.finish()[0].usage.cached_tokens, cached as usize, "{class:?}");
    }
}

#[test]
fn an_exact_context_is_found_as_a_whole_or_not_at_all() {
    let mut bench = Bench::new(CONFIG);
    // The context takes two and a half pages.
    let first = Request { reuse: ReuseClass::Exact, ..whole(1, 10) };
    bench.submit(first.clone());
    assert_eq!(bench.finish()[0].usage.cached_tokens, 0);
    assert_eq!(bench.scheduler.cache().stats().published, 3);
    bench.submit(again(2, &first));
    bench.plan();
    // The last row is computed again: the first expansion needs it.
    assert_eq!((bench.chunks(), bench.plan.chunks[0].cached), (vec![(0, 9..10)], 10));
    bench.commit();
    assert_eq!(bench.finish()[0].usage.cached_tokens, 10);
    for len in [8, 9, 11, 12, 14] {
        let words = (0..len).map(|position| 1000 + position as u32).collect();
        bench.submit(Request { words, reuse: ReuseClass::Exact, ..whole(len as u64 + 10, len) });
        assert_eq!(bench.finish()[0].usage.cached_tokens, 0, "{len} positions");
    }
}

#[test]
fn an_exact_context_is_warmed_to_its_last_position() {
    let mut bench = Bench::new(CONFIG);
    let exact = |request| Request { reuse: ReuseClass::Exact, shape: ContextShape::Whole, ..request };
    let first = exact(warm(1, 11));
    bench.submit(first.clone());
    bench.plan();
    assert_eq!((bench.chunks(), bench.plan.chunks[0].expand), (vec![(0, 0..11)], None));
    bench.commit();
    assert_eq!(bench.ended()[0].ending, Ending::Warmed);
    bench.submit(again(2, &first));
    bench.plan();
    assert!(bench.plan.is_empty());
    assert_eq!(bench.ended()[0].usage.cached_tokens, 11);
}

#[test]
fn tenants_share_nothing() {
    let mut bench = Bench::new(CONFIG);
    let first = request(1, 16, 2);
    bench.submit(first.clone());
    bench.finish();
    let stranger = Namespace::new(b"model", b"stranger");
    bench.submit(Request { namespace: stranger, ..again(2, &first) });
    assert_eq!(bench.finish()[0].usage.cached_tokens, 0);
}

#[test]
fn warming_computes_the_pages_that_can_be_found_and_nothing_when_they_are() {
    let mut bench = Bench::new(CONFIG);
    let session = SessionKey::new(&Namespace::new(b"model", b"tenant"), "user");
    let first = Request { session: Some(session), ..warm(1, 11) };
    bench.submit(first.clone());
    bench.plan();
    // Of eleven positions, only the two whole pages are computed.
    assert_eq!((bench.chunks(), bench.plan.chunks[0].expand), (vec![(0, 0..8)], None));
    bench.commit();
    assert_eq!(bench.ended()[0].ending, Ending::Warmed);
    bench.submit(again(2, &first));
    bench.submit(Request { reuse: ReuseClass::WithinRequest, ..warm(3, 11) });
    bench.plan();
    assert!(bench.plan.is_empty());
    let ended = bench.ended();
    assert!(ended.iter().all(|ended| ended.ending == Ending::Warmed && ended.usage.steps == 0));
    assert_eq!(ended[0].usage.cached_tokens, 8);
    assert_eq!(bench.scheduler.cache().stats().sessions, 1);
}

#[test]
fn nobody_overtakes_the_head_of_the_queue() {
    // Room for one large request, or many small ones.
    let mut bench = Bench::new(SchedulerConfig { max_running_cost: 80, ..CONFIG });
    bench.submit(request(1, 40, 2));
    bench.submit(request(2, 60, 2));
    bench.submit(request(3, 4, 2));
    let mut order = Vec::new();
    while !bench.scheduler.is_idle() {
        bench.step();
        order.extend(bench.events.drain(..).filter_map(|event| match event {
            Event::Opened { id, .. } => Some(id.0),
            _ => None,
        }));
    }
    assert_eq!(order, [1, 2, 3]);
}

#[test]
fn a_small_request_does_not_overtake_one_that_found_no_room() {
    // Steps take nearly the same time, so that waiting requests are tried at every step.
    let mut bench = Bench::new(SchedulerConfig { max_running_cost: 80, ..CONFIG });
    bench.per_step = 1000;
    // Teaches the scheduler how long steps take.
    for id in 100..140 {
        bench.submit(request(id, 20 + id as usize % 20, 2));
        bench.finish();
    }
    bench.submit(request(1, 40, 2));
    bench.step();
    bench.submit(request(2, 60, 2));
    bench.step();
    bench.submit(request(3, 4, 2));
    let mut told = Vec::new();
    while !bench.scheduler.is_idle() {
        bench.step();
        told.extend(bench.events.drain(..).filter_map(|event| match event {
            Event::Opened { id, .. } => Some(("opened", id.0)),
            Event::Ended(ended) => Some(("ended", ended.id.0)),
            Event::Closed(_) => None,
        }));
    }
    let at = |what: &str, id: u64| told.iter().position(|one| *one == (what, id)).unwrap();
    // When there is room for both, the small one goes first.
    assert!(at("ended", 1) < at("opened", 3), "{told:?}");
    assert!(at("opened", 3) < at("opened", 2), "{told:?}");
}

#[test]
fn a_request_is_admitted_with_all_the_pages_it_will_need() {
    let mut bench = Bench::new(CONFIG);
    // 16 pages of context, 8 of branches: two fit into 64 pages, the third does not.
    for id in 0..3 {
        bench.submit(request(id, 64, 16));
    }
    bench.plan();
    let stats = bench.scheduler.stats();
    assert_eq!((stats.running, stats.queued), (2, 1));
    assert_eq!(bench.scheduler.cache().stats().referenced, 48);
    bench.commit();
    assert_eq!(bench.finish().len(), 3);
}

#[test]
fn a_lookup_counts_once_however_often_its_request_waits_for_room() {
    let mut bench = Bench::new(CONFIG);
    // Two of these fit at a time.
    for id in 0..6 {
        bench.submit(request(id, 64, 16));
    }
    assert_eq!(bench.finish().len(), 6);
    let stats = bench.scheduler.cache().stats();
    assert_eq!((stats.lookups, stats.missed_positions), (6, 6 * 64));
}

#[test]
fn late_requests_are_dropped_wherever_they_are() {
    let mut bench = Bench::new(SchedulerConfig { max_running: 1, ..CONFIG });
    let deadline = Some(Micros(5));
    bench.submit(Request { deadline, ..request(1, 10, 2) });
    bench.submit(Request { deadline, ..request(2, 10, 2) });
    bench.step();
    assert_eq!(bench.now, Micros(8));
    bench.plan();
    assert!(bench.plan.is_empty());
    let ended = bench.ended();
    assert!(ended.iter().all(|ended| ended.ending == Ending::Expired) && ended.len() == 2);
    assert_eq!(ended[1].timings.admitted_at, None, "no work was done for it");
    bench.scheduler.check_invariants();
}

#[test]
fn a_cancel_frees_pages_and_slot_at_once() {
    let mut bench = Bench::new(CONFIG);
    for id in 0..6 {
        bench.submit(request(id, 40, 4));
    }
    bench.step();
    for id in 0..6 {
        assert!(bench.scheduler.cancel(bench.now, RequestId(id), &mut bench.events));
        assert!(!bench.scheduler.cancel(bench.now, RequestId(id), &mut bench.events));
        bench.scheduler.check_invariants();
    }
    assert!(bench.scheduler.is_idle());
    assert_eq!(bench.scheduler.cache().stats().referenced, 0);
}

#[test]
fn a_beam_is_narrowed_only_where_it_may_be_and_only_when_it_would_be_late() {
    let mut bench = Bench::new(CONFIG);
    bench.submit(request(0, 30, 1));
    bench.finish(); // teaches that a row takes a microsecond
    let now = bench.now;
    let with_deadline = |id, micros| {
        let deadline = Some(now.after(Duration::from_micros(micros)));
        Request { deadline, ..request(id, 4, 16) }
    };
    // Four context rows and two branch steps of sixteen: 36 microseconds for the whole beam.
    bench.submit(Request { min_beam_width: 2, ..with_deadline(1, 36) });
    bench.plan();
    assert_eq!(bench.plan.chunks[0].expand, Some(16));
    bench.scheduler.fail_step(bench.now, Failure::Step("over".into()), &mut bench.events);
    bench.ended();

    bench.submit(Request { min_beam_width: 2, ..with_deadline(2, 16) });
    bench.plan();
    assert_eq!(bench.plan.chunks[0].expand, Some(6));
    bench.fail();
    let degraded = Degraded::Deadline { asked: 16, needed: Micros(36), left: Micros(16) };
    assert_eq!(bench.ended()[0].usage.degraded, Some(degraded));

    bench.submit(with_deadline(3, 16));
    bench.plan();
    assert_eq!(bench.plan.chunks[0].expand, Some(16));
}

#[test]
fn beams_of_several_widths_are_narrowed_to_one_that_the_wide_ones_keep_to() {
    let mut bench = Bench::new(CONFIG);
    bench.submit(request(0, 30, 1));
    bench.finish(); // teaches that a row takes a microsecond
    let now = bench.now;
    let mut expand = |id, least, widths: [usize; 3], micros| {
        let deadline = Some(now.after(Duration::from_micros(micros)));
        let beam_widths = Some(Arc::from(widths));
        bench.submit(Request { deadline, beam_widths, min_beam_width: least, ..request(id, 4, 16) });
        bench.plan();
        let width = bench.plan.chunks[0].expand;
        bench.fail();
        (width, bench.ended()[0].usage.degraded)
    };
    // Four context rows, then four and twelve beams: the sixteen of the last expansion cost nothing.
    assert_eq!(expand(1, 2, [4, 12, 16], 20), (Some(16), None));
    let degraded = Degraded::Deadline { asked: 16, needed: Micros(20), left: Micros(14) };
    assert_eq!(expand(2, 2, [4, 12, 16], 14), (Some(6), Some(degraded)), "four beams and six");
    assert_eq!(expand(3, 9, [4, 12, 16], 14).0, Some(9), "never under the least");
    assert_eq!(expand(4, 4, [4, 4, 16], 5), (Some(16), None), "no narrower beam takes less time");
    assert_eq!(expand(5, 16, [4, 12, 16], 14), (Some(16), None));
}

#[test]
fn after_a_failed_step_each_request_tries_again_alone() {
    let mut bench = Bench::new(CONFIG);
    for id in 0..2 {
        bench.submit(request(id, 6, 2));
    }
    bench.plan();
    assert_eq!(bench.plan.chunks.len(), 2);
    bench.events.clear();
    bench.fail();
    let reopened = |slot| {
        let id = RequestId(u64::from(slot));
        [Event::Closed(Slot(slot)), Event::Opened { id, slot: Slot(slot), payload: Arc::new(()) }]
    };
    assert_eq!(bench.events, [reopened(0), reopened(1)].concat());
    bench.submit(request(3, 6, 2));
    bench.plan();
    assert_eq!(bench.chunks(), [(0, 0..6)]);
    bench.fail();
    assert!(matches!(bench.ended().pop().unwrap().ending, Ending::Failed(Failure::Step(_))));
    bench.plan();
    assert_eq!(bench.chunks(), [(1, 0..6)]);
    bench.commit();
    bench.plan();
    assert_eq!(bench.branches(), [1], "alone to its end");
    bench.commit();
    let ended = bench.finish();
    assert!(ended.len() == 2 && ended.iter().all(|ended| ended.ending == Ending::Finished(7)));
    let stats = bench.scheduler.stats();
    assert_eq!((stats.failed, stats.finished, stats.retried, stats.failed_steps), (1, 2, 2, 2));
}

#[test]
fn a_decode_that_tries_again_starts_at_its_last_context_row() {
    let mut bench = Bench::new(CONFIG);
    bench.submit(request(0, 6, 2));
    bench.submit(request(1, 6, 2));
    bench.step();
    bench.plan();
    assert_eq!(bench.branches(), [0, 1]);
    bench.fail();
    bench.plan();
    let chunk = &bench.plan.chunks[0];
    assert_eq!((chunk.positions.clone(), chunk.cached, chunk.expand), (5..6, 6, Some(2)));
    bench.commit();
    assert_eq!(bench.finish().len(), 2);
}

/// A request whose context cannot be cut.
fn whole(id: u64, len: usize) -> Request<()> {
    Request { shape: ContextShape::Whole, ..request(id, len, 2) }
}

#[test]
fn a_whole_context_is_in_one_chunk_however_many_wait() {
    let mut bench = Bench::new(CONFIG);
    for (id, len) in [(0, 20), (1, 20), (2, 12), (3, 32)] {
        bench.submit(whole(id, len));
    }
    let mut chunks = Vec::new();
    while !bench.scheduler.is_idle() {
        bench.plan();
        chunks.extend(bench.chunks().into_iter().map(|(_, positions)| positions));
        bench.commit();
    }
    chunks.sort_by_key(|positions| positions.end);
    assert_eq!(chunks, [0..12, 0..20, 0..20, 0..32]);
}

#[test]
fn a_whole_context_does_not_starve_beside_contexts_that_are_cut() {
    let mut bench = Bench::new(CONFIG);
    bench.submit(request(0, 60, 2));
    bench.submit(whole(1, 32));
    for id in 2..40 {
        if bench.scheduler.stats().queued < 8 {
            bench.submit(request(id, 4, 1));
        }
        bench.step();
    }
    assert!(bench.ended().iter().any(|ended| ended.id == RequestId(1)));
}

#[test]
fn a_whole_context_is_never_shared_and_starts_over_after_a_failed_step() {
    let mut bench = Bench::new(CONFIG);
    let first = whole(0, 16);
    bench.submit(first.clone());
    bench.submit(whole(1, 12));
    bench.step();
    assert_eq!(bench.scheduler.cache().stats().published, 0);
    bench.plan();
    assert_eq!(bench.branches(), [0, 1]);
    bench.fail();
    bench.plan();
    assert_eq!(bench.chunks(), [(0, 0..16)], "not just its last row");
    assert_eq!(bench.plan.chunks[0].cached, 0);
    bench.commit();
    bench.finish();
    bench.submit(again(2, &first));
    bench.plan();
    let chunk = &bench.plan.chunks[0];
    assert_eq!((chunk.positions.clone(), chunk.cached), (0..16, 0), "nothing of it was cached");
}

#[test]
fn an_outcome_that_means_nothing_fails_its_request() {
    for nonsense in [Progress::Prefilled, Progress::Expanded { rows: 3 }, Progress::Expanded { rows: 0 }] {
        let mut bench = Bench::new(CONFIG);
        bench.submit(request(0, 6, 2));
        bench.submit(request(1, 6, 2));
        bench.plan();
        let mut outcomes = vec![(Slot(0), nonsense), (Slot(1), Progress::Expanded { rows: 2 })];
        bench.scheduler.commit(bench.now, Micros(1), &mut outcomes, &mut bench.events);
        let ended = bench.ended();
        assert!(ended.len() == 1 && ended[0].id == RequestId(0));
        assert!(matches!(ended[0].ending, Ending::Failed(Failure::Protocol(_))));
        assert_eq!(bench.finish().len(), 1);
    }
}

#[test]
fn every_refusal_has_its_reason() {
    let mut bench = Bench::new(SchedulerConfig { max_running_cost: 100, max_generated_steps: 40, ..CONFIG });
    let good = || request(1, 10, 2);
    let refusals = [
        (Request { context_len: 0, ..good() }, Refusal::EmptyContext),
        (request(1, 65, 2), Refusal::ContextTooLong { len: 65, limit: 64 }),
        (Request { context_len: 9, ..good() }, Refusal::WordsMismatch { words: 10, expected: 9 }),
        (request(1, 10, 17), Refusal::BeamTooWide { width: 17, limit: 16 }),
        (request(1, 10, 0), Refusal::BeamWidth { width: 0, least: 0 }),
        (Request { min_beam_width: 0, ..good() }, Refusal::BeamWidth { width: 2, least: 0 }),
        (Request { min_beam_width: 3, ..good() }, Refusal::BeamWidth { width: 2, least: 3 }),
        (
            Request { beam_widths: Some(Arc::from([2, 2])), ..good() },
            Refusal::BeamWidths { steps: 3, width: 2 },
        ),
        (
            Request { beam_widths: Some(Arc::from([2, 3, 2])), ..good() },
            Refusal::BeamWidths { steps: 3, width: 2 },
        ),
        (
            Request { beam_widths: Some(Arc::from([2, 0, 2])), ..good() },
            Refusal::BeamWidths { steps: 3, width: 2 },
        ),
        (Request { generated_steps: 41, ..good() }, Refusal::TooManySteps { steps: 41, limit: 40 }),
        (Request { generated_steps: 40, ..request(1, 10, 16) }, Refusal::NeverFits { pages: 159, pool: 64 }),
        (
            Request { generated_steps: 10, ..request(1, 10, 16) },
            Refusal::TooExpensive { cost: 170, limit: 100 },
        ),
        (Request { deadline: Some(Micros(0)), ..good() }, Refusal::DeadlinePassed),
        (
            Request { shape: ContextShape::Whole, ..request(1, 33, 2) },
            Refusal::NeverInOneStep { len: 33, limit: 32 },
        ),
    ];
    let count = refusals.len() as u64;
    for (request, refusal) in refusals {
        assert_eq!(bench.scheduler.submit(bench.now, request), Err(refusal));
    }
    bench.submit(good());
    assert_eq!(bench.scheduler.submit(bench.now, good()), Err(Refusal::DuplicateId));
    for id in 2..9 {
        bench.submit(request(id, 10, 2));
    }
    assert_eq!(bench.scheduler.submit(bench.now, request(9, 10, 2)), Err(Refusal::QueueFull { limit: 8 }));
    assert_eq!(bench.scheduler.stats().refused, count + 2);
    assert_eq!(bench.finish().len(), 8);
}

#[test]
fn a_configuration_that_cannot_work_is_refused() {
    let error = |config| Scheduler::<()>::new(config, CACHE).err();
    assert_eq!(error(SchedulerConfig { max_chunk: 0, ..CONFIG }), Some(ConfigError::Zero("max_chunk")));
    let narrow = SchedulerConfig { max_branch_rows: 15, ..CONFIG };
    assert_eq!(error(narrow), Some(ConfigError::BranchRows { rows: 15, width: 16 }));
    let cache = CacheConfig { pages: 0, ..CACHE };
    assert_eq!(Scheduler::<()>::new(CONFIG, cache).err(), Some(ConfigError::Zero("pages")));
}
