//! The engine with real threads and a scripted model: what the simulation cannot show.

// Helper functions are test code too.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::{
    future::Future,
    pin::pin,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread::Thread,
    time::{Duration, Instant},
};

use beamline_kv_cache::{CacheConfig, Namespace, ReuseClass};
use beamline_model::step::{ContextShape, Plan, Progress, Pulse, Slot, StepError, StepModel};
use beamline_scheduler::{
    Engine, EngineDied, EngineHandle, Failure, Micros, Priority, Refusal, Request, RequestId,
    SchedulerConfig, Ticket, Unserved,
};

const PAGES: u32 = 64;

/// The scripted behaviour of the model for a request.
#[derive(Debug, PartialEq, Eq)]
enum Do {
    Answer(u64),
    PanicInStep,
    PanicInOpen,
    PanicInClose(u64),
    PanicInClone,
    /// A bug of the program, not of the model.
    PanicInDrop,
}

impl Drop for Do {
    fn drop(&mut self) {
        assert!(!matches!(self, Self::PanicInDrop) || std::thread::panicking(), "dropped");
    }
}

impl Clone for Do {
    fn clone(&self) -> Self {
        match self {
            Self::Answer(answer) => Self::Answer(*answer),
            Self::PanicInStep => Self::PanicInStep,
            Self::PanicInOpen => Self::PanicInOpen,
            Self::PanicInClose(answer) => Self::PanicInClose(*answer),
            Self::PanicInClone => panic!("cloned"),
            Self::PanicInDrop => Self::PanicInDrop,
        }
    }
}

/// Holds the model at the beginning of a step.
#[derive(Default)]
struct Gate {
    shut: Mutex<bool>,
    changed: Condvar,
    /// Beats that the model must give while it stands at the gate.
    beats: AtomicUsize,
    /// Steps that stand at the gate or have passed it.
    came: AtomicUsize,
}

impl Gate {
    fn shut(&self) {
        *self.shut.lock().unwrap() = true;
    }

    fn open(&self) {
        *self.shut.lock().unwrap() = false;
        self.changed.notify_all();
    }

    /// Lets the model do a part of its step.
    fn let_it_work(&self) {
        self.beats.fetch_add(1, Ordering::SeqCst);
        drop(self.shut.lock().unwrap());
        self.changed.notify_all();
    }

    fn pass(&self, pulse: &Pulse) {
        self.came.fetch_add(1, Ordering::SeqCst);
        let waits = |shut: &mut bool| {
            while self
                .beats
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |beats| beats.checked_sub(1))
                .is_ok()
            {
                pulse.beat();
            }
            *shut
        };
        drop(self.changed.wait_while(self.shut.lock().unwrap(), waits).unwrap());
    }

    fn wait_for_a_step(&self) {
        eventually("a step begins", || self.came.load(Ordering::SeqCst) > 0);
    }
}

#[derive(Default)]
struct Puppet {
    gate: Arc<Gate>,
    open: Vec<Option<Do>>,
    pulse: Pulse,
}

impl StepModel for Puppet {
    type Payload = Do;
    type Answer = u64;

    fn set_pulse(&mut self, pulse: Pulse) {
        self.pulse = pulse;
    }

    fn open(&mut self, slot: Slot, payload: Do) {
        assert!(payload != Do::PanicInOpen, "opened");
        let index = slot.0 as usize;
        self.open.resize_with(self.open.len().max(index + 1), || None);
        assert!(self.open[index].replace(payload).is_none());
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<u64>)>) -> Result<(), StepError> {
        self.gate.pass(&self.pulse);
        let answer = |slot: Slot| match &self.open[slot.0 as usize] {
            Some(Do::Answer(answer) | Do::PanicInClose(answer)) => *answer,
            _ => panic!("stepped"),
        };
        for chunk in &plan.chunks {
            let answer = answer(chunk.slot);
            let progress = match chunk.expand {
                None => Progress::Prefilled,
                Some(1) => Progress::Finished(answer),
                Some(rows) => Progress::Expanded { rows },
            };
            outcomes.push((chunk.slot, progress));
        }
        for branch in &plan.branches {
            outcomes.push((branch.slot, Progress::Finished(answer(branch.slot))));
        }
        Ok(())
    }

    fn close(&mut self, slot: Slot) {
        let payload = self.open.get_mut(slot.0 as usize).and_then(Option::take);
        assert!(!matches!(payload, Some(Do::PanicInClose(_))), "closed");
    }
}

fn config() -> SchedulerConfig {
    SchedulerConfig { max_queued: 256, max_running: 8, max_context: 64, ..SchedulerConfig::default() }
}

fn start(config: SchedulerConfig) -> (Engine<Do, u64>, EngineHandle<Do, u64>, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let cache =
        CacheConfig { pages: PAGES, page_size: 4, words_per_position: 1, sessions: 8, hash_key: [3; 32] };
    let engine = Engine::start(Puppet { gate: gate.clone(), ..Puppet::default() }, config, cache).unwrap();
    let handle = engine.handle();
    (engine, handle, gate)
}

fn request(payload: Do, beam_width: usize) -> Request<Do> {
    let words: Vec<u32> = (0..10).map(|position| position * 7 + beam_width as u32).collect();
    Request {
        id: RequestId(0),
        namespace: Namespace::new(b"model", b"tenant"),
        session: None,
        context_len: words.len(),
        words: words.into(),
        reuse: ReuseClass::CrossRequest,
        shape: ContextShape::Causal,
        beam_width,
        beam_widths: None,
        min_beam_width: beam_width,
        priority: Priority::Interactive,
        keeps_branches: true,
        generated_steps: 2,
        deadline: None,
        payload: Arc::new(payload),
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < Duration::from_secs(20), "not within reason: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The smallest executor: proves that a ticket needs no runtime.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

#[test]
fn everybody_gets_their_own_answer() {
    let (engine, handle, _) = start(config());
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let handle = handle.clone();
            scope.spawn(move || {
                for n in 0..500 {
                    let wanted = thread * 1000 + n;
                    let ticket = handle.submit(request(Do::Answer(wanted), 1 + (n % 5) as usize)).unwrap();
                    assert_eq!(block_on(ticket).unwrap().answer, Some(wanted));
                }
            });
        }
    });
    let stats = handle.stats();
    assert_eq!((stats.scheduler.finished, stats.scheduler.queued, stats.scheduler.running), (2000, 0, 0));
    assert!(stats.scheduler.hit_tokens > 0 && stats.scheduler.step_micros > 0);
    assert_eq!(stats.cache.referenced, 0);
    drop(handle);
    assert_eq!(engine.join(), Ok(()));
}

#[test]
fn a_dropped_ticket_frees_what_it_held() {
    let (_engine, handle, gate) = start(config());
    gate.shut();
    let tickets: Vec<_> = (0..20).map(|n| handle.submit(request(Do::Answer(n), 2)).unwrap()).collect();
    gate.wait_for_a_step();
    drop(tickets);
    gate.open();
    eventually("all are cancelled", || handle.stats().scheduler.cancelled == 20);
    let stats = handle.stats();
    assert_eq!((stats.scheduler.queued, stats.scheduler.running, stats.cache.referenced), (0, 0, 0));
    assert_eq!(handle.submit(request(Do::Answer(1), 2)).unwrap().wait().unwrap().answer, Some(1));
}

/// Runs steps with `poison` among good requests. The good ones are answered, and so are later ones.
fn poison_harms_nobody_else(poison: Do) -> Result<Option<u64>, Unserved> {
    let (engine, handle, gate) = start(config());
    gate.shut();
    let first = handle.submit(request(Do::Answer(0), 1)).unwrap();
    gate.wait_for_a_step();
    // All of these share the step after the first.
    let submit = |payload| handle.submit(request(payload, 3)).unwrap();
    let before: Vec<Ticket<u64>> = (1..4).map(|n| submit(Do::Answer(n))).collect();
    let poison = submit(poison);
    let after: Vec<Ticket<u64>> = (4..7).map(|n| submit(Do::Answer(n))).collect();
    gate.open();
    assert_eq!(first.wait().unwrap().answer, Some(0));
    for (n, ticket) in (1..).zip(before.into_iter().chain(after)) {
        assert_eq!(ticket.wait().unwrap().answer, Some(n));
    }
    let outcome = poison.wait();
    assert_eq!(submit(Do::Answer(9)).wait().unwrap().answer, Some(9));
    assert_eq!(engine.drain(Duration::from_secs(10)), Ok(()));
    assert_eq!(handle.stats().cache.referenced, 0);
    outcome.map(|completed| completed.answer)
}

#[test]
fn a_panicking_step_fails_only_the_request_that_causes_it() {
    let outcome = poison_harms_nobody_else(Do::PanicInStep);
    assert_eq!(outcome, Err(Unserved::Failed(Failure::Panicked("stepped".into()))));
}

#[test]
fn a_panic_at_opening_fails_only_the_request_that_causes_it() {
    let outcome = poison_harms_nobody_else(Do::PanicInOpen);
    assert_eq!(outcome, Err(Unserved::Failed(Failure::Panicked("opened".into()))));
}

#[test]
fn a_panic_at_closing_is_survived() {
    assert_eq!(poison_harms_nobody_else(Do::PanicInClose(5)), Ok(Some(5)));
}

#[test]
fn overload_is_refused_at_once() {
    let (_engine, handle, gate) = start(SchedulerConfig { max_queued: 3, max_running: 1, ..config() });
    gate.shut();
    let running = handle.submit(request(Do::Answer(0), 1)).unwrap();
    gate.wait_for_a_step();
    let waiting: Vec<_> = (1..4).map(|n| handle.submit(request(Do::Answer(n), 1)).unwrap()).collect();
    assert_eq!(handle.stats().scheduler.queued, 3);
    for _ in 0..5 {
        assert_eq!(handle.submit(request(Do::Answer(9), 1)).err(), Some(Refusal::QueueFull { limit: 3 }));
    }
    assert_eq!(handle.stats().scheduler.refused, 5);
    gate.open();
    for (n, ticket) in (0..).zip([running].into_iter().chain(waiting)) {
        assert_eq!(ticket.wait().unwrap().answer, Some(n));
    }
    assert_eq!(handle.submit(request(Do::Answer(9), 1)).unwrap().wait().unwrap().answer, Some(9));
}

#[test]
fn what_can_never_be_served_is_refused_at_once() {
    let (_engine, handle, _) = start(config());
    let good = || request(Do::Answer(0), 2);
    let refusal = |request| handle.submit(request).err();
    assert_eq!(refusal(Request { context_len: 0, ..good() }), Some(Refusal::EmptyContext));
    let late = Request { deadline: Some(Micros(0)), ..good() };
    assert_eq!(refusal(late), Some(Refusal::DeadlinePassed));
    let pages = 3 + PAGES as usize;
    let large = Request { generated_steps: 1 + PAGES as usize * 2, ..good() };
    let limits = SchedulerConfig { max_generated_steps: 1000, ..config() };
    let (_engine, roomy, _) = start(limits);
    assert_eq!(roomy.submit(large).err(), Some(Refusal::NeverFits { pages, pool: PAGES as usize }));
    assert_eq!(handle.stats().scheduler.refused, 2);
}

#[test]
fn a_deadline_ends_a_request_that_waits() {
    let (_engine, handle, gate) = start(SchedulerConfig { max_running: 1, ..config() });
    gate.shut();
    let running = handle.submit(request(Do::Answer(0), 1)).unwrap();
    gate.wait_for_a_step();
    let deadline = Some(handle.now().after(Duration::from_millis(20)));
    let waiting = handle.submit(Request { deadline, ..request(Do::Answer(1), 1) }).unwrap();
    std::thread::sleep(Duration::from_millis(25));
    gate.open();
    assert_eq!(running.wait().unwrap().answer, Some(0));
    assert!(matches!(waiting.wait(), Err(Unserved::Expired(timings)) if timings.admitted_at.is_none()));
}

#[test]
fn draining_ends_what_is_at_hand_and_takes_nothing_more() {
    let (engine, handle, gate) = start(SchedulerConfig { max_running: 2, ..config() });
    gate.shut();
    let tickets: Vec<_> = (0..10).map(|n| handle.submit(request(Do::Answer(n), 2)).unwrap()).collect();
    gate.wait_for_a_step();
    handle.start_drain(Duration::from_secs(60));
    assert_eq!(handle.submit(request(Do::Answer(1), 1)).err(), Some(Refusal::ShuttingDown));
    gate.open();
    assert_eq!(engine.drain(Duration::from_secs(60)), Ok(()));
    for (n, ticket) in (0..).zip(tickets) {
        assert_eq!(ticket.wait().unwrap().answer, Some(n));
    }
    assert_eq!(handle.submit(request(Do::Answer(1), 1)).err(), Some(Refusal::ShuttingDown));
}

#[test]
fn draining_without_patience_drops_what_is_left() {
    let (engine, handle, gate) = start(config());
    gate.shut();
    let ticket = handle.submit(request(Do::Answer(0), 2)).unwrap();
    gate.wait_for_a_step();
    handle.start_drain(Duration::ZERO);
    gate.open();
    assert_eq!(engine.drain(Duration::ZERO), Ok(()));
    assert_eq!(ticket.wait(), Err(Unserved::Drained), "its second step is not taken");
    assert_eq!(handle.stats().cache.referenced, 0);
}

#[test]
fn the_thread_ends_when_the_last_handle_is_gone_and_the_last_request_has_ended() {
    let (engine, handle, gate) = start(config());
    gate.shut();
    let tickets: Vec<_> = (0..10).map(|n| handle.submit(request(Do::Answer(n), 2)).unwrap()).collect();
    drop(handle);
    gate.open();
    assert_eq!(engine.join(), Ok(()));
    for (n, ticket) in (0..).zip(tickets) {
        assert_eq!(ticket.wait().unwrap().answer, Some(n));
    }
}

#[test]
fn the_heart_beats_while_idle() {
    let (_engine, handle, _) = start(config());
    for _ in 0..5 {
        let before = handle.heartbeat();
        eventually("the next beat", || handle.heartbeat() > before);
        assert!(handle.now().since(handle.heartbeat()) < Micros(1_000_000));
    }
    assert_eq!(handle.stats().scheduler.steps, 0);
}

#[test]
fn a_dead_engine_leaves_nobody_waiting() {
    let (engine, handle, gate) = start(config());
    gate.shut();
    let good = handle.submit(request(Do::Answer(0), 2)).unwrap();
    gate.wait_for_a_step();
    let deadline = Micros(handle.now().0 + 1000);
    let bug = Request { deadline: Some(deadline), ..request(Do::PanicInDrop, 2) };
    let bug = handle.submit(bug).unwrap();
    eventually("it is late, so the scheduler drops it", || handle.now() > deadline);
    gate.open();
    assert_eq!(bug.wait(), Err(Unserved::Stopped));
    assert_eq!(good.wait(), Err(Unserved::Stopped));
    let stopped = handle.heartbeat();
    eventually("the channel closes", || {
        handle.submit(request(Do::Answer(1), 1)).err() == Some(Refusal::ShuttingDown)
    });
    assert_eq!(handle.heartbeat(), stopped);
    assert_eq!(engine.drain(Duration::ZERO), Err(EngineDied));
}

#[test]
fn a_payload_that_cannot_be_cloned_fails_alone() {
    let (engine, handle, _) = start(config());
    let bad = handle.submit(request(Do::PanicInClone, 2)).unwrap();
    assert_eq!(bad.wait(), Err(Unserved::Failed(Failure::Panicked("cloned".into()))));
    assert_eq!(handle.submit(request(Do::Answer(3), 2)).unwrap().wait().unwrap().answer, Some(3));
    drop(handle);
    engine.join().unwrap();
}

#[test]
fn a_long_step_that_goes_on_is_alive_and_one_that_hangs_is_not() {
    let (engine, handle, gate) = start(config());
    gate.shut();
    let ticket = handle.submit(request(Do::Answer(1), 1)).unwrap();
    gate.wait_for_a_step();
    // The model does nothing, so the heartbeat stands still, however long the test waits.
    let silent = handle.heartbeat();
    let later = Micros(handle.now().0 + 200_000);
    eventually("time passes", || handle.now() > later);
    assert_eq!(handle.heartbeat(), silent, "a step that hangs does not beat");
    // The model works, so the heartbeat advances, though the step is not over.
    for _ in 0..3 {
        let before = handle.heartbeat();
        gate.let_it_work();
        eventually("a part of the step is done", || handle.heartbeat() > before);
    }
    assert_eq!(gate.came.load(Ordering::SeqCst), 1);
    gate.open();
    assert_eq!(ticket.wait().unwrap().answer, Some(1));
    drop(handle);
    engine.join().unwrap();
}
