//! The thread's loop: take commands, drop requests whose ticket is gone, plan, step, commit.
//!
//! Requests whose pages are being read from disk wait in the lobby. When there are no other
//! requests, the thread sleeps and is woken by the completed read.

use std::{
    any::Any,
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    time::Duration,
};

use beamline_kv_cache::Fetch;
use beamline_model::step::{Plan, Progress, Pulse, Slot, StepModel};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    handle::{Command, Completed, Reply, Unserved},
    shared::{EngineStats, Shared},
};
use crate::{
    event::{Ended, Ending, Event, Failure},
    lobby::{Lobby, Ready},
    request::RequestId,
    scheduler::Scheduler,
    time::Micros,
};

/// How long an idle thread sleeps before it shows that it is alive.
const IDLE_BEAT: Duration = Duration::from_millis(50);
/// How long the thread sleeps while it is ending and a request still waits for the disk: there are
/// no commands to wait for.
const LEAVING_BEAT: Duration = Duration::from_millis(1);

/// The client of a request that has not ended.
struct Waiting<A> {
    reply: Reply<A>,
    /// A place in the queue, held until admission.
    place: Option<OwnedSemaphorePermit>,
    /// Pages that were read for the request, held until admission.
    fetch: Option<Fetch>,
}

pub(super) struct Loop<M: StepModel> {
    model: M,
    scheduler: Scheduler<M::Payload>,
    commands: mpsc::Receiver<Command<M::Payload, M::Answer>>,
    shared: Arc<Shared>,
    /// Requests whose pages are being read from disk.
    lobby: Lobby<M::Payload>,
    /// Clients by request; one per request that has not ended.
    waiting: HashMap<RequestId, Waiting<M::Answer>>,
    /// Slots at whose opening the model panicked. A step with one of them fails, and that is how
    /// the request ends.
    broken: Vec<(Slot, String)>,

    // Kept between passes to reuse their memory.
    plan: Plan,
    outcomes: Vec<(Slot, Progress<M::Answer>)>,
    events: Vec<Event<M::Payload, M::Answer>>,
    unwanted: Vec<RequestId>,
}

impl<M: StepModel> Loop<M>
where
    M::Payload: Clone,
{
    pub(super) fn new(
        mut model: M,
        scheduler: Scheduler<M::Payload>,
        commands: mpsc::Receiver<Command<M::Payload, M::Answer>>,
        shared: Arc<Shared>,
    ) -> Self {
        let beating = Arc::clone(&shared);
        model.set_pulse(Pulse::new(move || beating.beat()));
        let config = scheduler.limits().config;
        let requests = config.max_queued + config.max_running;
        Self {
            model,
            scheduler,
            commands,
            shared,
            lobby: Lobby::default(),
            waiting: HashMap::with_capacity(requests),
            broken: Vec::new(),
            plan: Plan::default(),
            outcomes: Vec::with_capacity(config.max_running),
            events: Vec::with_capacity(2 * requests),
            unwanted: Vec::with_capacity(requests),
        }
    }

    /// Runs until no client is left, or the engine is drained.
    pub(super) fn run(mut self) {
        let mut connected = true;
        loop {
            self.shared.beat();
            let idle = self.scheduler.is_idle();
            connected &= self.take_commands(idle && connected);
            let leaving = !connected || self.shared.drained_by().is_some();
            if leaving && self.scheduler.is_idle() {
                if self.lobby.is_empty() {
                    return;
                }
                std::thread::sleep(LEAVING_BEAT);
            }
            self.drop_unwanted();
            self.empty_lobby();
            if idle {
                self.scheduler.idle();
            }
            let now = self.shared.now();
            self.scheduler.plan(now, &mut self.plan, &mut self.events);
            self.carry_out();
            if !self.plan.is_empty() {
                self.step();
            }
        }
    }

    /// Takes all pending commands, and when idle waits a while for the first. Returns whether more
    /// may come.
    ///
    /// This ends, because there are never more commands than places in the queue.
    fn take_commands(&mut self, idle: bool) -> bool {
        if idle && self.shared.drained_by().is_none() {
            let next = self.lobby.next_end().map(|end| Duration::from_micros(end.since(self.shared.now()).0));
            match self.commands.recv_timeout(next.unwrap_or(IDLE_BEAT).min(IDLE_BEAT)) {
                Ok(command) => self.take(command),
                Err(mpsc::RecvTimeoutError::Timeout) => return true,
                Err(mpsc::RecvTimeoutError::Disconnected) => return false,
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.take(command),
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn take(&mut self, command: Command<M::Payload, M::Answer>) {
        let Command::Submit { request, submitted_at, reply, place } = command else { return };
        let before = self.waiting.insert(request.id, Waiting { reply, place: Some(place), fetch: None });
        assert!(before.is_none(), "the engine gives every request an id of its own");
        if let Some(ready) = self.lobby.enter(self.shared.now(), submitted_at, *request, &mut self.scheduler)
        {
            self.submit(ready);
        }
    }

    /// Submits a request that no longer waits for the disk.
    fn submit(&mut self, Ready { request, submitted_at, fetch }: Ready<M::Payload>) {
        let id = request.id;
        // Time in the channel and in the lobby counts as time in the queue. A request that was
        // submitted before the drain began is still served.
        match self.scheduler.submit(submitted_at, request) {
            Ok(()) => {
                if let Some(waiting) = self.waiting.get_mut(&id) {
                    waiting.fetch = fetch;
                }
            }
            Err(refusal) => self.reply(id, Err(refusal.into())),
        }
    }

    /// Processes completed reads, and submits the requests that have waited enough.
    fn empty_lobby(&mut self) {
        self.shared.clear_woken();
        self.scheduler.settle();
        while let Some(ready) = self.lobby.leave(self.shared.now()) {
            self.submit(ready);
        }
    }

    /// Cancels requests whose ticket was dropped, and all requests when the time to drain is over.
    fn drop_unwanted(&mut self) {
        let now = self.shared.now();
        let overdue = self.shared.drained_by().is_some_and(|by| by <= now);
        let unwanted = self.waiting.iter().filter(|(_, waiting)| overdue || waiting.reply.is_closed());
        self.unwanted.extend(unwanted.map(|(id, _)| *id));
        let mut unwanted = std::mem::take(&mut self.unwanted);
        for id in unwanted.drain(..) {
            if self.lobby.cancel(id) {
                self.reply(id, Err(Unserved::Drained));
            } else {
                self.scheduler.cancel(now, id, &mut self.events);
            }
        }
        self.unwanted = unwanted;
        self.carry_out();
    }

    fn step(&mut self) {
        let before = self.shared.now();
        let result = match self.broken_in_plan() {
            Some(why) => Err(Failure::Panicked(why)),
            None => {
                match catch_unwind(AssertUnwindSafe(|| self.model.step(&self.plan, &mut self.outcomes))) {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(error)) => Err(Failure::Step(error.0)),
                    Err(panic) => Err(Failure::Panicked(message(&*panic))),
                }
            }
        };
        // Host pages that were dropped meanwhile have no other holder.
        self.plan.transfers.clear();
        let now = self.shared.now();
        let took = Micros(now.since(before).0.max(1));
        match result {
            Ok(()) => self.scheduler.commit(now, took, &mut self.outcomes, &mut self.events),
            Err(failure) => {
                let requests = self.plan.chunks.len() + self.plan.branches.len();
                tracing::error!(%failure, requests, "a step failed");
                self.outcomes.clear();
                self.scheduler.fail_step(now, failure, &mut self.events);
            }
        }
        self.carry_out();
    }

    fn broken_in_plan(&self) -> Option<String> {
        let in_plan = |slot: Slot| {
            self.plan.chunks.iter().any(|chunk| chunk.slot == slot)
                || self.plan.branches.iter().any(|branch| branch.slot == slot)
        };
        self.broken.iter().find(|(slot, _)| in_plan(*slot)).map(|(_, why)| why.clone())
    }

    /// Carries out the scheduler's events.
    fn carry_out(&mut self) {
        // Before the answers, so that a client that gets one finds it counted.
        let cache = self.scheduler.cache().stats();
        self.shared.publish(EngineStats { scheduler: self.scheduler.stats(), cache });
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            match event {
                Event::Opened { id, slot, payload } => {
                    if let Some(waiting) = self.waiting.get_mut(&id) {
                        waiting.place = None;
                        waiting.fetch = None;
                    }
                    let model = &mut self.model;
                    let open = || model.open(slot, M::Payload::clone(&payload));
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(open)) {
                        self.broken.push((slot, message(&*panic)));
                    }
                }
                Event::Closed(slot) => {
                    self.broken.retain(|(broken, _)| *broken != slot);
                    let model = &mut self.model;
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| model.close(slot))) {
                        tracing::error!(slot = slot.0, panic = message(&*panic), "closing a slot panicked");
                    }
                }
                Event::Ended(ended) => self.answer(ended),
            }
        }
        self.events = events;
    }

    fn answer(&mut self, ended: Ended<M::Answer>) {
        let Ended { id, ending, usage, timings } = ended;
        let answer = match ending {
            Ending::Finished(answer) => Ok(Completed { answer: Some(answer), usage, timings }),
            Ending::Warmed => Ok(Completed { answer: None, usage, timings }),
            Ending::Failed(failure) => Err(Unserved::Failed(failure)),
            Ending::Expired => Err(Unserved::Expired(timings)),
            Ending::Dropped(refusal) => Err(Unserved::Refused(refusal)),
            Ending::Cancelled => Err(Unserved::Drained),
        };
        self.reply(id, answer);
    }

    fn reply(&mut self, id: RequestId, answer: Result<Completed<M::Answer>, Unserved>) {
        if let Some(Waiting { reply, .. }) = self.waiting.remove(&id) {
            // A client that no longer waits needs no answer.
            let _ = reply.send(answer);
        }
    }
}

/// The message of a panic.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
