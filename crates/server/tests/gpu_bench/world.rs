//! A model of random weights, a random catalog, and an engine over both.

use std::sync::Arc;

use beamline_catalog::{Catalog, CatalogLimits, FilterSpec, ItemRecord, SidPart, SymbolTable};
use beamline_compute::cpu::pages::PAGE_SIZE;
use beamline_compute::cuda::device::Device;
use beamline_compute::cuda::pages::DevicePages;
use beamline_kv_cache::{CacheConfig, HostMemory, MokaTier, Namespace, ReuseClass, SessionKey};
use beamline_model::checkpoint::config::Config;
use beamline_model::cuda::decoder::DeviceDecoder;
use beamline_model::decode::{Normalization, SearchRequest, Step};
use beamline_model::executor::Executor;
use beamline_model::task::{Found, Job};
use beamline_scheduler::{Engine, Priority, Request, RequestId, SchedulerConfig};

use crate::stepped::{Stepped, Steps};
use crate::{Args, shapes};

/// Positions that the rotary table covers.
const POSITIONS: usize = 16_384;
/// Memory left to activations, logits and tries.
const RESERVED: usize = 12 << 30;

/// Everything that is measured.
pub(crate) struct World {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) engine: Engine<Job, beamline_model::task::Answer>,
    /// How long steps take.
    pub(crate) timed: Steps,
    steps: Arc<[Step]>,
    first_token: u32,
    codes: u32,
}

struct Codes {
    first_token: u32,
    codes: u32,
    levels: usize,
}

impl SymbolTable for Codes {
    fn depth(&self) -> Option<usize> {
        Some(self.levels)
    }

    fn symbol(&self, level: usize, part: &SidPart) -> Option<u32> {
        match part {
            SidPart::Code(code) => Some(self.first_token + level as u32 * self.codes + code),
            SidPart::Token(_) => None,
        }
    }
}

/// Numbers that look random: SplitMix64.
pub(crate) fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

/// A catalog of random semantic IDs.
pub(crate) fn catalog(items: usize, levels: usize, codes: u32, first_token: u32) -> Catalog {
    let mut random = random(7);
    let record = |index: usize| ItemRecord {
        item_id: format!("{index:x}"),
        sid: (0..levels).map(|_| SidPart::Code(random(u64::from(codes)) as u32)).collect(),
        tags: Vec::new(),
        title: None,
    };
    let symbols = Codes { first_token, codes, levels };
    Catalog::from_records((0..items).map(record), &symbols, &CatalogLimits::default()).unwrap()
}

impl World {
    /// As many pages as fit, and no host tier.
    pub(crate) fn new(device: &Arc<dyn Device>, args: &Args, config: &Config) -> Self {
        Self::with_host(device, args, config, None, None)
    }

    /// With a number of pages, or as many as fit, and perhaps a host tier of a number of bytes.
    pub(crate) fn with_host(
        device: &Arc<dyn Device>,
        args: &Args,
        config: &Config,
        pages: Option<usize>,
        host: Option<usize>,
    ) -> Self {
        let (first_token, codes) = (shapes::first_token(config), shapes::codes(config));
        let catalog = Arc::new(catalog(args.items, shapes::LEVELS, codes, first_token));
        let model = Arc::new(DeviceDecoder::random(device, config, POSITIONS).unwrap());
        let page = DevicePages::bytes_per_page(config.layers, config.kv_heads, [model.padded_dim(); 2]);
        let pages = pages.unwrap_or_else(|| match args.shape.as_str() {
            "tiny" => 256,
            _ => device.free_bytes().saturating_sub(RESERVED) / page,
        });
        let host = host.map(|bytes| HostMemory {
            tier: Box::new(MokaTier::new(bytes, None)),
            page_bytes: page,
            window: pages / 2,
        });
        let mut executor = Executor::on_device(model, pages).unwrap();
        executor.prepare(&catalog).unwrap();
        let scheduler = SchedulerConfig {
            max_context: POSITIONS - 64,
            max_beam_width: 8192,
            max_running_cost: 1 << 22,
            max_step_tokens: 16_384,
            max_chunk: 16_384,
            max_branch_rows: 1 << 16,
            ..SchedulerConfig::default()
        };
        let cache = CacheConfig {
            pages: pages as u32,
            page_size: PAGE_SIZE as u32,
            words_per_position: 1,
            sessions: 4096,
            hash_key: [3; 32],
        };
        let timed = Steps::default();
        let stepped =
            Stepped { inner: Box::new(executor), device: Arc::clone(device), steps: Arc::clone(&timed) };
        let engine = Engine::start_with(stepped, scheduler, cache, host).unwrap();
        let steps = vec![Step::Level; shapes::LEVELS].into();
        Self { catalog, engine, timed, steps, first_token, codes }
    }

    /// The history of a user: as many tokens as asked for, items of semantic IDs.
    pub(crate) fn history(&self, user: u64, tokens: usize) -> Vec<u32> {
        let mut random = random(user.wrapping_mul(0x9e37_79b9) + 1);
        let levels = shapes::LEVELS as u32;
        (0..tokens as u32)
            .map(|at| self.first_token + at % levels * self.codes + random(u64::from(self.codes)) as u32)
            .collect()
    }

    /// A request for the best of `beams` beams after a context. Nobody else shares the pages of `tenant`.
    pub(crate) fn request(&self, tokens: Vec<u32>, beams: usize, tenant: u64) -> Request<Job> {
        let tokens: Arc<[u32]> = tokens.into();
        let search = SearchRequest {
            catalog: Arc::clone(&self.catalog),
            filter: self.catalog.filter(&FilterSpec::default()),
            start: self.catalog.trie().root(),
            steps: Arc::clone(&self.steps),
            normalization: Normalization::FullVocab,
            normalize_over: None,
            widths: None,
        };
        let namespace = Namespace::new(b"gpu_bench", &tenant.to_le_bytes());
        Request {
            id: RequestId(0),
            namespace,
            session: Some(SessionKey::new(&namespace, "u")),
            words: Arc::clone(&tokens),
            context_len: tokens.len(),
            reuse: ReuseClass::CrossRequest,
            shape: beamline_scheduler::ContextShape::Causal,
            beam_width: beams,
            beam_widths: None,
            min_beam_width: beams,
            priority: Priority::Interactive,
            keeps_branches: true,
            generated_steps: self.steps.len(),
            deadline: None,
            payload: Arc::new(Job::tokens(tokens, Some(search))),
        }
    }

    /// Hands requests in together and waits for the last. Returns the milliseconds, and the cached
    /// tokens of the first.
    pub(crate) fn answer(&self, requests: Vec<Request<Job>>) -> (f64, usize) {
        let handle = self.engine.handle();
        let start = std::time::Instant::now();
        let tickets: Vec<_> = requests.into_iter().map(|request| handle.submit(request).unwrap()).collect();
        let mut cached = None;
        for ticket in tickets {
            let done = ticket.wait().unwrap();
            match &done.answer {
                Some(beamline_model::task::Answer::Found(Found { hypotheses, .. })) => {
                    assert!(!hypotheses.is_empty(), "a search finds something");
                }
                other => panic!("{other:?}"),
            }
            cached.get_or_insert(done.usage.cached_tokens);
        }
        (start.elapsed().as_secs_f64() * 1e3, cached.unwrap_or(0))
    }
}
