//! The model registry: several versions of several models in one process, and how one version
//! replaces another.
//!
//! ```text
//! a version   a loaded checkpoint with its own engine, KV pages and catalog, known by digits of its sha256
//! a model     a name with versions
//! a label     a name within a model that points at a loaded version: `stable` by default
//! ```
//!
//! Place in the flow: between HTTP and [`crate::service`]. A request calls [`Registry::resolve`]
//! once and keeps the result.
//!
//! Loading: open, check, load the weights, start an engine, probe, and only then switch. A failure
//! before the switch changes nothing, and frees the memory again.
//!
//! Unloading: the version leaves the table, and requests that began on it finish on it. After the
//! last of them, its engine ends and its weights and pages are freed. Every version has its own
//! pages, so pages of an unloaded version cannot be hit.
//!
//! Invariants: one load at a time; labels point at loaded versions only; loaded versions fit the
//! memory budget, including versions that finish their last requests and catalogs that are kept or
//! still read; all versions compute on one thread pool.
//!
//! With a state directory ([`state`]) every change is on disk before it is made and answered, and a
//! start restores the state ([`restore`]). Without one, a restart begins with the checkpoint of the
//! command line.
//!
//! What this must not know: HTTP, keys.

mod catalogs;
pub mod name;
mod restore;
pub mod root;
pub mod state;
mod table;
mod totals;
mod turn;

use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use beamline_scheduler::{EngineDied, EngineStats};
use tracing::{info, warn};

use crate::api::{LoadStage, MemoryBudget, ModelInfo, ModelList, ModelState};
use crate::error::Error;
use crate::runtime::disk::KvDisk;
use crate::runtime::{self, LoadError, Machine, Opened, Runtime, Scale};
use crate::service::{Served, Service};
use crate::settings::{ByteSize, Settings};
use catalogs::Kept;
use name::{Reference, STABLE};
use restore::{Built, Missing};
use root::{ModelRoot, Wanted};
use state::{RecordedVersion, Records, Source, StateDirectory, not_kept};
use table::Table;
use totals::Totals;
use turn::Turns;

/// Name and version of a model.
type Id = (String, String);

/// All loaded versions, with the locks that changes of them need.
pub struct Registry {
    settings: Settings,
    machine: Machine,
    root: Option<ModelRoot>,
    table: RwLock<Arc<Table>>,
    /// The engines of the versions in the table.
    running: Mutex<HashMap<Id, Runtime>>,
    /// The load that is in progress, if any.
    loading: Turns,
    /// The catalogs of the versions in the table.
    catalogs: Mutex<HashMap<Id, Kept>>,
    /// A lock for every version whose catalog was changed, held during a change.
    changing_catalog: Mutex<HashMap<Id, Arc<Mutex<()>>>>,
    /// Counters of the engines that have ended.
    retired: Mutex<Totals>,
    /// The state directory, if there is one. Locked during any change.
    state: Mutex<Option<StateDirectory>>,
    /// Versions of the state that could not be restored.
    missing: RwLock<Vec<Missing>>,
}

impl Registry {
    /// Starts the threads, and loads the checkpoint that the settings name, if they name one.
    /// Blocks.
    ///
    /// # Errors
    ///
    /// When the checkpoint cannot be loaded.
    pub fn start(settings: Settings) -> Result<Self, LoadError> {
        Self::start_with(settings, || {})
    }

    /// Like [`Registry::start`]. Calls `opened` when the checkpoint was opened and found undamaged,
    /// before it is loaded.
    ///
    /// # Errors
    ///
    /// Like [`Registry::start`].
    pub fn start_with(settings: Settings, opened: impl FnOnce()) -> Result<Self, LoadError> {
        let admin = &settings.admin;
        let root = admin.model_root.as_deref().map(|path| {
            ModelRoot::new(path)
                .map_err(|error| LoadError::Limits(format!("model-root {}: {error}", path.display())))
        });
        let memory = admin.model_memory.or_else(|| runtime::default_budget().map(ByteSize));
        match memory {
            Some(limit) => info!(
                %limit,
                by_default = admin.model_memory.is_none(),
                "memory of all models: weights, KV pages and catalogs (--model-memory)"
            ),
            None => {
                warn!("the system does not say how much memory it has: models have no limit (--model-memory)")
            }
        }
        let mut machine = Machine::new(&settings.engine, memory)?;
        let disk = settings.kv_disk.as_ref().filter(|disk| !disk.count_only);
        machine.disk = disk.map(KvDisk::open).transpose().map_err(LoadError::Disk)?;
        let registry = Self {
            root: root.transpose()?,
            machine,
            table: RwLock::default(),
            running: Mutex::default(),
            loading: Turns::default(),
            catalogs: Mutex::default(),
            changing_catalog: Mutex::default(),
            retired: Mutex::default(),
            state: Mutex::new(settings.admin.state.as_deref().map(StateDirectory::open).transpose()?),
            missing: RwLock::default(),
            settings,
        };
        registry.bring_back(opened)?;
        if let Some(disk) = &registry.machine.disk {
            disk.sweep();
        }
        Ok(registry)
    }

    /// The version that a request asks for, with its current catalog.
    ///
    /// # Errors
    ///
    /// When there is no such version.
    pub fn resolve(&self, model: Option<&str>) -> Result<Service, Error> {
        let table = self.table();
        match model {
            None if table.is_empty() && self.missing().is_empty() => Err(Error::NoModel),
            model => {
                let reference = Reference::parse(model.unwrap_or(&self.settings.model.name));
                table.find(reference).cloned().map_err(|error| self.why_missing(reference).unwrap_or(error))
            }
        }
    }

    /// Loads a checkpoint from under the root, and points a label at it. Without `label`, the first
    /// version of a model becomes `stable`, and later ones get no label. Blocks for as long as
    /// loading takes.
    ///
    /// # Errors
    ///
    /// When the checkpoint cannot be served; then nothing has changed.
    pub fn load(&self, wanted: Wanted<'_>, label: Option<&str>) -> Result<ModelInfo, Error> {
        let root = self.root.as_ref().ok_or(Error::NoModelRoot)?;
        name::check("name", wanted.name)?;
        label.map_or(Ok(()), |label| name::check_label("label", label))?;
        let _turn = self.loading.take(wanted.name)?;
        let files = root.find(wanted)?;
        let refuse = |error: LoadError| {
            warn!(model = wanted.name, %error, "a checkpoint was refused");
            error.for_client(|text| root.redact(&files, text))
        };
        let opened = Opened::open(files.clone()).map_err(refuse)?;
        let table = self.table();
        let loaded = Reference { name: wanted.name, at: Some(opened.digest()) };
        if let Ok(service) = table.find(loaded) {
            return Err(Error::AlreadyLoaded(service.served().version().to_owned()));
        }
        // A label of a missing version stays with it. So the first version of a model becomes
        // `stable` only if that label is free.
        let taken = table.is_stable(wanted.name) || self.records().has_label(wanted.name, STABLE);
        let label = label.or_else(|| (!taken).then_some(STABLE));
        let record = self.record_of(wanted.name, opened.digest(), Source::of(wanted));
        let built = self.restored(opened, wanted.name, &record).map_err(refuse)?;
        self.admit(built, label, Some(record))
    }

    /// Removes a version, waits for the requests that began on it, and frees its memory. Blocks.
    ///
    /// # Errors
    ///
    /// When the version is not loaded, or a label points at it.
    pub fn unload(&self, name: &str, version: &str) -> Result<ModelInfo, Error> {
        let done = self.change(|table, records| {
            let error = match table.without(name, version) {
                Ok((table, version)) => {
                    records.remove(name, &version);
                    return Ok((table, Ok(version)));
                }
                Err(error) => error,
            };
            // A version that could not be restored is removed from the state.
            let Some((version, record)) = records.find(name, version) else { return Err(error) };
            let (version, sha256) = (version.to_owned(), record.sha256.clone());
            let labels = records.labels_of(name, &version);
            if !labels.is_empty() {
                return Err(Error::VersionLabelled(labels));
            }
            records.remove(name, &version);
            Ok((table.clone(), Err(ModelInfo::missing(name, &version, &sha256))))
        })?;
        match done {
            Ok(version) => self.retire(name, version),
            Err(forgotten) => Ok(ModelInfo { durable: self.is_durable(), ..forgotten }),
        }
    }

    /// Removes all versions of a model, and its labels. Blocks like [`Registry::unload`].
    ///
    /// # Errors
    ///
    /// When the model is not loaded.
    pub fn unload_all(&self, name: &str) -> Result<(), Error> {
        let versions = self.change(|table, records| {
            let recorded = records.models.remove(name).is_some();
            match table.without_model(name) {
                Err(_) if recorded => Ok((table.clone(), Vec::new())),
                result => result,
            }
        })?;
        versions.into_iter().try_for_each(|version| self.retire(name, version).map(drop))
    }

    /// Ends the engine of a version that is no longer in the table.
    fn retire(&self, name: &str, version: String) -> Result<ModelInfo, Error> {
        let id = (name.to_owned(), version);
        lock(&self.catalogs).remove(&id);
        lock(&self.changing_catalog).remove(&id);
        let runtime = lock(&self.running).remove(&id);
        let runtime = runtime.ok_or_else(|| Error::internal("a version without an engine"))?;
        let info = self.info(runtime.service.served(), ModelState::Unloaded);
        let stats = runtime.retire().map_err(Error::internal)?;
        lock(&self.retired).add_counters(&stats);
        info!(name, version = id.1, "unloaded the model");
        Ok(info)
    }

    /// Points a label at a loaded version.
    ///
    /// # Errors
    ///
    /// When the label is not valid, or the version is not loaded.
    pub fn set_label(&self, name: &str, label: &str, version: &str) -> Result<ModelInfo, Error> {
        name::check_label("label", label)?;
        self.change(|table, records| {
            let (table, version) = table.with_label(name, label, version)?;
            records.put_label(name, label, &version);
            Ok((table, ()))
        })?;
        info!(name, label, version, "moved a label");
        let service = self.resolve(Some(&format!("{name}@{label}")))?;
        Ok(self.info(service.served(), ModelState::Ready))
    }

    /// Removes a label, so that its version can be unloaded.
    ///
    /// # Errors
    ///
    /// When the model has no such label.
    pub fn remove_label(&self, name: &str, label: &str) -> Result<(), Error> {
        self.change(|table, records| {
            // The label may point at a version that could not be restored.
            let recorded = records.remove_label(name, label);
            match table.without_label(name, label) {
                Err(_) if recorded => Ok((table.clone(), ())),
                result => Ok((result?, ())),
            }
        })?;
        info!(name, label, "removed a label");
        Ok(())
    }

    /// Lists all versions.
    pub fn list(&self, state: ModelState) -> ModelList {
        let (used, limit) = self.memory();
        let durable = self.is_durable();
        let (loading, load_progress) = self.loading.now().unzip();
        ModelList {
            models: self
                .table()
                .versions()
                .map(|(service, labels)| ModelInfo { labels, durable, ..service.served().info(state) })
                .collect(),
            missing: self.missing().iter().map(Missing::info).collect(),
            default: self.settings.model.name.clone(),
            loading,
            load_progress,
            memory: MemoryBudget { used_bytes: used as u64, limit_bytes: limit.map(|bytes| bytes as u64) },
        }
    }

    /// The models that are loaded now.
    pub fn served(&self) -> Vec<Arc<Served>> {
        self.table().versions().map(|(service, _)| Arc::clone(service.served())).collect()
    }

    /// Bytes that models take, and the limit if there is one.
    pub fn memory(&self) -> (usize, Option<usize>) {
        (self.machine.budget.used(), self.machine.budget.limit())
    }

    /// The counters of all engines, ended ones included, and the current gauges.
    pub fn stats(&self) -> EngineStats {
        let mut totals = lock(&self.retired).clone();
        for served in self.served() {
            totals.add(&served.engine.stats());
        }
        totals.stats()
    }

    /// The longest time since the last sign of life of any engine.
    pub fn heartbeat_age(&self) -> Duration {
        self.served().iter().map(|served| served.heartbeat_age()).max().unwrap_or_default()
    }

    /// Refuses new requests, waits at most `patience` for the accepted ones, and ends all engines.
    /// Blocks.
    ///
    /// # Errors
    ///
    /// When an engine has panicked.
    pub fn drain(&self, patience: Duration) -> Result<(), EngineDied> {
        for served in self.served() {
            served.start_drain(patience);
        }
        let running = std::mem::take(&mut *lock(&self.running));
        running.into_values().try_for_each(|runtime| runtime.drain(patience))
    }

    /// Loads and probes a version. A version that fails the probe is ended.
    fn build(&self, opened: Opened, name: &str) -> Result<Runtime, LoadError> {
        // Libraries that parse the files of a checkpoint have been seen to panic. In that case
        // everything built here is dropped.
        self.loading.reach(LoadStage::Building);
        let load = || opened.load(name, &self.settings, Scale::Server, &self.machine);
        let runtime = catch_unwind(AssertUnwindSafe(load)).unwrap_or(Err(LoadError::Panicked))?;
        self.loading.reach(LoadStage::Probing);
        match tokio::runtime::Handle::current().block_on(runtime::probe(&runtime.service)) {
            Ok(()) => Ok(runtime),
            Err(error) => {
                // It took only the probe's request, so the result of its engine does not matter.
                let _ = runtime.retire();
                Err(error)
            }
        }
    }

    /// Adds a version to the table and points a label at it, in one change. Keeps its `record`,
    /// unless that is kept already. A version that is not admitted is ended.
    fn admit(
        &self,
        built: Built,
        label: Option<&str>,
        record: Option<RecordedVersion>,
    ) -> Result<ModelInfo, Error> {
        let Built { runtime, kept } = built;
        let service = runtime.service.clone();
        let id = (service.served().name.clone(), service.served().version().to_owned());
        let (name, version) = (&id.0, &id.1);
        lock(&self.catalogs).insert(id.clone(), kept);
        lock(&self.running).insert(id.clone(), runtime);
        let admitted = self.change(|table, records| {
            if let Some(record) = record {
                records.put(name, version, record);
            }
            if let Some(label) = label {
                records.put_label(name, label, version);
            }
            let labels = records.labels_of(name, version).into_iter().chain(label.map(str::to_owned));
            let mut table = table.with(service);
            for label in labels {
                table = table.with_label(name, &label, version)?.0;
            }
            Ok((table, ()))
        });
        if let Err(error) = admitted {
            lock(&self.catalogs).remove(&id);
            if let Some(runtime) = lock(&self.running).remove(&id) {
                // It took only the probe's request.
                let _ = runtime.retire();
            }
            return Err(error);
        }
        info!(name, version, label, "the model takes requests");
        let service = self.table().find(Reference { name, at: Some(version) }).cloned()?;
        Ok(self.info(service.served(), ModelState::Ready))
    }

    fn info(&self, served: &Served, state: ModelState) -> ModelInfo {
        let table = self.table();
        let mut versions = table.versions();
        let found = versions.find(|(service, _)| {
            let other = service.served();
            other.name == served.name && other.digest == served.digest
        });
        let labels = found.map(|(_, labels)| labels).unwrap_or_default();
        ModelInfo { labels, durable: self.is_durable(), ..served.info(state) }
    }

    fn table(&self) -> Arc<Table> {
        // A table is replaced by one assignment, so it is always consistent.
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether changes survive a restart.
    pub fn is_durable(&self) -> bool {
        self.settings.admin.state.is_some()
    }

    /// Replaces the table by the one that `make` returns, unless `make` fails. Changed records are
    /// written to disk first. Without a state directory, the records are empty and are not kept.
    fn change<T>(
        &self,
        make: impl FnOnce(&Table, &mut Records) -> Result<(Table, T), Error>,
    ) -> Result<T, Error> {
        self.change_with(&mut lock(&self.state), make)
    }

    /// The same for a caller that holds the lock of the state.
    fn change_with<T>(
        &self,
        state: &mut Option<StateDirectory>,
        make: impl FnOnce(&Table, &mut Records) -> Result<(Table, T), Error>,
    ) -> Result<T, Error> {
        let mut records = state.as_ref().map(|state| state.records().clone()).unwrap_or_default();
        let (next, result) = make(&self.table(), &mut records)?;
        if let Some(state) = state {
            state.write(records).map_err(not_kept)?;
            self.update_missing(&next, state.records());
        }
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        Ok(result)
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("table", &self.table).finish_non_exhaustive()
    }
}

/// Locks a mutex. Changes behind these locks are single operations, so a panic elsewhere leaves no
/// inconsistent state.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
