//! A small world from a seed: sizes, rates, users and their requests.

use std::sync::{Arc, atomic::AtomicU64};

use beamline_kv_cache::{CacheConfig, HostMemory, HostPage, LruTier, Namespace, ReuseClass, SessionKey};
use beamline_model::step::ContextShape;
use beamline_scheduler::{Micros, Priority, Request, RequestId, SchedulerConfig};

use crate::{
    rng::{Rng, mix},
    story::{Fault, Story},
};

/// The parameters of a scenario. Rates are per thousand.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) requests: usize,
    pub(crate) config: SchedulerConfig,
    pub(crate) pages: u32,
    pub(crate) page_size: u32,
    pub(crate) words_per_position: u32,
    pub(crate) users: usize,
    pub(crate) tenants: usize,
    pub(crate) reuse: Vec<ReuseClass>,
    /// Shapes of the tenants' models.
    pub(crate) shapes: Vec<ContextShape>,
    pub(crate) max_steps: usize,
    /// Most requests that arrive together between two steps.
    pub(crate) burst: usize,
    /// Rate at which no request arrives between two steps.
    pub(crate) quiet: u32,
    pub(crate) warm: u32,
    pub(crate) cancel: u32,
    pub(crate) deadline: u32,
    /// Most microseconds that a request with a deadline leaves.
    pub(crate) patience: usize,
    pub(crate) may_degrade: u32,
    /// Rate of requests at which the model always fails.
    pub(crate) faulty: u32,
    /// Rate of steps that fail for no reason.
    pub(crate) failing: u32,
    /// Rate of histories that were edited since the last visit.
    pub(crate) edited: u32,
    pub(crate) host: Option<HostScenario>,
}

/// The host memory for evicted pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostScenario {
    /// Pages that fit, approximately.
    pub(crate) pages: usize,
    /// Lifetime of a page, in microseconds.
    pub(crate) time_to_live: Option<u64>,
    /// Number of next evictions that copies go ahead.
    pub(crate) window: usize,
}

impl Scenario {
    pub(crate) fn from_seed(seed: u64, requests: usize) -> Self {
        let rng = &mut Rng::new(seed);
        let max_context = rng.within(4, 48);
        let max_beam_width = rng.within(1, 12);
        let page_size = *rng.pick(&[1, 2, 4, 8]);
        let max_steps = rng.within(1, 5);
        let largest =
            max_context.div_ceil(page_size) + (max_beam_width * (max_steps - 1)).div_ceil(page_size);
        // From a pool that barely holds one request to one that is never full.
        let roominess = *rng.pick(&[0, 2, 10, 50]);
        let pages = largest + rng.within(0, largest * roominess);
        let troubled = rng.permille(500);
        let classes =
            [ReuseClass::CrossRequest, ReuseClass::CrossRequestMinusLast, ReuseClass::WithinRequest];
        let host = rng.permille(500).then(|| HostScenario {
            pages: rng.within(0, 4 * pages),
            time_to_live: rng.permille(500).then(|| rng.within(1, 200_000) as u64),
            window: rng.within(0, pages),
        });
        let shapes = match rng.within(0, 3) {
            0 => vec![ContextShape::Whole],
            1 => vec![ContextShape::Whole, ContextShape::Causal],
            _ => vec![ContextShape::Causal],
        };
        let reuse = match rng.within(0, 3) {
            0 | 1 => vec![ReuseClass::CrossRequest],
            2 => classes.to_vec(),
            _ => [&classes[..], &[ReuseClass::Exact]].concat(),
        };
        Self {
            seed,
            requests,
            config: SchedulerConfig {
                max_queued: rng.within(1, 64),
                max_running: rng.within(1, 16),
                max_context,
                max_beam_width,
                max_generated_steps: max_steps,
                max_running_cost: rng.within(max_context + max_beam_width * max_steps, 1000) as u64,
                max_step_tokens: rng.within(1, 96),
                max_chunk: rng.within(1, 48),
                max_branch_rows: rng.within(max_beam_width, 64),
                max_step_transfers: rng.within(0, 8),
                pairs_per_row: *rng.pick(&[u64::MAX, 100, 8, 1]),
                max_step_time: Micros(rng.within(50, 2000) as u64),
                min_step_rows: rng.within(1, 16),
                objective: Micros(rng.within(100, 20_000) as u64),
                stretch: rng.within(1, 10) as u64,
                late_share: rng.within(1, 99) as u64,
                batch_share: rng.within(1, 99) as u64,
            },
            pages: pages as u32,
            page_size: page_size as u32,
            words_per_position: rng.within(1, 3) as u32,
            users: rng.within(1, 40),
            tenants: rng.within(1, 3),
            reuse,
            shapes,
            max_steps,
            burst: rng.within(1, 8),
            quiet: *rng.pick(&[0, 500, 800, 900]),
            warm: *rng.pick(&[0, 100, 500]),
            cancel: *rng.pick(&[0, 20, 200]),
            deadline: *rng.pick(&[0, 300, 900]),
            patience: *rng.pick(&[500, 2_000, 20_000]),
            may_degrade: *rng.pick(&[0, 500, 900]),
            faulty: if troubled { *rng.pick(&[0, 10, 100]) } else { 0 },
            failing: if troubled { *rng.pick(&[0, 20, 200]) } else { 0 },
            edited: *rng.pick(&[0, 100]),
            host,
        }
    }

    pub(crate) fn cache(&self) -> CacheConfig {
        CacheConfig {
            pages: self.pages,
            page_size: self.page_size,
            words_per_position: self.words_per_position,
            sessions: 1 + (self.users / 2) as u32,
            hash_key: [7; 32],
        }
    }

    /// The host memory, with the time `now`.
    pub(crate) fn host_memory(&self, now: &Arc<AtomicU64>) -> Option<HostMemory> {
        let host = self.host?;
        let page_bytes = self.page_size as usize * 8;
        let words = self.config.max_context / 2 * self.words_per_position as usize;
        let capacity = host.pages * HostPage::bytes_of(page_bytes, words);
        let tier = Box::new(LruTier::new(capacity, host.time_to_live, Arc::clone(now)));
        Some(HostMemory { tier, page_bytes, window: host.window })
    }

    /// Whether requests end only by themselves. Then the load bounds how long they may take.
    pub(crate) fn is_trouble_free(&self) -> bool {
        self.faulty == 0 && self.failing == 0
    }
}

/// Users and their histories.
pub(crate) struct Traffic {
    rng: Rng,
    /// One word list per user. All tenants use the same lists, and must not notice it.
    histories: Vec<Vec<u32>>,
    namespaces: Vec<Namespace>,
    next_id: u64,
}

impl Traffic {
    pub(crate) fn new(scenario: &Scenario) -> Self {
        let namespaces =
            (0..scenario.tenants).map(|tenant| Namespace::new(b"model", &[tenant as u8])).collect();
        Self {
            rng: Rng::new(mix(scenario.seed, 0x07aff1c)),
            histories: vec![Vec::new(); scenario.users],
            namespaces,
            next_id: 0,
        }
    }

    /// The next request of a random user.
    pub(crate) fn request(&mut self, scenario: &Scenario, now: Micros) -> Request<Story> {
        let user = self.rng.within(0, scenario.users - 1);
        let words: Arc<[u32]> = self.grow(scenario, user).into();
        let rng = &mut self.rng;
        let context_len = words.len() / scenario.words_per_position as usize;
        let tenant = rng.within(0, scenario.tenants - 1);
        let namespace = self.namespaces[tenant];
        let warm = rng.permille(scenario.warm);
        let generated_steps = if warm { 0 } else { rng.within(1, scenario.max_steps) };
        let beam_width = rng.within(1, scenario.config.max_beam_width);
        let min_beam_width =
            if rng.permille(scenario.may_degrade) { rng.within(1, beam_width) } else { beam_width };
        let beam_widths = rng.permille(300).then(|| {
            let mut widths: Vec<usize> = (0..generated_steps).map(|_| rng.within(1, beam_width)).collect();
            if let Some(widest) = widths.iter_mut().max() {
                *widest = beam_width;
            }
            Arc::from(widths)
        });
        // The reuse class is a property of the model: here, of the tenant.
        let reuse = scenario.reuse[tenant % scenario.reuse.len()];
        let shape = scenario.shapes[tenant % scenario.shapes.len()];
        let fault = match (rng.permille(scenario.faulty), rng.within(0, 2), rng.within(0, generated_steps)) {
            (false, ..) => Fault::None,
            (true, 0, at) => Fault::Fails(at),
            (true, 1, at) => Fault::Poison(at),
            (true, _, at) => Fault::Babbles(at),
        };
        let finishes_at = if rng.permille(100) { rng.within(1, scenario.max_steps) } else { usize::MAX };
        let deadline =
            rng.permille(scenario.deadline).then(|| Micros(now.0 + rng.within(1, scenario.patience) as u64));
        let priority =
            *rng.pick(&[Priority::Interactive, Priority::Interactive, Priority::Batch, Priority::Shadow]);
        let session = rng.permille(800).then(|| SessionKey::new(&namespace, &user.to_string()));
        let id = self.next_id;
        self.next_id += 1;
        Request {
            id: RequestId(id),
            namespace,
            session,
            words: words.clone(),
            context_len,
            reuse,
            shape,
            beam_width,
            beam_widths: beam_widths.clone(),
            min_beam_width,
            priority,
            keeps_branches: true,
            generated_steps,
            deadline,
            payload: Arc::new(Story {
                id,
                tenant: tenant as u64,
                words,
                context_len,
                // No part of such a context serves another, even if the request says so.
                reuse: match (shape, reuse) {
                    (_, ReuseClass::Exact) | (ContextShape::Causal, _) => reuse,
                    (ContextShape::Whole, _) => ReuseClass::WithinRequest,
                },
                shape,
                beam_width,
                beam_widths,
                min_beam_width,
                generated_steps,
                finishes_at,
                fault,
            }),
        }
    }

    /// The history of a user at the next visit: mostly a few actions longer.
    fn grow(&mut self, scenario: &Scenario, user: usize) -> Vec<u32> {
        let per_position = scenario.words_per_position as usize;
        let most = scenario.config.max_context * per_position;
        let rng = &mut self.rng;
        let history = &mut self.histories[user];
        if rng.permille(scenario.edited) && !history.is_empty() {
            let at = rng.within(0, history.len() - 1);
            history[at] ^= 1;
        }
        for _ in 0..rng.within(0, 6) * per_position {
            // Few words, and the same beginning for all: contexts of different users share
            // prefixes.
            let position = history.len() / per_position;
            history.push(if position < 6 { position as u32 } else { rng.within(0, 3) as u32 });
        }
        if history.is_empty() {
            history.extend(std::iter::repeat_n(0, per_position));
        }
        if history.len() > most {
            // Cut at the old end, in coarse steps.
            let keep = (most / 2).next_multiple_of(per_position).min(most);
            history.drain(..history.len() - keep);
        }
        history.clone()
    }
}
