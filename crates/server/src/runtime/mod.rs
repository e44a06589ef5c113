//! From files on disk to a running engine.
//!
//! ```text
//! config.json, weights ── Checkpoint ──┐
//! convention.json ────── Format ── Convention ── Catalog
//!                                      └── Qwen ── Executor ── Engine ── probe
//! ```
//!
//! [`budget`] holds what all versions of a process may take together; it is asked before weights and pages are allocated,
//! and when a catalog has been built.
//! All versions compute on one thread pool, so that several of them do not take more processors than one.
//!
//! Every phase is logged with its time. Nothing is served before all of them have passed, the last of which is a probe: a
//! request for items that goes the way of every other.

pub mod budget;
mod files;
mod physical;
mod probe;
mod sizing;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use beamline_catalog::{Catalog, CatalogError, CatalogLimits};
use beamline_model::checkpoint::Checkpoint;
use beamline_model::convention::Convention;
use beamline_model::cpu::Cpu;
use beamline_model::cpu::pages::PageStore;
use beamline_model::error::ModelError;
use beamline_model::executor::{Executor, Found, Job};
use beamline_model::families::qwen::Qwen;
use beamline_scheduler::{Engine, EngineDied, EngineStats, StartError};
use tracing::info;

use crate::error::Error;
use crate::service::{Lease, Memory, Served, Service};
use crate::settings::{ByteSize, Settings, SettingsError};
use budget::{Budget, OverBudget, Reservation};
use sizing::LargestRequest;

pub use files::Files;
pub use physical::default_budget;
pub use probe::probe;

/// Why there is nothing to serve.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No checkpoint was named.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The checkpoint cannot be served.
    #[error("checkpoint {}: {source}", path.display())]
    Model {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        source: ModelError,
    },
    /// The checkpoint has no convention.
    #[error(
        "checkpoint {}: no convention.json, so it is not known how histories and items are written as tokens; write one, or \
         name a preset with --convention", .0.display()
    )]
    NoConvention(PathBuf),
    /// The catalog cannot be served.
    #[error("catalog {}: {source}", path.display())]
    Catalog {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<CatalogError>,
    },
    /// The checkpoint has no catalog.
    #[error("checkpoint {}: neither catalog.jsonl nor catalog.parquet; name a catalog with --catalog", .0.display())]
    NoCatalog(PathBuf),
    /// A largest request does not fit.
    #[error("{0}")]
    Limits(String),
    /// The memory budget does not hold it.
    #[error("{0}; unload a version first, or lower --kv-memory or --kv-host-memory, or raise --model-memory")]
    Memory(#[from] OverBudget),
    /// The engine did not start.
    #[error("engine: {0}")]
    Engine(#[from] StartError),
    /// The model loads and does not answer.
    #[error("the model was loaded but could not answer a probe: {0}")]
    Probe(Error),
    /// The semantic IDs of the catalog have another length than the model's.
    #[error("the catalog's semantic IDs have {depth} levels, the model's have {expected}")]
    Depth {
        /// Of the catalog.
        depth: usize,
        /// Of the convention.
        expected: usize,
    },
    /// A library panicked over a file.
    #[error("a file of the checkpoint is malformed in a way that no check foresaw")]
    Panicked,
    /// The model answers a probe with what it must not.
    #[error("the model was loaded but answered a probe wrongly: {0}")]
    WrongAnswer(String),
}

/// A running engine and the service over it.
pub struct Runtime {
    /// Answers requests.
    pub service: Service,
    engine: Engine<Job, Found>,
    /// Given back when the engine has ended.
    memory: Reservation,
    /// Closed when nobody holds the model any more.
    leases: mpsc::Receiver<()>,
}

/// What versions share.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Threads of the forward pass.
    pub cpu: Arc<Cpu>,
    /// Memory.
    pub budget: Arc<Budget>,
}

impl Machine {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// When the system refuses them.
    pub fn new(threads: usize, memory: Option<ByteSize>) -> Result<Self, LoadError> {
        let cpu = Cpu::new(threads).map_err(|error| LoadError::Limits(error.to_string()))?;
        Ok(Self { cpu: Arc::new(cpu), budget: Budget::new(memory.map(|size| size.0)) })
    }
}

/// A checkpoint that was opened and found undamaged, and nothing more: its digest tells whether to go on.
#[derive(Debug)]
pub struct Opened {
    files: Files,
    checkpoint: Checkpoint,
}

/// How much of the machine a command may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Many requests.
    Server,
    /// One request: no more KV memory than that needs, unless the settings say so.
    OneRequest,
}

impl Runtime {
    /// Loads what the settings name, on threads of its own. Takes as long as reading the weights takes, so do not call
    /// it on a thread that serves.
    ///
    /// # Errors
    ///
    /// When something is missing, damaged, or does not fit.
    pub fn load(settings: &Settings, scale: Scale) -> Result<Self, LoadError> {
        let machine = Machine::new(settings.engine.threads, None)?;
        Opened::open(Files::of(&settings.model)?)?.load(&settings.model.name, settings, scale, &machine)
    }

    /// Takes no more requests, waits at most `patience` for those at hand, and ends the engine. Blocks.
    ///
    /// # Errors
    ///
    /// When the engine died before.
    pub fn drain(self, patience: Duration) -> Result<(), EngineDied> {
        self.service.served().start_drain(patience);
        self.engine.drain(patience)
    }

    /// Waits until nobody holds the model, ends the engine, and frees weights and pages. Requests that began on it
    /// finish on it. Blocks. Returns what the engine has counted.
    ///
    /// # Errors
    ///
    /// When the engine died before.
    pub fn retire(self) -> Result<EngineStats, EngineDied> {
        let Self { service, engine, memory, leases } = self;
        let handle = engine.handle();
        drop(service);
        // Nothing is ever sent: this is over when the last lease is gone.
        let _ = leases.recv();
        // Whoever waited had a lease, so what is left was given up by its client.
        let ended = engine.drain(Duration::ZERO);
        drop(memory);
        ended.map(|()| handle.stats())
    }
}

impl Opened {
    /// Opens a checkpoint: reads its config and the header of its weights, and computes its digest.
    ///
    /// # Errors
    ///
    /// When it is missing or damaged.
    pub fn open(files: Files) -> Result<Self, LoadError> {
        let start = Instant::now();
        let checkpoint = Checkpoint::open(&files.checkpoint).map_err(|source| files.blame(source))?;
        info!(
            architecture = checkpoint.config().architecture.name(),
            parameters = checkpoint.tensors().parameters(),
            sha256 = checkpoint.digest(),
            ms = ms(start),
            "opened the checkpoint"
        );
        Ok(Self { files, checkpoint })
    }

    /// sha256 of the checkpoint.
    pub fn digest(&self) -> &str {
        self.checkpoint.digest()
    }

    /// Loads everything and starts the engine, under the name by which requests will ask for it.
    ///
    /// # Errors
    ///
    /// When something is missing, damaged, or does not fit.
    pub fn load(
        self,
        name: &str,
        settings: &Settings,
        scale: Scale,
        machine: &Machine,
    ) -> Result<Runtime, LoadError> {
        let whole = Instant::now();
        let Self { files, checkpoint } = self;
        let config = checkpoint.config().clone();
        let blame = |source| files.blame(source);

        // What is not there is not needed: memory is asked for before anything large is read.
        let format = files.format()?;
        let steps = format.steps();
        let context_limit = sizing::context_limit(config.max_positions, steps, settings.engine.max_context)?;
        let largest = LargestRequest { context: context_limit, beams: settings.limits.max_beam_width, steps };
        let page_bytes = PageStore::bytes_per_page(config.layers, config.kv_heads, config.head_dim);
        let pages = sizing::pages(settings.engine.kv_memory, page_bytes, largest, scale)?;
        let weight_format = settings.engine.weight_format;
        let memory = Memory {
            weights: sizing::weights(&checkpoint, context_limit.saturating_add(steps), weight_format),
            kv: page_bytes.saturating_mul(pages as usize),
            kv_host: sizing::host_bytes(settings, page_bytes, largest, scale)?,
        };
        let what = "the model's weights, KV pages and host memory";
        let reservation = machine.budget.reserve(what, memory.total())?;

        let start = Instant::now();
        let convention = Convention::bind(format, &files.checkpoint, config.vocab_size).map_err(blame)?;
        info!(
            levels = convention.format().levels,
            generated_steps = steps,
            composes = convention.composes(),
            ms = ms(start),
            "bound the convention"
        );

        let start = Instant::now();
        let path = files.catalog()?;
        let catalog = Catalog::read_path(&path, &convention, &CatalogLimits::default())
            .map_err(|source| LoadError::Catalog { path, source: Box::new(source) })?;
        let catalog = Arc::new(catalog);
        let catalog_memory = Arc::new(reserve_catalog(&machine.budget, &catalog)?);
        info!(
            items = catalog.num_items(),
            leaves = catalog.num_leaves(),
            version = catalog.version(),
            memory = %ByteSize(catalog_memory.bytes()),
            ms = ms(start),
            "read the catalog"
        );
        let layout = sizing::layout(&convention, &catalog, context_limit).map_err(blame)??;

        let start = Instant::now();
        let model = Qwen::load(&checkpoint, context_limit + steps, weight_format).map_err(blame)?;
        info!(weights = %ByteSize(model.weight_bytes()), format = %weight_format, ms = ms(start), "loaded the weights");

        let start = Instant::now();
        let executor =
            Executor::new(Arc::new(model), Arc::clone(&machine.cpu), pages as usize).map_err(blame)?;
        let host = sizing::host_memory(settings, memory.kv_host, page_bytes, largest);
        let engine = Engine::start_with(
            executor,
            sizing::scheduler_config(settings, largest, page_bytes),
            sizing::cache_config(settings, pages)?,
            host,
        )?;
        info!(
            threads = machine.cpu.threads(),
            pages,
            kv_memory = %ByteSize(memory.kv),
            kv_host_memory = %ByteSize(memory.kv_host),
            context_limit,
            ms = ms(start),
            "started the engine"
        );

        let (lease, leases) = Lease::new();
        let served = Served {
            name: name.to_owned(),
            digest: checkpoint.digest().to_owned(),
            weight_format,
            config,
            parameters: checkpoint.tensors().parameters(),
            memory,
            convention: Arc::new(convention),
            catalog,
            catalog_memory,
            context_limit,
            layout,
            engine: engine.handle(),
            draining: Arc::new(AtomicBool::new(false)),
            lease,
        };
        let service = Service::new(Arc::new(served), settings.limits, settings.engine.history_cut);
        info!(name, ms = ms(whole), "loaded the model");
        Ok(Runtime { service, engine, memory: reservation, leases })
    }
}

/// Counts the memory of a catalog: items, names and trie. Tag filters that it will remember come on top.
///
/// # Errors
///
/// When there is not so much left.
pub fn reserve_catalog(budget: &Arc<Budget>, catalog: &Catalog) -> Result<Reservation, OverBudget> {
    budget.reserve("the catalog's items, names and trie", catalog.memory_bytes())
}

/// A service over the same engine with another catalog, and the memory that was counted for it.
///
/// # Errors
///
/// When the catalog is not one of this model.
pub fn with_catalog(
    service: &Service,
    catalog: Arc<Catalog>,
    catalog_memory: Arc<Reservation>,
) -> Result<Service, LoadError> {
    let served = service.served();
    let (depth, expected) = (catalog.depth(), served.convention.format().levels);
    if depth != expected {
        return Err(LoadError::Depth { depth, expected });
    }
    let layout = sizing::layout(&served.convention, &catalog, served.context_limit)
        .map_err(|error| LoadError::Limits(error.to_string()))??;
    Ok(service.over(Arc::new(Served { catalog, catalog_memory, layout, ..Served::clone(served) })))
}

fn ms(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}
