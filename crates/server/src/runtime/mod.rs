//! From files on disk to a running engine.
//!
//! ```text
//! config.json, weights ── Checkpoint ──┐
//! convention.json ────── Format ── Convention ── Catalog
//!                                      └── Qwen ── Executor ── Engine ── probe
//! ```
//!
//! Every phase is logged with its time. Nothing is served before all of them have passed, the last of which is a probe: a
//! request for items that goes the way of every other.

mod files;
mod sizing;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use beamline_catalog::{Catalog, CatalogError, CatalogLimits, Leaf};
use beamline_model::checkpoint::Checkpoint;
use beamline_model::convention::Convention;
use beamline_model::cpu::Cpu;
use beamline_model::cpu::pages::PageStore;
use beamline_model::error::ModelError;
use beamline_model::executor::{Executor, Found, Job};
use beamline_model::families::qwen::Qwen;
use beamline_scheduler::{Engine, EngineDied, StartError};
use tracing::info;

use crate::api::RecommendRequest;
use crate::error::Error;
use crate::service::{Served, Service};
use crate::settings::{ByteSize, Settings, SettingsError};
use sizing::LargestRequest;

pub use files::Files;

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
    /// The engine did not start.
    #[error("engine: {0}")]
    Engine(#[from] StartError),
    /// The model loads and does not answer.
    #[error("the model was loaded but could not answer a probe: {0}")]
    Probe(Error),
}

/// A running engine and the service over it.
pub struct Runtime {
    /// Answers requests.
    pub service: Service,
    engine: Engine<Job, Found>,
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
    /// Loads everything and starts the engine. Takes as long as reading the weights takes, so do not call it on a thread
    /// that serves.
    ///
    /// # Errors
    ///
    /// When something is missing, damaged, or does not fit.
    pub fn load(settings: &Settings, scale: Scale) -> Result<Self, LoadError> {
        let whole = Instant::now();
        let files = Files::of(&settings.model)?;
        let blame = |source| files.blame(source);

        let start = Instant::now();
        let checkpoint = Checkpoint::open(&files.checkpoint).map_err(blame)?;
        let config = checkpoint.config().clone();
        info!(
            architecture = config.architecture.name(),
            parameters = checkpoint.tensors().parameters(),
            sha256 = checkpoint.digest(),
            ms = ms(start),
            "opened the checkpoint"
        );

        let start = Instant::now();
        let format = files.format()?;
        let convention = Convention::bind(format, &files.checkpoint, config.vocab_size).map_err(blame)?;
        info!(
            levels = convention.format().levels,
            generated_steps = convention.steps().len(),
            composes = convention.composes(),
            ms = ms(start),
            "bound the convention"
        );

        let start = Instant::now();
        let path = files.catalog()?;
        let catalog = Catalog::read_path(&path, &convention, &CatalogLimits::default())
            .map_err(|source| LoadError::Catalog { path, source: Box::new(source) })?;
        let catalog = Arc::new(catalog);
        info!(
            items = catalog.num_items(),
            leaves = catalog.num_leaves(),
            version = catalog.version(),
            ms = ms(start),
            "read the catalog"
        );

        let steps = convention.steps().len();
        let context_limit = sizing::context_limit(config.max_positions, steps, settings.engine.max_context)?;
        let layout = sizing::layout(&convention, &catalog, context_limit).map_err(blame)??;

        let start = Instant::now();
        let model = Qwen::load(&checkpoint, context_limit + steps).map_err(blame)?;
        info!(weights = %ByteSize(model.weight_bytes()), ms = ms(start), "loaded the weights");

        let start = Instant::now();
        let largest = LargestRequest { context: context_limit, beams: settings.limits.max_beam_width, steps };
        let page_bytes = PageStore::bytes_per_page(config.layers, config.kv_heads, config.head_dim);
        let pages = sizing::pages(settings.engine.kv_memory, page_bytes, largest, scale)?;
        let cpu = Arc::new(Cpu::new(settings.engine.threads).map_err(blame)?);
        let threads = cpu.threads();
        let executor = Executor::new(Arc::new(model), cpu, pages as usize).map_err(blame)?;
        let engine = Engine::start(
            executor,
            sizing::scheduler_config(settings, largest),
            sizing::cache_config(settings, pages)?,
        )?;
        info!(
            threads,
            pages,
            kv_memory = %ByteSize(page_bytes.saturating_mul(pages as usize)),
            context_limit,
            ms = ms(start),
            "started the engine"
        );

        let served = Served {
            name: settings.model.name.clone(),
            digest: checkpoint.digest().to_owned(),
            config,
            parameters: checkpoint.tensors().parameters(),
            convention,
            catalog,
            context_limit,
            layout,
            engine: engine.handle(),
            draining: AtomicBool::new(false),
        };
        let service = Service::new(Arc::new(served), settings.limits, settings.engine.history_cut);
        info!(ms = ms(whole), "loaded the model");
        Ok(Self { service, engine })
    }

    /// Asks for items as a client would, so that what cannot work is found before clients do, and memory is warm.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub async fn probe(&self) -> Result<(), LoadError> {
        let start = Instant::now();
        let served = self.service.served();
        let catalog = &served.catalog;
        let first = catalog.items_of(Leaf(0)).iter().map(|item| catalog.item_id(*item).to_owned());
        let history =
            first.take(1).map(|item_id| crate::api::HistoryAction { item_id, action: None, timestamp: None });
        let request = RecommendRequest {
            history: Some(history.collect()),
            num_items: Some(1),
            // Pages of a tenant of its own, which no client can hit.
            tenant: Some("beamline probe".into()),
            ..RecommendRequest::default()
        };
        let answer = self
            .service
            .clone()
            .patient()
            .recommend(request, "probe".into())
            .await
            .map_err(LoadError::Probe)?;
        if answer.items.is_empty() {
            return Err(LoadError::Probe(Error::Internal));
        }
        info!(ms = ms(start), "answered the probe");
        Ok(())
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
}

fn ms(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}
