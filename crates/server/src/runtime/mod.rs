//! From files on disk to a running engine.
//!
//! ```text
//! config.json, weights ── Loaded ── LoadPlan ─┐
//! convention.json ─────── Convention, or the item table ── Catalog ── ModelExecutor ── Engine ── probe
//! ```
//!
//! [`budget`](crate::budget) holds what all versions of a process may take together. It is asked before
//! weights and pages are allocated, and when a catalog has been built. All versions compute on one
//! thread pool, so that several of them take no more processors than one.
//!
//! Every phase is logged with its time. A model is served only after all of them have passed. The last
//! is a probe: a request for items that goes the way of every other.

pub mod disk;
mod files;
mod gpu;
mod host;
pub mod layout;
mod load_plan;
mod physical;
mod probe;
mod refused;
mod sizing;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use beamline_catalog::{Catalog, CatalogError, CatalogLimits, SymbolTable};
use beamline_compute::cpu::Cpu;
use beamline_compute::cuda::device::Device;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::checkpoint::note::Note;
use beamline_model::convention::Convention;
use beamline_model::convention::format::Format;
use beamline_model::error::ModelError;
use beamline_model::executor::ModelExecutor;
use beamline_model::loaded::{self, Facts, LoadOptions, Loaded, TokenFacts};
use beamline_model::reference::verify::Verified;
use beamline_model::task::{Answer, Job};
use beamline_scheduler::{Engine, EngineDied, EngineStats, StartError};
use tracing::{info, warn};

use crate::budget::{Budget, OverBudget, Reservation};
use crate::error::Error;
use crate::registry::state::StateError;
use crate::service::{Family, HstuFamily, Lease, Served, Service, TokenModel, model_identity};
use crate::settings::{ByteSize, DeviceChoice, EngineSettings, Settings, SettingsError};
use disk::{DiskError, KvDisk, Pool};
use load_plan::LoadPlan;

pub use files::Files;
pub use layout::LayoutProblem;
pub use physical::default_budget;
pub use probe::probe;

/// Why there is nothing to serve.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The settings cannot be used: no checkpoint is named, for example.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The checkpoint cannot be served.
    #[error("checkpoint {}: {source}", path.display())]
    Model {
        /// Directory of the checkpoint.
        path: PathBuf,
        /// What is wrong.
        source: ModelError,
    },
    /// The directory does not hold what a checkpoint must.
    #[error("checkpoint {}: {}", path.display(), join(problems))]
    Layout {
        /// Directory of the checkpoint.
        path: PathBuf,
        /// All that is wrong with it.
        problems: Vec<LayoutProblem>,
    },
    /// The checkpoint has no convention.
    #[error(
        "checkpoint {}: convention.json is missing, which says how histories and items are written as tokens: write one \
         (weights/README.md shows how), or name a preset such as --convention minionerec", .0.display()
    )]
    NoConvention(PathBuf),
    /// The catalog cannot be served.
    #[error("catalog {}: {source}", path.display())]
    Catalog {
        /// Path of the catalog.
        path: PathBuf,
        /// What is wrong.
        source: Box<CatalogError>,
    },
    /// The checkpoint has no catalog.
    #[error(
        "checkpoint {}: there is no catalog: put catalog.jsonl or catalog.parquet into it, or name one with --catalog FILE{}",
        path.display(), match likely { Some(name) => format!("; is {name} the catalog?"), None => String::new() }
    )]
    NoCatalog {
        /// Directory of the checkpoint.
        path: PathBuf,
        /// A file in it that may be one.
        likely: Option<String>,
    },
    /// A largest request does not fit.
    #[error("{0}")]
    Limits(String),
    /// The device cannot be used.
    #[error("device {device}: {why}")]
    Device {
        /// Device that the settings name.
        device: DeviceChoice,
        /// Why it cannot be used.
        why: String,
    },
    /// The directory for contexts cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The memory budget does not hold it.
    #[error(
        "{0}; unload a version first, or lower --kv-memory, --kv-host-memory or --kv-disk-size, or raise --model-memory"
    )]
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
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The files of a version of the state are not where they were.
    #[error("{0}")]
    NotThere(String),
    /// The checkpoint of a version of the state was replaced by another.
    #[error(
        "the checkpoint was changed on disk: its sha256 was {recorded}, and is {found}. Put the old files back and restart, \
         or unload this version and load the new one"
    )]
    Changed {
        /// Digest of the version.
        recorded: String,
        /// What is there.
        found: String,
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
    /// The service that answers requests.
    pub service: Service,
    engine: Engine<Job, Answer>,
    /// Pages on disk.
    pool: Option<Pool>,
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
    /// The graphics processor, if that is where models run.
    pub gpu: Option<Arc<dyn Device>>,
    /// Memory that all versions share.
    pub budget: Arc<Budget>,
    /// Where contexts outlive the process, if anywhere.
    pub disk: Option<Arc<KvDisk>>,
}

impl Machine {
    /// Starts the threads, and opens the device.
    ///
    /// # Errors
    ///
    /// When the system refuses them.
    pub fn new(engine: &EngineSettings, memory: Option<ByteSize>) -> Result<Self, LoadError> {
        let cpu = Cpu::new(engine.threads).map_err(|error| LoadError::Limits(error.to_string()))?;
        let gpu = match engine.device {
            DeviceChoice::Cpu => None,
            device @ DeviceChoice::Cuda(number) => Some(gpu::open(device, number)?),
        };
        Ok(Self { cpu: Arc::new(cpu), gpu, budget: Budget::new(memory.map(|size| size.0)), disk: None })
    }
}

/// A checkpoint that was opened and found undamaged, and nothing more: its digest tells whether to go on.
#[derive(Debug)]
pub struct Opened {
    files: Files,
    checkpoint: Box<dyn Loaded>,
}

/// How much of the machine a command may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Many requests at a time.
    Server,
    /// One request: no more KV memory than that needs, unless the settings say so.
    OneRequest,
}

impl Runtime {
    /// Loads what the settings name, on threads of its own. It takes as long as reading the weights, so
    /// do not call it on a thread that serves.
    ///
    /// # Errors
    ///
    /// When something is missing, damaged, or does not fit.
    pub fn load(settings: &Settings, scale: Scale) -> Result<Self, LoadError> {
        let machine = Machine::new(&settings.engine, None)?;
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

    /// Waits until nobody holds the model, ends the engine, and frees weights and pages, those on disk
    /// too. Requests that began on it finish on it. Blocks. Returns what the engine has counted.
    ///
    /// # Errors
    ///
    /// When the engine died before.
    pub fn retire(self) -> Result<EngineStats, EngineDied> {
        let Self { service, engine, pool, memory, leases } = self;
        let handle = engine.handle();
        drop(service);
        // Nothing is ever sent: this is over when the last lease is gone.
        let _ = leases.recv();
        // Every waiting request holds a lease, so anything still queued was cancelled by its client.
        let ended = engine.drain(Duration::ZERO);
        pool.into_iter().for_each(Pool::delete);
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
        files.check_layout()?;
        let checkpoint = match &files.random_weights {
            Some(config) => {
                Checkpoint::without_weights(config).map(|made_up| Box::new(made_up) as Box<dyn Loaded>)
            }
            None => loaded::open(&files.checkpoint),
        };
        let checkpoint = checkpoint.map_err(|source| files.blame(source))?;
        if files.random_weights.is_some() {
            warn!("random weights: timings are valid, answers are meaningless");
        }
        checkpoint.notes().iter().for_each(|note| warn!("{note}"));
        info!(
            architecture = checkpoint.facts().architecture(),
            parameters = checkpoint.tensors().parameters(),
            sha256 = checkpoint.digest(),
            ms = ms(start),
            "opened the checkpoint"
        );
        Ok(Self { files, checkpoint })
    }

    /// The same checkpoint with another catalog.
    #[must_use]
    pub fn with_catalog(mut self, file: PathBuf) -> Self {
        self.files.catalog = Some(file);
        self
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
        let (digest, parameters) = (checkpoint.digest().to_owned(), checkpoint.tensors().parameters());
        // What is not there is not needed: memory is asked for before anything large is read.
        let plan = LoadPlan::new(&files, &*checkpoint, settings, scale, machine)?;
        let memory = plan.memory;
        let what = "the model's weights, KV pages and host memory";
        let reservation = machine.budget.reserve(what, plan.here)?;

        // Tensors pass through memory on their way: at most three at a time are packed into one. The
        // room of the pages holds them, because pages are taken after the weights. What exceeds that
        // room is reserved.
        let passing = checkpoint.tensors().largest_bytes().saturating_mul(3).saturating_sub(memory.kv);
        let passing = machine.budget.reserve("the tensors that are being loaded", passing)?;
        let built = build(&files, &*checkpoint, &plan, settings, machine)?;
        drop(passing);
        let Built { family, catalog, catalog_memory, executor } = built;

        let start = Instant::now();
        let weight_format = settings.engine.weight_format;
        let identity = model_identity(&digest, weight_format, settings.engine.kv_format);
        let (host, pool) = host::memory(settings, &plan, machine, &identity);
        let secret = machine.disk.as_ref().map(|disk| disk.secret());
        let engine = Engine::start_with(
            executor,
            sizing::scheduler_config(settings, &plan),
            sizing::cache_config(settings, plan.pages, plan.words_per_position, secret)?,
            host,
        )?;
        info!(
            threads = machine.cpu.threads(),
            pages = plan.pages,
            kv_memory = %ByteSize(memory.kv),
            kv_format = %settings.engine.kv_format,
            kv_host_memory = %ByteSize(memory.kv_host),
            context_limit = plan.largest.context,
            ms = ms(start),
            "started the engine"
        );

        let (lease, leases) = Lease::new();
        let served = Served {
            name: name.to_owned(),
            digest,
            device: settings.engine.device,
            weight_format,
            kv_format: settings.engine.kv_format,
            family,
            parameters,
            memory,
            catalog,
            catalog_memory,
            context_limit: plan.largest.context,
            engine: engine.handle(),
            draining: Arc::new(AtomicBool::new(false)),
            lease,
        };
        let service = Service::new(Arc::new(served), settings.limits, settings.engine.history_cut);
        info!(name, ms = ms(whole), "loaded the model");
        Ok(Runtime { service, engine, pool, memory: reservation, leases })
    }
}

/// What was made of a checkpoint and a catalog.
struct Built {
    family: Family,
    catalog: Arc<Catalog>,
    catalog_memory: Arc<Reservation>,
    executor: Box<dyn ModelExecutor>,
}

/// Binds a model to its catalog, and loads its weights where it runs.
fn build(
    files: &Files,
    checkpoint: &dyn Loaded,
    plan: &LoadPlan,
    settings: &Settings,
    machine: &Machine,
) -> Result<Built, LoadError> {
    let blame = |source| files.blame(source);
    let (family, catalog, catalog_memory) = match checkpoint.facts() {
        Facts::Tokens(facts) => {
            let (convention, start_token) = bind(files, checkpoint, plan, &facts)?;
            let (catalog, catalog_memory) = read_catalog(files, &convention, machine)?;
            sid_form(convention.format(), &catalog).iter().for_each(|note| warn!("{note}"));
            let layout = sizing::layout(&convention, &catalog, plan.largest.context).map_err(blame)??;
            let model = TokenModel { facts, convention: Arc::new(convention), start_token, layout };
            (Family::Tokens(model), catalog, catalog_memory)
        }
        Facts::Events(config) => {
            let family = HstuFamily::new(config);
            let (catalog, catalog_memory) = read_catalog(files, &family.symbols, machine)?;
            (Family::Hstu(family), catalog, catalog_memory)
        }
    };
    let start = Instant::now();
    let (positions, pages) = (plan.largest.context + plan.largest.steps, plan.pages as usize);
    let EngineSettings { weight_format, kv_format, .. } = settings.engine;
    let executor = match &machine.gpu {
        Some(gpu) => {
            let executor = checkpoint.load_on_device(gpu, &machine.cpu, positions, pages, &catalog);
            let executor = executor.map_err(blame)?;
            info!(device = %settings.engine.device, name = gpu.name(), ms = ms(start), "copied weights and trie to the device");
            executor
        }
        None => {
            let options = LoadOptions { positions, weight_format, kv_format, pages };
            let (executor, bytes) = checkpoint.load(&machine.cpu, options).map_err(blame)?;
            info!(weights = %ByteSize(bytes), format = %weight_format, ms = ms(start), "loaded the weights");
            executor
        }
    };
    Ok(Built { family, catalog, catalog_memory, executor })
}

/// Binds the convention of a model that reads tokens to its tokenizer. Returns the start token of an
/// encoder-decoder, too.
fn bind(
    files: &Files,
    checkpoint: &dyn Loaded,
    plan: &LoadPlan,
    facts: &TokenFacts,
) -> Result<(Convention, Option<u32>), LoadError> {
    let blame = |source| files.blame(source);
    let format = match &plan.format {
        Some(format) => format.clone(),
        None => files.format()?,
    };
    let start = Instant::now();
    let convention = match checkpoint.has_weights() {
        true => checkpoint.tokenizer().and_then(|json| Convention::bind_to(format, json, facts.vocab_size)),
        // Weights that are made up have no tokenizer of their own.
        false => Convention::bind(format, &files.checkpoint, facts.vocab_size),
    };
    let convention = convention.map_err(blame)?;
    let start_token = convention.start_token(facts).map_err(blame)?;
    convention.notes().iter().for_each(|note| warn!("{note}"));
    info!(
        levels = convention.format().levels,
        generated_steps = plan.largest.steps,
        ms = ms(start),
        "bound the convention"
    );
    Ok((convention, start_token))
}

fn read_catalog(
    files: &Files,
    symbols: &dyn SymbolTable,
    machine: &Machine,
) -> Result<(Arc<Catalog>, Arc<Reservation>), LoadError> {
    let start = Instant::now();
    let path = files.catalog()?;
    let catalog = Catalog::read_path(&path, symbols, &CatalogLimits::default())
        .map_err(|source| LoadError::Catalog { path, source: Box::new(source) })?;
    let catalog = Arc::new(catalog);
    let memory = Arc::new(reserve_catalog(&machine.budget, &catalog)?);
    info!(
        items = catalog.num_items(),
        semantic_ids = catalog.num_leaves(),
        version = catalog.version(),
        memory = %ByteSize(memory.bytes()),
        ms = ms(start),
        "read the catalog"
    );
    Ok((catalog, memory))
}

/// What the convention says of the catalog's form, and the catalog does not.
pub fn sid_form(format: &Format, catalog: &Catalog) -> Option<Note> {
    let item = catalog.items().next()?;
    format.compare_catalog(&catalog.sid_parts(catalog.leaf_of(item)))
}

/// Counts the memory of a catalog: items, names and trie. Tag filters that it will remember come on top.
///
/// # Errors
///
/// When the budget has less left.
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
    let (depth, expected) = (catalog.depth(), served.family.levels());
    if depth != expected {
        return Err(LoadError::Depth { depth, expected });
    }
    let mut family = served.family.clone();
    if let Family::Tokens(model) = &mut family {
        model.layout = sizing::layout(&model.convention, &catalog, served.context_limit)
            .map_err(|error| LoadError::Limits(error.to_string()))??;
    }
    Ok(service.over(Arc::new(Served { catalog, catalog_memory, family, ..Served::clone(served) })))
}

fn join(problems: &[LayoutProblem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn ms(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Compares the model of a directory with its second implementation, on this number of threads.
///
/// # Errors
///
/// When a file cannot be used.
pub fn verify(checkpoint: &Path, threads: usize) -> Result<Verified, ModelError> {
    let cpu = Cpu::new(threads).map(Arc::new)?;
    loaded::open(checkpoint)?.verify(&cpu)
}
