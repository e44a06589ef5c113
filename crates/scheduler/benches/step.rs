//! What the scheduler adds to a step: submit, plan and commit, with a model that does nothing.
#![allow(missing_docs, reason = "criterion's macro makes public items")]
#![allow(clippy::expect_used, reason = "a measurement for people to run")]

use std::sync::Arc;

use beamline_kv_cache::{CacheConfig, Namespace, ReuseClass, SessionKey};
use beamline_model::step::{ContextShape, Plan, Progress, Slot};
use beamline_scheduler::{Event, Micros, Priority, Request, RequestId, Scheduler, SchedulerConfig};
use criterion::{Criterion, criterion_group, criterion_main};

const CONTEXT: usize = 640;
const BEAMS: usize = 32;
const STEPS: usize = 3;

fn scheduler() -> Scheduler<()> {
    let cache =
        CacheConfig { pages: 8192, page_size: 32, words_per_position: 1, sessions: 1000, hash_key: [1; 32] };
    Scheduler::new(SchedulerConfig::default(), cache).expect("the sizes are sound")
}

fn request(id: u64, user: u32) -> Request<()> {
    let namespace = Namespace::new(b"model", b"tenant");
    let words: Arc<[u32]> =
        (0..CONTEXT as u32).map(|word| word.wrapping_mul(0x9e37_79b9) ^ (user << 16)).collect();
    Request {
        id: RequestId(id),
        session: Some(SessionKey::new(&namespace, &format!("user {user}"))),
        namespace,
        words,
        context_len: CONTEXT,
        reuse: ReuseClass::CrossRequest,
        shape: ContextShape::Causal,
        beam_width: BEAMS,
        beam_widths: None,
        min_beam_width: BEAMS,
        priority: Priority::Interactive,
        keeps_branches: true,
        generated_steps: STEPS,
        deadline: None,
        payload: Arc::new(()),
    }
}

/// Plans, and commits what a model would have done. Returns how many requests ended.
fn step(
    scheduler: &mut Scheduler<()>,
    plan: &mut Plan,
    outcomes: &mut Vec<(Slot, Progress<()>)>,
    events: &mut Vec<Event<(), ()>>,
    taken: &mut [usize],
) -> usize {
    scheduler.plan(Micros(0), plan, events);
    for chunk in &plan.chunks {
        taken[chunk.slot.0 as usize] = 1;
        let progress =
            if chunk.expand.is_some() { Progress::Expanded { rows: BEAMS } } else { Progress::Prefilled };
        outcomes.push((chunk.slot, progress));
    }
    for branch in &plan.branches {
        let taken = &mut taken[branch.slot.0 as usize];
        *taken += 1;
        outcomes.push((
            branch.slot,
            if *taken == STEPS { Progress::Finished(()) } else { Progress::Expanded { rows: BEAMS } },
        ));
    }
    scheduler.commit(Micros(0), Micros(1000), outcomes, events);
    let ended = events.iter().filter(|event| matches!(event, Event::Ended(_))).count();
    events.clear();
    ended
}

fn requests(c: &mut Criterion) {
    for (visit, users) in [("warm", 16), ("cold", u32::MAX)] {
        for at_once in [1, 16] {
            let (mut scheduler, mut taken) = (scheduler(), vec![0; 128]);
            let (mut plan, mut outcomes, mut events) = (Plan::default(), Vec::new(), Vec::new());
            let mut id = 0u64;
            c.bench_function(&format!("{at_once} {visit} requests from submission to end"), |b| {
                b.iter(|| {
                    for _ in 0..at_once {
                        id += 1;
                        scheduler
                            .submit(Micros(0), request(id, id as u32 % users))
                            .expect("the queue has room");
                    }
                    let mut ended = 0;
                    while ended < at_once {
                        ended += step(&mut scheduler, &mut plan, &mut outcomes, &mut events, &mut taken);
                    }
                });
            });
        }
    }
}

criterion_group!(benches, requests);
criterion_main!(benches);
