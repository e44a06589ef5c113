//! A model that is served, and everything that requests need from it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use beamline_catalog::Catalog;
use beamline_kv_cache::{Namespace, SessionKey};
use beamline_model::families::hstu::inputs::Prepared;
use beamline_model::loaded::KvFormat;
use beamline_model::loaded::WeightFormat;
use beamline_model::task::{Answer, Job, Task};
use beamline_scheduler::{EngineHandle, Micros, Request, RequestId};

use super::family::{Family, HstuFamily};
use crate::api::{CatalogInfo, MemoryInfo, ModelInfo, ModelName, ModelState, Priority};
use crate::budget::Reservation;
use crate::settings::DeviceChoice;

/// The tenant, user and urgency of a request.
pub(super) struct Whose<'a> {
    pub(super) user: Option<&'a str>,
    pub(super) tenant: Option<&'a str>,
    pub(super) priority: Option<Priority>,
}

/// Number of digits of the digest that make a version.
const VERSION_DIGITS: usize = 12;

/// Held by everything that may still use a model. Its engine is ended after the last lease is gone.
#[derive(Clone, Debug)]
pub struct Lease {
    _held: mpsc::Sender<()>,
}

impl Lease {
    /// A new lease, and a channel that is closed when the lease and all its clones are gone.
    pub fn new() -> (Self, mpsc::Receiver<()>) {
        let (held, gone) = mpsc::channel();
        (Self { _held: held }, gone)
    }
}

/// Memory that a version takes, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Bytes of the weights.
    pub weights: usize,
    /// Bytes of the KV pages.
    pub kv: usize,
    /// Most bytes of host memory for evicted KV pages.
    pub kv_host: usize,
    /// Most bytes of tables and buffers for the KV pages on disk.
    pub kv_disk: usize,
}

impl Memory {
    /// The sum of all parts.
    pub fn total(&self) -> usize {
        self.weights.saturating_add(self.kv).saturating_add(self.kv_host).saturating_add(self.kv_disk)
    }
}

/// A loaded model with its convention, its catalog and the engine that runs it. It never changes. A
/// new catalog makes a new value over the same engine, and a request stays with the value that it
/// began with.
#[derive(Clone, Debug)]
pub struct Served {
    /// Name of the model, as requests write it.
    pub name: String,
    /// The sha256 of the checkpoint, in hexadecimal.
    pub digest: String,
    /// The device that runs the model.
    pub device: DeviceChoice,
    /// Number format of the weights.
    pub weight_format: WeightFormat,
    /// Number format of keys and values.
    pub kv_format: KvFormat,
    /// The model's family, with its input and output.
    pub family: Family,
    /// Number of values in the checkpoint.
    pub parameters: usize,
    /// Memory that the version takes.
    pub memory: Memory,
    /// The items that may be recommended.
    pub catalog: Arc<Catalog>,
    /// The catalog's memory, counted for as long as a request or the list of kept catalogs holds
    /// this.
    pub catalog_memory: Arc<Reservation>,
    /// Most tokens of a context.
    pub context_limit: usize,
    /// The engine that computes requests.
    pub engine: EngineHandle<Job, Answer>,
    /// Whether the model refuses new requests.
    pub draining: Arc<AtomicBool>,
    /// Keeps the engine running.
    pub lease: Lease,
}

/// Everything besides the context that keys and values depend on: the weights and the number
/// formats.
pub fn model_identity(digest: &str, weight_format: WeightFormat, kv_format: KvFormat) -> String {
    format!("{digest} {weight_format} {kv_format}")
}

impl Served {
    /// The first digits of the digest.
    pub fn version(&self) -> &str {
        self.digest.get(..VERSION_DIGITS).unwrap_or(&self.digest)
    }

    /// The description of the model in answers.
    pub fn model_name(&self) -> ModelName {
        ModelName {
            name: self.name.clone(),
            version: self.version().to_owned(),
            sha256: self.digest.clone(),
            weight_format: self.weight_format.name().to_owned(),
            kv_format: self.kv_format.name().to_owned(),
        }
    }

    /// The namespace within which a tenant's contexts may share pages.
    pub fn namespace(&self, tenant: &str) -> Namespace {
        let model = model_identity(&self.digest, self.weight_format, self.kv_format);
        Namespace::new(model.as_bytes(), tenant.as_bytes())
    }

    /// A request to the engine for an HSTU model, with the rows that run together and the number of
    /// expansions.
    pub(super) fn hstu_request(
        &self,
        family: &HstuFamily,
        events: Arc<Prepared>,
        task: Task,
        Whose { user, tenant, priority }: Whose<'_>,
        (width, steps): (usize, usize),
        deadline: Option<Micros>,
    ) -> Request<Job> {
        let namespace = self.namespace(tenant.unwrap_or_default());
        Request {
            id: RequestId(0),
            namespace,
            session: user.map(|user| SessionKey::new(&namespace, user)),
            words: events.words().into(),
            context_len: events.context_len(),
            reuse: family.config.reuse(),
            shape: family.config.context_shape(),
            beam_width: width,
            beam_widths: None,
            min_beam_width: width,
            priority: priority.unwrap_or_default().into(),
            keeps_branches: false,
            generated_steps: steps,
            deadline,
            payload: Arc::new(Job::events(events, task)),
        }
    }

    /// Refuses new requests from now on. The engine waits at most `patience` for the accepted ones.
    pub fn start_drain(&self, patience: Duration) {
        self.draining.store(true, Ordering::Relaxed);
        self.engine.start_drain(patience);
    }

    /// Whether [`Served::start_drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Time since the engine's last sign of life.
    pub fn heartbeat_age(&self) -> Duration {
        Duration::from_micros(self.engine.now().since(self.engine.heartbeat()).0)
    }

    /// The entry of this version in `/v1/models`, without the labels, which are not known here.
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
