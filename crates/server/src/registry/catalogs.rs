//! Changing the catalog of a loaded version. Another snapshot is built beside the one that serves,
//! checked, probed, and put in its place.
//!
//! A catalog belongs to a version, because it is written in the codes of that checkpoint's
//! convention. Requests keep the snapshot that they began with; later requests get the new one. A
//! few earlier snapshots are kept for a rollback.
//!
//! Memory: every snapshot is counted against the budget until its last reader is gone. Snapshots
//! that are kept for a rollback are forgotten when a new one needs their room.
//!
//! Invariants: a change that fails changes nothing; changes of a version's catalog come one after
//! the other, so none is lost.

use std::collections::HashSet;
use std::sync::Arc;

use beamline_catalog::{Catalog, CatalogError, CatalogLimits, ItemIndex, ItemRecord};
use tracing::info;

use super::name::Reference;
use super::state::{RecordedCatalog, RecordedVersion, StateDirectory, not_kept};
use super::{Id, Registry, lock};
use crate::api::{CatalogInfo, CatalogList, CatalogPatch};
use crate::budget::{OverBudget, Reservation};
use crate::error::{Error, Refused};
use crate::runtime::{self, LoadError};
use crate::service::{Served, Service};

/// Snapshots of a version, in the order of their arrival; one of them serves.
pub(super) type Kept = Vec<Snapshot>;

/// A catalog, and its counted memory for as long as it is kept.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    catalog: Arc<Catalog>,
    memory: Arc<Reservation>,
    /// Digest of the catalog's file in the state directory; `None` while there is no file.
    file: Option<String>,
}

impl Snapshot {
    pub(super) fn new(catalog: Arc<Catalog>, memory: Arc<Reservation>) -> Self {
        Self { catalog, memory, file: None }
    }

    pub(super) fn of(served: &Served) -> Self {
        Self::new(Arc::clone(&served.catalog), Arc::clone(&served.catalog_memory))
    }

    /// The same snapshot, kept in the file of this digest.
    pub(super) fn in_file(self, sha256: &str) -> Self {
        Self { file: Some(sha256.to_owned()), ..self }
    }

    /// Bytes that forgetting this would free: none while a request still reads it.
    fn frees(&self) -> usize {
        if Arc::strong_count(&self.memory) == 1 { self.memory.bytes() } else { 0 }
    }
}

/// The catalog that a change wants to serve.
enum Made {
    New(Arc<Catalog>),
    /// A snapshot that is kept, and so is already counted.
    Kept(Snapshot),
}

impl Registry {
    /// Lists the catalogs of a version.
    ///
    /// # Errors
    ///
    /// When no version matches the reference.
    pub fn catalogs(&self, reference: &str) -> Result<CatalogList, Error> {
        let service = self.resolve(Some(reference))?;
        let kept = lock(&self.catalogs).get(&id(&service)).cloned().unwrap_or_default();
        let served = service.served();
        Ok(CatalogList {
            model: served.model_name(),
            current: served.catalog.version().to_owned(),
            versions: kept.iter().map(|kept| CatalogInfo::of(&kept.catalog, kept.memory.bytes())).collect(),
            durable: self.is_durable(),
        })
    }

    /// Replaces all items by those of a JSON-lines text. Blocks.
    ///
    /// # Errors
    ///
    /// When lines are not valid items (the error names each line and its fault), or the catalog
    /// cannot be served.
    pub fn replace_catalog(&self, reference: &str, lines: &[u8]) -> Result<CatalogList, Error> {
        self.change_catalog(reference, |service| {
            let symbols = service.served().family.symbols();
            let built = Catalog::read_json_lines(lines, symbols, &CatalogLimits::default());
            built.map(|catalog| Made::New(Arc::new(catalog))).map_err(refused)
        })
    }

    /// Adds, removes and retags items. Blocks.
    ///
    /// # Errors
    ///
    /// When an item to remove or retag does not exist, or the catalog cannot be served.
    pub fn patch_catalog(&self, reference: &str, patch: &CatalogPatch) -> Result<CatalogList, Error> {
        self.change_catalog(reference, |service| {
            let catalog = &service.served().catalog;
            let known = |param: &'static str, id: &str| match catalog.item(id) {
                Some(item) => Ok(item),
                None => Err(Error::InvalidValue {
                    param,
                    message: format!("{:?} is not in the catalog", id.chars().take(64).collect::<String>())
                        .into(),
                }),
            };
            let removed: HashSet<_> =
                patch.remove.iter().map(|id| known("remove", id)).collect::<Result<_, _>>()?;
            let retagged = patch.retag.iter().map(|retag| Ok((known("retag", &retag.item_id)?, &retag.tags)));
            let retagged: std::collections::HashMap<_, _> = retagged.collect::<Result<_, Error>>()?;
            let stay = catalog.items().filter(|item| !removed.contains(item)).map(|item| {
                let record = record(catalog, item);
                match retagged.get(&item) {
                    Some(tags) => ItemRecord { tags: (*tags).clone(), ..record },
                    None => record,
                }
            });
            build(service, stay.chain(patch.add.iter().cloned().map(ItemRecord::from))).map(Made::New)
        })
    }

    /// Goes back to an earlier catalog that is kept. Blocks.
    ///
    /// # Errors
    ///
    /// When no such catalog is kept.
    pub fn roll_back_catalog(&self, reference: &str, version: &str) -> Result<CatalogList, Error> {
        self.change_catalog(reference, |service| {
            let kept = lock(&self.catalogs);
            let mut kept = kept.get(&id(service)).into_iter().flatten();
            let found = kept.find(|kept| kept.catalog.version() == version);
            found.map(|kept| Made::Kept(kept.clone())).ok_or(Error::CatalogNotFound)
        })
    }

    /// Makes another catalog from the one that serves, and puts it in its place.
    fn change_catalog(
        &self,
        reference: &str,
        make: impl FnOnce(&Service) -> Result<Made, Error>,
    ) -> Result<CatalogList, Error> {
        let id = id(&self.resolve(Some(reference))?);
        let turn = Arc::clone(lock(&self.changing_catalog).entry(id.clone()).or_default());
        let _turn = lock(&turn);
        // The version that was meant at first, even if its label has moved since, with its current
        // catalog.
        let service = self.resolve(Some(&Reference { name: &id.0, at: Some(&id.1) }.to_string()))?;
        let (catalog, counted) = match make(&service)? {
            Made::Kept(Snapshot { catalog, memory, .. }) => (catalog, Some(memory)),
            Made::New(catalog) => (catalog, None),
        };
        let refuse = |error: LoadError| error.for_client(str::to_owned);
        let uncounted = Arc::new(self.machine.budget.nothing());
        let trial = runtime::with_catalog(&service, catalog, uncounted).map_err(refuse)?;
        tokio::runtime::Handle::current().block_on(runtime::probe(&trial)).map_err(refuse)?;
        let mut state = lock(&self.state);
        // The largest file comes first: if the disk is full, nothing has changed yet.
        let file = state.as_ref().map(|state| store(state, &trial.served().catalog)).transpose()?;
        self.store_first(&mut state, &id)?;
        // Counting may forget other catalogs to make room, so little may fail after that.
        let catalog_memory = match counted {
            Some(memory) => memory,
            None => self.count(&id, &trial.served().catalog)?,
        };
        let served = Arc::new(Served { catalog_memory, ..Served::clone(trial.served()) });
        let next = trial.over(Arc::clone(&served));
        let kept = self.next_kept(&id, Snapshot { file, ..Snapshot::of(&served) });
        self.change_with(&mut state, |table, records| {
            let table = table.with_catalog(next.clone())?;
            if let Some(record) = records.version(&id.0, &id.1) {
                records.put(&id.0, &id.1, with_catalogs(record, &kept, served.catalog.version()));
            }
            Ok((table, ()))
        })?;
        drop(state);
        if let Some(catalogs) = lock(&self.catalogs).get_mut(&id) {
            *catalogs = kept;
        }
        // Otherwise the catalog that the version was loaded with would stay for as long as its
        // engine runs.
        if let Some(runtime) = lock(&self.running).get_mut(&id) {
            runtime.service = next;
        }
        let (name, version) = &id;
        let catalog = &served.catalog;
        info!(name, version, catalog = catalog.version(), items = catalog.num_items(), "changed the catalog");
        self.catalogs(&Reference { name, at: Some(version) }.to_string())
    }

    /// Counts the memory of a new catalog. If there is not enough, forgets the oldest of those kept
    /// for a rollback, provided that this makes room.
    fn count(&self, id: &Id, catalog: &Catalog) -> Result<Arc<Reservation>, Error> {
        let reserve = || runtime::reserve_catalog(&self.machine.budget, catalog);
        let mut reserved = reserve();
        if let Err(OverBudget { needed, free, .. }) = reserved {
            let mut catalogs = lock(&self.catalogs);
            let mut none = Kept::new();
            let kept = catalogs.get_mut(id).unwrap_or(&mut none);
            let spare = kept.iter().map(Snapshot::frees).fold(0, usize::saturating_add);
            while reserved.is_err()
                && needed <= free.saturating_add(spare)
                && let Some(oldest) = kept.iter().position(|kept| kept.frees() > 0)
            {
                let forgotten = kept.remove(oldest);
                let (name, version) = id;
                info!(name, version, catalog = forgotten.catalog.version(), "forgot a catalog to make room");
                drop(forgotten);
                reserved = reserve();
            }
        }
        reserved.map(Arc::new).map_err(|error| LoadError::Memory(error).for_client(str::to_owned))
    }

    /// The list of kept catalogs once `snapshot` serves: the oldest beyond the limit are forgotten.
    /// Empty for a version that was unloaded meanwhile.
    fn next_kept(&self, id: &Id, snapshot: Snapshot) -> Kept {
        let mut kept = lock(&self.catalogs).get(id).cloned().unwrap_or_default();
        let version = snapshot.catalog.version().to_owned();
        match kept.iter_mut().find(|other| other.catalog.version() == version) {
            // The same items, possibly with other titles.
            Some(same) => *same = snapshot,
            None => kept.push(snapshot),
        }
        while kept.len() > self.settings.admin.keep_catalogs.saturating_add(1) {
            match kept.iter().position(|other| other.catalog.version() != version) {
                Some(oldest) => drop(kept.remove(oldest)),
                None => break,
            }
        }
        kept
    }

    /// Stores the catalogs that have no file yet: before the first change, that of the checkpoint.
    fn store_first(&self, state: &mut Option<StateDirectory>, id: &Id) -> Result<(), Error> {
        let Some(state) = state else { return Ok(()) };
        for snapshot in lock(&self.catalogs).get_mut(id).into_iter().flatten() {
            if snapshot.file.is_none() {
                snapshot.file = Some(store(state, &snapshot.catalog)?);
            }
        }
        Ok(())
    }
}

/// An item of a catalog as the record from which it was read.
fn record(catalog: &Catalog, item: ItemIndex) -> ItemRecord {
    ItemRecord {
        item_id: catalog.item_id(item).to_owned(),
        sid: catalog.sid_parts(catalog.leaf_of(item)),
        tags: catalog.tags(item).map(str::to_owned).collect(),
        title: catalog.title(item).map(str::to_owned),
    }
}

fn store(state: &StateDirectory, catalog: &Catalog) -> Result<String, Error> {
    state.put_catalog(catalog.items().map(|item| record(catalog, item))).map_err(not_kept)
}

/// The record of a version with other catalogs.
fn with_catalogs(record: &RecordedVersion, kept: &Kept, serving: &str) -> RecordedVersion {
    let recorded = |snapshot: &Snapshot| {
        let version = snapshot.catalog.version().to_owned();
        snapshot.file.clone().map(|sha256| RecordedCatalog { version, sha256 })
    };
    RecordedVersion {
        catalogs: kept.iter().filter_map(recorded).collect(),
        serving: Some(serving.to_owned()),
        ..record.clone()
    }
}

fn id(service: &Service) -> Id {
    let served = service.served();
    (served.name.clone(), served.version().to_owned())
}

/// Builds a catalog in the codes of a version.
fn build(service: &Service, records: impl Iterator<Item = ItemRecord>) -> Result<Arc<Catalog>, Error> {
    let symbols = service.served().family.symbols();
    Catalog::from_records(records, symbols, &CatalogLimits::default()).map(Arc::new).map_err(refused)
}

fn refused(error: CatalogError) -> Error {
    Error::Refused { why: Refused::Catalog, message: error.to_string() }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::settings::{AdminLayer, Flags, HttpLayer, ModelLayer, Settings};

    #[test]
    fn a_catalog_counts_until_its_last_reader_is_gone() {
        let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hf/qwen3-untied");
        let text = std::fs::read(checkpoint.join("catalog.jsonl")).unwrap();
        let flags = Flags {
            model: ModelLayer { checkpoint: Some(checkpoint), ..ModelLayer::default() },
            ..Flags::default()
        };
        let admin = AdminLayer { keep_catalogs: Some(0), ..AdminLayer::default() };
        let settings = Settings::resolve_server(flags, HttpLayer::default(), admin).unwrap();
        let tokio =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let _inside = tokio.enter();
        let registry = Registry::start(settings).unwrap();
        let used = || registry.machine.budget.used();

        let reader = registry.resolve(None).unwrap();
        let (before, first) = (used(), reader.served().catalog_memory.bytes());
        let half: Vec<u8> =
            text.split_inclusive(|byte| *byte == b'\n').step_by(2).flatten().copied().collect();
        let list = registry.replace_catalog("default", &half).unwrap();
        let [CatalogInfo { memory_bytes: second, .. }] = list.versions[..] else { panic!("{list:?}") };
        assert!(0 < second && (second as usize) < first);
        assert_eq!(used(), before + second as usize, "a request still reads the first");
        drop(reader);
        assert_eq!(used(), before + second as usize - first);
        registry.drain(Duration::ZERO).unwrap();
    }
}
