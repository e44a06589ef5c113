//! The start: versions of the state are restored, and the checkpoint of the command line is loaded.
//!
//! Both may define a model. The rule:
//!
//! ```text
//! the state has no such model   load the command line's checkpoint, label it `stable`, and keep it
//! the state has the model       the state wins; a warning is logged if it lacks that checkpoint
//! ```
//!
//! So the same command line starts a server for the first time and after every swap.
//!
//! A version that cannot be restored does not keep the others from serving. It stays in the state,
//! is listed as missing, and requests for it are refused by name.

use std::path::Path;
use std::sync::{Arc, PoisonError};

use beamline_catalog::{Catalog, CatalogLimits};
use tracing::{error, info, warn};

use super::catalogs::{Kept, Snapshot};
use super::name::{self, Reference, STABLE};
use super::root::Wanted;
use super::state::{RecordedCatalog, RecordedVersion, Records, Source, StateError};
use super::table::Table;
use super::{Registry, lock};
use crate::api::{MissingVersion, ModelInfo};
use crate::error::Error;
use crate::runtime::{self, Files, LoadError, Opened, Runtime};
use crate::settings::{ModelSettings, SettingsError};

/// A running version, and its catalogs.
pub(super) struct Built {
    pub(super) runtime: Runtime,
    pub(super) kept: Kept,
}

/// A version of the state that is not running.
#[derive(Clone, Debug)]
pub(super) struct Missing {
    name: String,
    version: String,
    sha256: String,
    labels: Vec<String>,
    /// Why it is missing, without the paths of this machine.
    reason: String,
}

impl Missing {
    /// The description for clients.
    pub(super) fn info(&self) -> MissingVersion {
        MissingVersion {
            name: self.name.clone(),
            version: self.version.clone(),
            labels: self.labels.clone(),
            reason: self.reason.clone(),
        }
    }

    fn is(&self, Reference { name, at }: Reference<'_>) -> bool {
        let at = at.unwrap_or(STABLE);
        let digits = name::is_version(at) && self.sha256.starts_with(at);
        self.name == name && (digits || self.labels.iter().any(|label| label == at))
    }
}

impl Registry {
    /// Loads the versions of the state and the checkpoint of the command line. Blocks. Calls
    /// `opened` when the checkpoint of the command line was opened and found undamaged, or at once
    /// if there is none.
    pub(super) fn bring_back(&self, opened: impl FnOnce()) -> Result<(), LoadError> {
        let mut records = self.records();
        let model = &self.settings.model;
        let named = match model.checkpoint() {
            Ok(checkpoint) if records.models.contains_key(&model.name) => {
                follow_command_line(model, checkpoint, &mut records);
                false
            }
            named => named.is_ok(),
        };
        let mut opened = Some(opened);
        if !named {
            opened.take().into_iter().for_each(|opened| opened());
        }
        for (name, recorded) in &records.models {
            for (version, record) in &recorded.versions {
                let built =
                    self.open_recorded(name, record).and_then(|opened| self.restored(opened, name, record));
                match built {
                    Ok(built) => {
                        drop(self.admit(built, None, Some(record.clone())).map_err(LoadError::Probe)?)
                    }
                    Err(error) => self.miss(name, version, record, &error),
                }
            }
        }
        match opened {
            Some(opened) => self.load_command_line(opened),
            None => Ok(()),
        }
    }

    fn load_command_line(&self, tell: impl FnOnce()) -> Result<(), LoadError> {
        let model = &self.settings.model;
        if !name::is_name(&model.name) {
            let message = format!(
                "--name {:?} is not a valid name: use letters, digits, `_`, `.` and `-`, start with a letter or a digit, and take \
                 at most 64 characters",
                model.name
            );
            return Err(LoadError::Limits(message));
        }
        let opened = Opened::open(Files::of(model)?)?;
        tell();
        let record = RecordedVersion {
            sha256: opened.digest().to_owned(),
            source: Source::of_settings(model)?,
            catalogs: Vec::new(),
            serving: None,
        };
        let built = self.restored(opened, &model.name, &record)?;
        self.admit(built, Some(STABLE), Some(record)).map_err(LoadError::Probe)?;
        Ok(())
    }

    /// The records on disk.
    pub(super) fn records(&self) -> Records {
        lock(&self.state).as_ref().map(|state| state.records().clone()).unwrap_or_default()
    }

    /// The record of a version that a client asks to load. If the version is missing, it includes
    /// the catalogs that are kept.
    pub(super) fn record_of(&self, name: &str, digest: &str, source: Source) -> RecordedVersion {
        match self.records().find(name, digest) {
            Some((_, record)) => RecordedVersion { source, ..record.clone() },
            None => {
                RecordedVersion { sha256: digest.to_owned(), source, catalogs: Vec::new(), serving: None }
            }
        }
    }

    /// Opens the checkpoint of a version, and verifies that its digest is still the recorded one.
    fn open_recorded(&self, name: &str, record: &RecordedVersion) -> Result<Opened, LoadError> {
        let opened = Opened::open(self.files_of(name, &record.source)?)?;
        match opened.digest() == record.sha256 {
            true => Ok(opened),
            false => {
                Err(LoadError::Changed { recorded: record.sha256.clone(), found: opened.digest().to_owned() })
            }
        }
    }

    fn files_of(&self, name: &str, source: &Source) -> Result<Files, LoadError> {
        match source {
            Source::CommandLine { checkpoint, catalog, convention } => Ok(Files {
                checkpoint: checkpoint.clone(),
                random_weights: None,
                catalog: catalog.clone(),
                convention: convention.clone(),
            }),
            Source::ModelRoot { directory, catalog, convention } => {
                let root = self.root.as_ref().ok_or_else(|| {
                    LoadError::NotThere(
                        "it was loaded from a model root: start the server with --model-root".into(),
                    )
                })?;
                let wanted = Wanted {
                    name,
                    directory: directory.as_deref(),
                    catalog: catalog.as_deref(),
                    convention: convention.as_deref(),
                };
                root.find(wanted).map_err(|error| LoadError::NotThere(error.to_string()))
            }
        }
    }

    /// Loads a version with its kept catalogs.
    pub(super) fn restored(
        &self,
        opened: Opened,
        name: &str,
        record: &RecordedVersion,
    ) -> Result<Built, LoadError> {
        let serving =
            record.catalogs.iter().find(|catalog| Some(&catalog.version) == record.serving.as_ref());
        let Some(serving) = serving else {
            let runtime = self.build(opened, name)?;
            let kept = vec![Snapshot::of(runtime.service.served())];
            return Ok(Built { runtime, kept });
        };
        let file = self.with_state(|state| {
            state.read_catalog(&serving.sha256)?;
            Ok(state.catalog_path(&serving.sha256))
        })?;
        let runtime = self.build(opened.with_catalog(file.clone()), name)?;
        let served = Arc::clone(runtime.service.served());
        if served.catalog.version() != serving.version {
            let why =
                format!("the catalog has version {}, not {}", served.catalog.version(), serving.version);
            drop(served);
            let _ = runtime.retire();
            return Err(StateError::Damaged { path: file, why }.into());
        }
        let mut kept = Kept::new();
        for catalog in &record.catalogs {
            match catalog.version == serving.version {
                true => kept.push(Snapshot::of(&served).in_file(&catalog.sha256)),
                false => kept.extend(self.snapshot(catalog, &served)),
            }
        }
        drop(served);
        Ok(Built { runtime, kept })
    }

    /// A catalog for a rollback. If it cannot be read, that is a warning, and the version is still
    /// loaded.
    fn snapshot(&self, recorded: &RecordedCatalog, served: &crate::service::Served) -> Option<Snapshot> {
        let read = || -> Result<Snapshot, LoadError> {
            let lines = self.with_state(|state| state.read_catalog(&recorded.sha256))?;
            let path = self.with_state(|state| Ok(state.catalog_path(&recorded.sha256)))?;
            let catalog =
                Catalog::read_json_lines(&lines, served.family.symbols(), &CatalogLimits::default())
                    .map_err(|source| LoadError::Catalog { path, source: Box::new(source) })?;
            let memory = runtime::reserve_catalog(&self.machine.budget, &catalog)?;
            Ok(Snapshot::new(Arc::new(catalog), Arc::new(memory)).in_file(&recorded.sha256))
        };
        let version = &recorded.version;
        read().inspect_err(|error| warn!(version, %error, "cannot keep a catalog to roll back to")).ok()
    }

    fn with_state<T>(
        &self,
        read: impl FnOnce(&super::state::StateDirectory) -> Result<T, StateError>,
    ) -> Result<T, LoadError> {
        match &*lock(&self.state) {
            Some(state) => read(state).map_err(LoadError::State),
            None => {
                Err(LoadError::NotThere("catalogs are kept in a state directory: start with --state".into()))
            }
        }
    }

    fn miss(&self, name: &str, version: &str, record: &RecordedVersion, error: &LoadError) {
        error!(name, version, %error, "a version of the state cannot be brought back; the others serve");
        let mut reason = error.to_string();
        let admin = &self.settings.admin;
        let checkpoint = match &record.source {
            Source::CommandLine { checkpoint, .. } => Some(checkpoint),
            Source::ModelRoot { .. } => None,
        };
        for path in [checkpoint, admin.model_root.as_ref(), admin.state.as_ref()].into_iter().flatten() {
            for path in [path.canonicalize().ok().as_ref(), Some(path)].into_iter().flatten() {
                let path = path.display();
                reason = reason.replace(&format!("{path}/"), "").replace(&path.to_string(), "its directory");
            }
        }
        self.missing.write().unwrap_or_else(PoisonError::into_inner).push(Missing {
            name: name.to_owned(),
            version: version.to_owned(),
            sha256: record.sha256.clone(),
            labels: self.records().labels_of(name, version),
            reason,
        });
    }

    /// The versions that could not be restored.
    pub(super) fn missing(&self) -> Vec<Missing> {
        self.missing.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same list, for health checks.
    pub fn missing_versions(&self) -> Vec<MissingVersion> {
        self.missing().iter().map(Missing::info).collect()
    }

    /// The error for a request that asks for a missing version.
    pub(super) fn why_missing(&self, reference: Reference<'_>) -> Option<Error> {
        let missing = self.missing.read().unwrap_or_else(PoisonError::into_inner);
        let found = missing.iter().find(|missing| missing.is(reference))?;
        Some(Error::VersionMissing {
            model: found.name.clone(),
            version: found.version.clone(),
            reason: found.reason.clone(),
        })
    }

    /// Removes entries that are loaded by now, or are no longer in the state.
    pub(super) fn update_missing(&self, table: &Table, records: &Records) {
        let mut all = self.missing.write().unwrap_or_else(PoisonError::into_inner);
        all.retain_mut(|missing| {
            let Missing { name, version, labels, .. } = missing;
            *labels = records.labels_of(name, version);
            records.version(name, version).is_some()
                && table.find(Reference { name, at: Some(version) }).is_err()
        });
    }
}

/// Handles a model that both the state and the command line name. The command line only says where
/// its checkpoint is.
fn follow_command_line(model: &ModelSettings, checkpoint: &Path, records: &mut Records) {
    let Ok(named) = Source::of_settings(model) else { return };
    let versions =
        records.models.get_mut(&model.name).into_iter().flat_map(|model| model.versions.values_mut());
    for record in versions {
        if let (Source::CommandLine { checkpoint: old, .. }, Source::CommandLine { checkpoint: new, .. }) =
            (&record.source, &named)
            && old == new
        {
            record.source = named;
            info!(name = model.name, "the state counts: it holds the checkpoint of the command line");
            return;
        }
    }
    warn!(
        name = model.name,
        checkpoint = %checkpoint.display(),
        "the state counts, so the checkpoint of the command line is not loaded. To serve it, load it over \
         HTTP or with `beamline models load`, or start with another --state"
    );
}

impl Source {
    /// The source that a client names.
    pub(super) fn of(wanted: Wanted<'_>) -> Self {
        Self::ModelRoot {
            directory: wanted.directory.map(str::to_owned),
            catalog: wanted.catalog.map(str::to_owned),
            convention: wanted.convention.map(str::to_owned),
        }
    }

    /// The source on the command line, with full paths: the next start may be in another directory.
    fn of_settings(model: &ModelSettings) -> Result<Self, SettingsError> {
        let full = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let file = |text: &String| match Path::new(text) {
            path if path.is_file() => full(path).to_string_lossy().into_owned(),
            _ => text.clone(),
        };
        Ok(Self::CommandLine {
            checkpoint: full(model.checkpoint()?),
            catalog: model.catalog.as_deref().map(full),
            convention: model.convention.as_ref().map(file),
        })
    }
}

impl ModelInfo {
    /// An entry for a version that was never loaded in this process.
    pub(super) fn missing(name: &str, version: &str, sha256: &str) -> Self {
        use crate::api::{CatalogInfo, MemoryInfo, ModelState};
        Self {
            name: name.to_owned(),
            version: version.to_owned(),
            sha256: sha256.to_owned(),
            weight_format: "unknown".into(),
            kv_format: "unknown".into(),
            family: "unknown".into(),
            architecture: "unknown".into(),
            parameters: 0,
            context_limit: 0,
            max_history_items: 0,
            levels: 0,
            generated_steps: 0,
            tasks: Vec::new(),
            catalog: CatalogInfo { version: "unknown".into(), items: 0, leaves: 0, memory_bytes: 0 },
            memory: MemoryInfo { weights_bytes: 0, kv_bytes: 0, kv_host_bytes: 0, kv_disk_bytes: 0 },
            labels: Vec::new(),
            durable: true,
            state: ModelState::Unloaded,
        }
    }
}
