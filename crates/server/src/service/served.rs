//! A model that is served: what requests need of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use beamline_catalog::Catalog;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_kv_cache::{Namespace, SessionKey};
use beamline_model::executor::any::{Answer, AnyJob};
use beamline_model::executor::hstu::HstuJob;
use beamline_scheduler::{EngineHandle, Micros, Request, RequestId};

use super::family::{Family, HstuFamily};
use crate::api::{CatalogInfo, MemoryInfo, ModelInfo, ModelName, ModelState, Priority};
use crate::runtime::budget::Reservation;
use crate::settings::DeviceChoice;

/// Who asks, and how urgent it is.
pub(super) struct Whose<'a> {
    pub(super) user: Option<&'a str>,
    pub(super) tenant: Option<&'a str>,
    pub(super) priority: Option<Priority>,
}

/// Digits of the digest that make a version.
const VERSION_DIGITS: usize = 12;

/// Held by whoever may still ask a model: its engine is ended after the last one is gone.
#[derive(Clone, Debug)]
pub struct Lease {
    _held: mpsc::Sender<()>,
}

impl Lease {
    /// A lease, and what is closed when it and all its clones are gone.
    pub fn new() -> (Self, mpsc::Receiver<()>) {
        let (held, gone) = mpsc::channel();
        (Self { _held: held }, gone)
    }
}

/// Bytes that a version takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Weights.
    pub weights: usize,
    /// KV pages.
    pub kv: usize,
    /// At most, host memory for KV pages that were evicted.
    pub kv_host: usize,
    /// At most, tables and buffers of the pages on disk.
    pub kv_disk: usize,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> usize {
        self.weights.saturating_add(self.kv).saturating_add(self.kv_host).saturating_add(self.kv_disk)
    }
}

/// A loaded model with its convention, its catalog and the engine that runs it. It never changes: another catalog makes
/// another one, over the same engine, and a request stays with the one that it began with.
#[derive(Clone, Debug)]
pub struct Served {
    /// Name by which requests ask for it.
    pub name: String,
    /// sha256 of the checkpoint.
    pub digest: String,
    /// Where it runs.
    pub device: DeviceChoice,
    /// How its weights are kept.
    pub weight_format: WeightFormat,
    /// How keys and values are kept.
    pub kv_format: KvFormat,
    /// What it reads and writes.
    pub family: Family,
    /// Values in the checkpoint.
    pub parameters: usize,
    /// What it takes.
    pub memory: Memory,
    /// What may be recommended.
    pub catalog: Arc<Catalog>,
    /// The catalog's memory: counted for as long as a request, or whoever keeps the catalog, holds this.
    pub catalog_memory: Arc<Reservation>,
    /// Most tokens of a context.
    pub context_limit: usize,
    /// Where requests go.
    pub engine: EngineHandle<AnyJob, Answer>,
    /// Whether it takes no more requests.
    pub draining: Arc<AtomicBool>,
    /// Keeps the engine.
    pub lease: Lease,
}

/// What keys and values of a model depend on: its weights, and how they are kept.
pub fn model_identity(digest: &str, weight_format: WeightFormat, kv_format: KvFormat) -> String {
    format!("{digest} {weight_format} {kv_format}")
}

impl Served {
    /// The beginning of the digest.
    pub fn version(&self) -> &str {
        self.digest.get(..VERSION_DIGITS).unwrap_or(&self.digest)
    }

    /// How answers name it.
    pub fn model_name(&self) -> ModelName {
        ModelName {
            name: self.name.clone(),
            version: self.version().to_owned(),
            sha256: self.digest.clone(),
            weight_format: self.weight_format.name().to_owned(),
            kv_format: self.kv_format.name().to_owned(),
        }
    }

    /// Whose pages a tenant's contexts may share.
    pub fn namespace(&self, tenant: &str) -> Namespace {
        let model = model_identity(&self.digest, self.weight_format, self.kv_format);
        Namespace::new(model.as_bytes(), tenant.as_bytes())
    }

    /// A request of an HSTU model for the engine: rows at a time, and expansions.
    pub(super) fn hstu_request(
        &self,
        family: &HstuFamily,
        job: HstuJob,
        Whose { user, tenant, priority }: Whose<'_>,
        (width, steps): (usize, usize),
        deadline: Option<Micros>,
    ) -> Request<AnyJob> {
        let namespace = self.namespace(tenant.unwrap_or_default());
        Request {
            id: RequestId(0),
            namespace,
            session: user.map(|user| SessionKey::new(&namespace, user)),
            words: job.request.words().into(),
            context_len: job.request.context_len(),
            reuse: family.config.reuse(),
            shape: family.config.context_shape(),
            beam_width: width,
            beam_widths: None,
            min_beam_width: width,
            priority: priority.unwrap_or_default().into(),
            keeps_branches: false,
            generated_steps: steps,
            deadline,
            payload: Arc::new(AnyJob::Hstu(job)),
        }
    }

    /// Takes no more requests, and waits at most `patience` for those at hand.
    pub fn start_drain(&self, patience: Duration) {
        self.draining.store(true, Ordering::Relaxed);
        self.engine.start_drain(patience);
    }

    /// Whether [`Served::start_drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Time since the engine's loop last came round.
    pub fn heartbeat_age(&self) -> Duration {
        Duration::from_micros(self.engine.now().since(self.engine.heartbeat()).0)
    }

    /// What `/v1/models` tells, but for the labels, which are not known here.
    pub fn info(&self, state: ModelState) -> ModelInfo {
        let ModelName { name, version, sha256, weight_format, kv_format } = self.model_name();
        ModelInfo {
            name,
            version,
            sha256,
            weight_format,
            kv_format,
            family: self.family.name().into(),
            architecture: self.family.architecture(),
            parameters: self.parameters as u64,
            context_limit: self.context_limit as u64,
            max_history_items: match &self.family {
                Family::Tokens(model) => model.layout.max_items(self.context_limit) as u64,
                Family::Hstu(hstu) => hstu.max_items(0) as u64,
            },
            levels: self.catalog.depth() as u64,
            generated_steps: self.family.steps().len() as u64,
            tasks: self.family.tasks().iter().map(|&task| task.to_owned()).collect(),
            catalog: CatalogInfo::of(&self.catalog, self.catalog_memory.bytes()),
            memory: MemoryInfo {
                weights_bytes: self.memory.weights as u64,
                kv_bytes: self.memory.kv as u64,
                kv_host_bytes: self.memory.kv_host as u64,
                kv_disk_bytes: self.memory.kv_disk as u64,
            },
            labels: Vec::new(),
            durable: false,
            state,
        }
    }
}
