//! Drives a scheduler through a scenario in virtual time, beside a naive account of the expected
//! results.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use beamline_kv_cache::{ReuseClass, Transfer};
use beamline_model::step::{ContextShape, Plan, Progress, Slot, StepModel};
use beamline_scheduler::{
    Ended, Ending, Event, Failure, Micros, Refusal, Request, RequestId, Scheduler, SchedulerConfig,
};

use crate::{
    model::SimModel,
    rng::{Rng, mix},
    scenario::{Scenario, Traffic},
    story::{Fate, Story},
};

/// The results of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// A digest of every event, every plan and every moment.
    pub(crate) digest: u64,
    /// A digest of the answers alone, independent of their order.
    pub(crate) answers: u64,
    pub(crate) steps: u64,
    pub(crate) answered: u64,
    pub(crate) warmed: u64,
    pub(crate) failed: u64,
    pub(crate) expired: u64,
    pub(crate) cancelled: u64,
    pub(crate) dropped: u64,
    pub(crate) refused: u64,
    pub(crate) degraded: u64,
    pub(crate) retried: u64,
    pub(crate) evictions: u64,
    pub(crate) duplicates: u64,
    pub(crate) hit_tokens: u64,
    pub(crate) restored_tokens: u64,
    pub(crate) host_evictions: u64,
    pub(crate) host_expirations: u64,
    pub(crate) missed_tokens: u64,
}

/// A request that has not ended.
struct Live {
    story: Story,
    deadline: Option<Micros>,
    admitted: bool,
    cancelled: bool,
}

pub(crate) struct Driver<'a> {
    scenario: &'a Scenario,
    scheduler: Scheduler<Story>,
    model: SimModel,
    traffic: Traffic,
    /// Decides when things happen; the contents of requests do not depend on it.
    dice: Rng,
    now: Micros,
    /// The time of the host tier, which the driver sets.
    host_time: Arc<AtomicU64>,
    live: BTreeMap<u64, Live>,
    /// The request that owns each slot.
    open: HashMap<Slot, u64>,
    waiting: usize,
    plans: u64,
    report: Report,
    /// Receives a line for every event, if set.
    trace: Option<&'a mut dyn FnMut(String)>,
}

type Events = Vec<Event<Story, u64>>;

impl<'a> Driver<'a> {
    pub(crate) fn new(scenario: &'a Scenario, trace: Option<&'a mut dyn FnMut(String)>) -> Self {
        let slots = scenario.config.max_running;
        let mut model =
            SimModel::new(scenario.pages as usize, scenario.page_size as usize, slots, scenario.seed);
        model.failing = scenario.failing;
        let mut scheduler = Scheduler::new(scenario.config, scenario.cache()).expect("the scenario works");
        let host_time = Arc::default();
        if let Some(host) = scenario.host_memory(&host_time) {
            scheduler = scheduler.with_host_memory(host);
        }
        Self {
            scenario,
            scheduler,
            host_time,
            model,
            traffic: Traffic::new(scenario),
            dice: Rng::new(mix(scenario.seed, 0xd1ce)),
            now: Micros(0),
            live: BTreeMap::new(),
            open: HashMap::new(),
            waiting: 0,
            plans: 0,
            report: Report::default(),
            trace,
        }
    }

    fn tell(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace(format!("{:>9} {}", self.now.0, what()));
        }
    }

    pub(crate) fn run(mut self) -> Report {
        let (mut plan, mut events, mut outcomes) = (Plan::default(), Events::new(), Vec::new());
        let mut submitted = 0;
        while submitted < self.scenario.requests || !self.live.is_empty() {
            let quiet = self.scenario.quiet;
            if !self.dice.permille(quiet) {
                let burst = self.dice.within(1, self.scenario.burst);
                for _ in 0..burst.min(self.scenario.requests - submitted) {
                    self.submit();
                    submitted += 1;
                }
            }
            self.cancel(&mut events);
            self.plans += 1;
            self.host_time.store(self.now.0, Ordering::Relaxed);
            self.scheduler.plan(self.now, &mut plan, &mut events);
            self.apply(&mut events);
            if self.plans.is_multiple_of(64) {
                self.scheduler.check_invariants();
            }
            if plan.is_empty() {
                assert!(self.live.is_empty(), "requests are left and nothing is done");
                self.now.0 += 1000;
                self.scheduler.idle();
            } else {
                self.step(&plan, &mut outcomes, &mut events);
            }
        }
        self.finish()
    }

    fn submit(&mut self) {
        let request = self.traffic.request(self.scenario, self.now);
        let Request { id, deadline, .. } = request;
        let story = Story::clone(&request.payload);
        let full = self.waiting == self.scenario.config.max_queued;
        let result = self.scheduler.submit(self.now, request);
        self.tell(|| format!("submit {story:?} {deadline:?}: {result:?}"));
        let SchedulerConfig { max_queued, max_step_tokens, .. } = self.scenario.config;
        let expected = match story.shape {
            ContextShape::Whole
                if story.context_len > max_step_tokens
                    && (!story.is_warm() || story.reuse == ReuseClass::Exact) =>
            {
                Err(Refusal::NeverInOneStep { len: story.context_len, limit: max_step_tokens })
            }
            _ if full => Err(Refusal::QueueFull { limit: max_queued }),
            _ => Ok(()),
        };
        match result {
            Err(Refusal::Backlog { .. }) => {
                assert!(deadline.is_some() && expected.is_ok() && !self.live.is_empty())
            }
            result => assert_eq!(result, expected),
        }
        if result.is_ok() {
            self.waiting += 1;
            self.live.insert(id.0, Live { story, deadline, admitted: false, cancelled: false });
        } else {
            self.report.refused += 1;
        }
    }

    fn cancel(&mut self, events: &mut Events) {
        let rate = self.scenario.cancel;
        if !self.dice.permille(rate) || self.live.is_empty() {
            return;
        }
        let index = self.dice.within(0, self.live.len() - 1);
        let Some((&id, live)) = self.live.iter_mut().nth(index) else { return };
        live.cancelled = true;
        self.tell(|| format!("cancel {id}"));
        assert!(self.scheduler.cancel(self.now, RequestId(id), events));
        self.apply(events);
        assert!(!self.live.contains_key(&id), "a cancel ends a request at once");
        assert!(!self.scheduler.cancel(self.now, RequestId(id), events), "and only once");
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<u64>)>, events: &mut Events) {
        self.check_plan(plan);
        let result = self.model.step(plan, outcomes);
        let rows = plan.context_rows() + plan.branches.len() * 4;
        let took = Micros(50 + rows as u64 * 7);
        self.now.0 += took.0;
        self.report.steps += 1;
        self.tell(|| format!("step {plan:?}: {result:?} {outcomes:?}"));
        match result {
            Ok(()) => self.scheduler.commit(self.now, took, outcomes, events),
            Err(error) => {
                // The scheduler treats all ways in which a step can fail alike.
                match self.now.0 % 3 {
                    0 => self.scheduler.fail_step(self.now, Failure::Panicked(error.0), events),
                    1 => self.scheduler.fail_step(self.now, Failure::Step(error.0), events),
                    _ => self.scheduler.commit(self.now, took, outcomes, events),
                }
            }
        }
        assert!(outcomes.is_empty());
        self.apply(events);
    }

    fn check_plan(&mut self, plan: &Plan) {
        let config = &self.scenario.config;
        assert!(plan.context_rows() <= config.max_step_tokens);
        let branch_rows: usize = plan.branches.iter().map(|branch| branch.rows).sum();
        assert!(branch_rows <= config.max_branch_rows);
        let entries = plan.chunks.iter().map(|chunk| chunk.slot);
        let moved =
            plan.transfers.iter().filter(|transfer| matches!(transfer, Transfer::Import { .. })).count();
        if plan.chunks.len() + plan.branches.len() > 1 {
            // Pages that come back for one request keep the others waiting.
            let budget = config.max_step_transfers.max(1);
            assert!(moved <= budget || plan.branches.is_empty(), "{moved} pages come back in one step");
        }
        for slot in entries.chain(plan.branches.iter().map(|branch| branch.slot)) {
            let live = &self.live[&self.open[&slot]];
            assert!(live.deadline.is_none_or(|deadline| deadline > self.now), "late work is dropped");
            self.report.digest = mix(self.report.digest, u64::from(slot.0));
        }
        for chunk in &plan.chunks {
            self.report.digest = mix(self.report.digest, chunk.positions.end as u64);
            let story = &self.live[&self.open[&chunk.slot]].story;
            let hoards = chunk.positions.len() > config.max_chunk && story.shape == ContextShape::Causal;
            // A request that shares a step is welcome there with all of its rows.
            let alone = plan.chunks.len() + plan.branches.len() == 1;
            if hoards && alone && self.scenario.is_trouble_free() {
                assert_eq!(self.live.len(), 1, "a long context keeps others waiting");
            }
        }
    }

    /// Carries out the scheduler's events, and checks that they are allowed.
    fn apply(&mut self, events: &mut Events) {
        for event in events.drain(..) {
            match event {
                Event::Opened { id, slot, payload } => {
                    self.tell(|| format!("open {id:?} {slot:?}"));
                    self.model.open(slot, Story::clone(&payload));
                    self.opened(id.0, slot);
                }
                Event::Closed(slot) => {
                    self.tell(|| format!("close {slot:?}"));
                    self.model.close(slot);
                    assert!(self.open.remove(&slot).is_some());
                }
                Event::Ended(ended) => {
                    self.tell(|| format!("{ended:?}"));
                    self.ended(ended);
                }
            }
        }
    }

    fn opened(&mut self, id: u64, slot: Slot) {
        assert_eq!(self.open.insert(slot, id), None);
        let live = self.live.get_mut(&id).expect("the request has not ended");
        if live.admitted {
            assert!(!self.scenario.is_trouble_free(), "{id} was opened twice");
            return;
        }
        live.admitted = true;
        assert!(live.deadline.is_none_or(|deadline| deadline > self.now), "late work is dropped");
        self.admitted(id);
    }

    fn admitted(&mut self, id: u64) {
        self.waiting -= 1;
        self.report.digest = mix(self.report.digest, id);
    }

    fn ended(&mut self, ended: Ended<u64>) {
        let id = ended.id.0;
        let live = self.live.remove(&id).expect("a request ends once");
        self.report.digest = mix(mix(self.report.digest, id), self.now.0);
        self.report.degraded += u64::from(ended.usage.degraded.is_some());
        let (usage, timings, story) = (&ended.usage, &ended.timings, &live.story);
        if !live.admitted && timings.admitted_at.is_some() {
            // Admitted and ended at once.
            assert_eq!((&ended.ending, usage.steps), (&Ending::Warmed, 0));
            self.admitted(id);
        } else if !live.admitted {
            self.waiting -= 1;
        }

        assert_eq!(usage.context_tokens, story.context_len);
        assert!(usage.cached_tokens <= story.reusable_positions());
        if let Some(degraded) = usage.degraded {
            assert!(usage.beam_width < story.beam_width, "{degraded:?}");
        }
        let times =
            [Some(timings.queued_at), timings.admitted_at, timings.prefilled_at, Some(timings.finished_at)];
        assert!(times.iter().flatten().is_sorted() && timings.finished_at == self.now);

        let alone = self.model.failed_alone.remove(&id);
        match &ended.ending {
            Ending::Finished(answer) => {
                assert!(timings.prefilled_at.is_some() && usage.steps > 0);
                assert_eq!(usage.degraded.is_none(), usage.beam_width == story.beam_width);
                assert!((story.min_beam_width..=story.beam_width).contains(&usage.beam_width));
                assert_eq!(Fate::Answer(*answer), story.fate(usage.beam_width));
                self.report.digest = mix(self.report.digest, *answer);
                self.report.answers = self.report.answers.wrapping_add(mix(id, *answer));
                self.report.answered += 1;
            }
            Ending::Warmed => {
                // A fault has no effect when there is nothing to compute.
                assert!(story.is_warm() && (usage.steps == 0 || story.fate(0) == Fate::Warmed));
                self.report.warmed += 1;
            }
            Ending::Failed(why) => {
                let width = usage.beam_width.max(1);
                match (why, story.fate(width)) {
                    (Failure::Request(_), Fate::Fails) | (Failure::Protocol(_), Fate::Babbles) => {}
                    _ => assert!(alone, "{id} failed for what its neighbours did"),
                }
                self.report.failed += 1;
            }
            Ending::Expired => {
                assert!(live.deadline.is_some_and(|deadline| deadline <= self.now));
                self.report.expired += 1;
            }
            Ending::Dropped(_) => {
                assert!(!live.admitted && live.deadline.is_some(), "nothing was done for it");
                self.report.dropped += 1;
            }
            Ending::Cancelled => {
                assert!(live.cancelled);
                self.report.cancelled += 1;
            }
        }
    }

    /// Asserts that nothing is left, and that the account agrees with the scheduler's own.
    fn finish(mut self) -> Report {
        self.scheduler.check_invariants();
        assert!(self.scheduler.is_idle());
        assert_eq!((self.waiting, self.open.len(), self.model.open_slots()), (0, 0, 0));
        let cache = self.scheduler.cache().stats();
        assert_eq!((cache.referenced, cache.hash_collisions), (0, 0));
        let stats = self.scheduler.stats();
        let report = &mut self.report;
        assert_eq!((stats.queued, stats.running), (0, 0));
        assert_eq!(stats.steps + stats.failed_steps, report.steps);
        assert_eq!(stats.finished, report.answered + report.warmed);
        assert_eq!(stats.failed, report.failed);
        assert_eq!(stats.expired, report.expired);
        assert_eq!(stats.cancelled, report.cancelled);
        assert_eq!(stats.dropped, report.dropped);
        assert_eq!(stats.refused, report.refused);
        assert_eq!(stats.accepted + stats.refused, self.scenario.requests as u64);
        assert_eq!(
            stats.accepted,
            stats.finished + stats.failed + stats.expired + stats.cancelled + stats.dropped
        );
        report.retried = stats.retried;
        report.evictions = cache.evictions;
        // A context of class `Exact` is computed as a whole again once its tail was evicted.
        let whole_again = self.scenario.reuse.contains(&ReuseClass::Exact);
        report.duplicates = if whole_again { 0 } else { cache.duplicates };
        report.hit_tokens = stats.hit_tokens;
        report.restored_tokens = stats.restored_tokens;
        report.host_evictions = cache.host.evictions;
        report.host_expirations = cache.host.expirations;
        assert!(cache.host.bytes <= cache.host.capacity);
        report.missed_tokens = stats.missed_tokens;
        self.report
    }
}
