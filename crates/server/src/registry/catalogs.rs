//! Changing the catalog of a loaded version: another snapshot is built beside the one that serves, checked, probed, and put in
//! its place.
//!
//! A catalog belongs to a version, because it is written in the codes of that checkpoint's convention. Requests keep the
//! snapshot that they began with; the next ones get the new one. A few earlier snapshots are kept to roll back to.
//!
//! Invariants: a change that fails changes nothing; changes of catalogs come one after the other, so none is lost.

use std::collections::HashSet;
use std::sync::Arc;

use beamline_catalog::{Catalog, CatalogError, CatalogLimits, ItemRecord};
use tracing::info;

use super::name::Reference;
use super::{Id, Registry, lock};
use crate::api::{CatalogInfo, CatalogList, CatalogPatch};
use crate::error::{Error, Refused};
use crate::runtime;
use crate::service::Service;

/// Snapshots of a version, in the order in which they came; one of them serves.
pub(super) type Kept = Vec<Arc<Catalog>>;

impl Registry {
    /// The catalogs of a version.
    ///
    /// # Errors
    ///
    /// When the reference means nothing.
    pub fn catalogs(&self, reference: &str) -> Result<CatalogList, Error> {
        let service = self.resolve(Some(reference))?;
        let kept = lock(&self.catalogs).get(&id(&service)).cloned().unwrap_or_default();
        let served = service.served();
        Ok(CatalogList {
            model: served.model_name(),
            current: served.catalog.version().to_owned(),
            versions: kept.iter().map(|catalog| CatalogInfo::of(catalog)).collect(),
        })
    }

    /// Puts the items of a JSON-lines text in the place of all there are. Blocks.
    ///
    /// # Errors
    ///
    /// When a line is no item, or the catalog cannot be served.
    pub fn replace_catalog(&self, reference: &str, lines: &[u8]) -> Result<CatalogList, Error> {
        self.change_catalog(reference, |service| {
            let mut problem = None;
            let lines = lines.split(|byte| *byte == b'\n').zip(1_u64..);
            let records =
                lines.filter(|(line, _)| !line.trim_ascii().is_empty()).map_while(|(line, number)| {
                    serde_json::from_slice::<ItemRecord>(line)
                        .map_err(|error| problem = Some(format!("line {number}: {error}")))
                        .ok()
                });
            let built = build(service, records);
            match problem {
                Some(message) => Err(Error::Refused { why: Refused::Catalog, message }),
                None => built,
            }
        })
    }

    /// Adds, removes and retags items. Blocks.
    ///
    /// # Errors
    ///
    /// When an item that should go or change is not there, or the catalog cannot be served.
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
            let stay = catalog.items().filter(|item| !removed.contains(item)).map(|item| ItemRecord {
                item_id: catalog.item_id(item).to_owned(),
                sid: catalog.sid_parts(catalog.leaf_of(item)),
                tags: match retagged.get(&item) {
                    Some(tags) => (*tags).clone(),
                    None => catalog.tags(item).map(str::to_owned).collect(),
                },
                title: catalog.title(item).map(str::to_owned),
            });
            build(service, stay.chain(patch.add.iter().cloned().map(ItemRecord::from)))
        })
    }

    /// Goes back to a catalog that was kept. Blocks.
    ///
    /// # Errors
    ///
    /// When it was not.
    pub fn roll_back_catalog(&self, reference: &str, version: &str) -> Result<CatalogList, Error> {
        self.change_catalog(reference, |service| {
            let kept = lock(&self.catalogs);
            let mut kept = kept.get(&id(service)).into_iter().flatten();
            kept.find(|catalog| catalog.version() == version).cloned().ok_or(Error::CatalogNotFound)
        })
    }

    /// Makes another catalog of the one that serves, and puts it in its place.
    fn change_catalog(
        &self,
        reference: &str,
        make: impl FnOnce(&Service) -> Result<Arc<Catalog>, Error>,
    ) -> Result<CatalogList, Error> {
        let _turn = lock(&self.changing_catalog);
        let service = self.resolve(Some(reference))?;
        let catalog = make(&service)?;
        let refuse = |error| Error::refused(&error, str::to_owned);
        let next = runtime::with_catalog(&service, Arc::clone(&catalog)).map_err(refuse)?;
        tokio::runtime::Handle::current().block_on(runtime::probe(&next)).map_err(refuse)?;
        let id = id(&service);
        self.change(|table| Ok((table.with_catalog(next)?, ())))?;
        self.keep(&id, &catalog);
        let (name, version) = &id;
        info!(name, version, catalog = catalog.version(), items = catalog.num_items(), "changed the catalog");
        self.catalogs(&Reference { name, at: Some(version) }.to_string())
    }

    /// Remembers a catalog that serves, and forgets the oldest beyond the limit.
    pub(super) fn keep(&self, id: &Id, catalog: &Arc<Catalog>) {
        let mut catalogs = lock(&self.catalogs);
        let kept = catalogs.entry(id.clone()).or_default();
        match kept.iter_mut().find(|other| other.version() == catalog.version()) {
            // The same items, with other titles perhaps.
            Some(same) => *same = Arc::clone(catalog),
            None => kept.push(Arc::clone(catalog)),
        }
        while kept.len() > self.settings.admin.keep_catalogs.saturating_add(1) {
            match kept.iter().position(|other| other.version() != catalog.version()) {
                Some(oldest) => drop(kept.remove(oldest)),
                None => return,
            }
        }
    }
}

fn id(service: &Service) -> Id {
    let served = service.served();
    (served.name.clone(), served.version().to_owned())
}

/// A catalog in the codes of a version.
fn build(service: &Service, records: impl Iterator<Item = ItemRecord>) -> Result<Arc<Catalog>, Error> {
    let convention = &*service.served().convention;
    Catalog::from_records(records, convention, &CatalogLimits::default())
        .map(Arc::new)
        .map_err(|error: CatalogError| Error::Refused { why: Refused::Catalog, message: error.to_string() })
}
