//! Which versions are loaded, and where labels point: an immutable table, replaced as a whole.
//!
//! Place in the flow: every request reads the current table and keeps its result; a change makes
//! another table beside it. So a label moves between two requests, never within one.
//!
//! Invariant: a label points at a loaded version of its model, and a model has at least one
//! version.
//!
//! What this must not know: engines, files, HTTP.

use std::collections::BTreeMap;

use super::name::{self, Reference, STABLE};
use crate::error::Error;
use crate::service::Service;

/// Most versions that an error message names.
const MOST_NAMED: usize = 16;

/// The versions of all models.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    models: BTreeMap<String, Model>,
}

/// The versions of one model.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    versions: BTreeMap<String, Service>,
    labels: BTreeMap<String, String>,
}

impl Table {
    /// All versions with the labels that point at them.
    pub(super) fn versions(&self) -> impl Iterator<Item = (&Service, Vec<String>)> {
        self.models.values().flat_map(|model| {
            model.versions.iter().map(|(version, service)| {
                let labels = model.labels.iter().filter(|(_, target)| *target == version);
                (service, labels.map(|(label, _)| label.clone()).collect())
            })
        })
    }

    /// Whether nothing is loaded.
    pub(super) fn is_empty(&self) -> bool {
        self.models.is_empty()
    }

    /// Finds the version that a reference means.
    ///
    /// # Errors
    ///
    /// [`Error::ModelNotFound`] when there is none.
    pub(super) fn find(&self, reference: Reference<'_>) -> Result<&Service, Error> {
        let missing = || Error::model_not_found(&reference.to_string());
        let model = self.models.get(reference.name).ok_or_else(missing)?;
        let at = reference.at.unwrap_or(STABLE);
        let version = match model.labels.get(at) {
            Some(version) => version,
            None => model.version(at).ok_or_else(|| Error::LabelUnknown {
                model: reference.name.to_owned(),
                at: clip(at),
                known: model.known(),
            })?,
        };
        model.versions.get(version).ok_or_else(missing)
    }

    /// The table with another catalog for a version.
    ///
    /// # Errors
    ///
    /// When the version has been removed meanwhile.
    pub(super) fn with_catalog(&self, service: Service) -> Result<Self, Error> {
        let served = service.served();
        let loaded = self.models.get(&served.name).map(|model| &model.versions);
        match loaded.and_then(|versions| versions.get(served.version())) {
            Some(_) => Ok(self.with(service)),
            None => Err(Error::VersionNotFound {
                given: served.version().to_owned(),
                known: self.models.get(&served.name).map_or_else(|| "none".into(), Model::known),
                label: false,
            }),
        }
    }

    /// The table with one more version.
    #[must_use]
    pub(super) fn with(&self, service: Service) -> Self {
        let mut table = self.clone();
        let (name, version) = {
            let served = service.served();
            (served.name.clone(), served.version().to_owned())
        };
        table.models.entry(name).or_default().versions.insert(version, service);
        table
    }

    /// The table with a label moved or added, and the full name of the version to which it points.
    ///
    /// # Errors
    ///
    /// When the version is not loaded.
    pub(super) fn with_label(&self, name: &str, label: &str, version: &str) -> Result<(Self, String), Error> {
        let mut table = self.clone();
        let model = table.models.get_mut(name).ok_or_else(|| Error::model_not_found(name))?;
        let version = model.version(version).ok_or_else(|| model.no_version(version))?.to_owned();
        model.labels.insert(label.to_owned(), version.clone());
        Ok((table, version))
    }

    /// The table without a label.
    ///
    /// # Errors
    ///
    /// When there is no such label.
    pub(super) fn without_label(&self, name: &str, label: &str) -> Result<Self, Error> {
        let mut table = self.clone();
        let model = table.models.get_mut(name).ok_or_else(|| Error::model_not_found(name))?;
        if model.labels.remove(label).is_none() {
            return Err(Error::LabelNotFound { given: clip(label), known: model.known() });
        }
        Ok(table)
    }

    /// The table without a version, and the version's full name.
    ///
    /// # Errors
    ///
    /// When the version is not loaded, or a label points at it.
    pub(super) fn without(&self, name: &str, version: &str) -> Result<(Self, String), Error> {
        let mut table = self.clone();
        let model = table.models.get_mut(name).ok_or_else(|| Error::model_not_found(name))?;
        let version = model.version(version).ok_or_else(|| model.no_version(version))?.to_owned();
        let labels: Vec<String> =
            model.labels.iter().filter(|(_, target)| **target == version).map(|(l, _)| l.clone()).collect();
        if !labels.is_empty() {
            return Err(Error::VersionLabelled(labels));
        }
        model.versions.remove(&version);
        if model.versions.is_empty() {
            table.models.remove(name);
        }
        Ok((table, version))
    }

    /// The table without a model, and the model's versions.
    ///
    /// # Errors
    ///
    /// When the model is not loaded.
    pub(super) fn without_model(&self, name: &str) -> Result<(Self, Vec<String>), Error> {
        let mut table = self.clone();
        let model = table.models.remove(name).ok_or_else(|| Error::model_not_found(name))?;
        Ok((table, model.versions.into_keys().collect()))
    }

    /// Whether a model has the label that requests without a label use.
    pub(super) fn is_stable(&self, name: &str) -> bool {
        self.models.get(name).is_some_and(|model| model.labels.contains_key(STABLE))
    }
}

/// The beginning of a text from a client, for use in a message.
fn clip(text: &str) -> String {
    text.chars().take(64).collect()
}

impl Model {
    /// The versions of the model, each with its labels, for an error message.
    fn known(&self) -> String {
        let version = |version: &String| {
            let labels = self.labels.iter().filter(|(_, target)| *target == version);
            let labels: Vec<&str> = labels.map(|(label, _)| label.as_str()).collect();
            if labels.is_empty() { version.clone() } else { format!("{version} ({})", labels.join(", ")) }
        };
        let named: Vec<String> = self.versions.keys().take(MOST_NAMED).map(version).collect();
        let more = self.versions.len().saturating_sub(named.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        named.join(", ") + &more
    }

    fn no_version(&self, given: &str) -> Error {
        let label = self.labels.contains_key(given);
        Error::VersionNotFound { given: clip(given), known: self.known(), label }
    }

    /// The version that begins with these digits, if there are enough of them.
    fn version(&self, digits: &str) -> Option<&str> {
        if !name::is_version(digits) {
            return None;
        }
        let fits = |service: &Service| service.served().digest.starts_with(digits);
        self.versions.iter().find(|(_, service)| fits(service)).map(|(version, _)| version.as_str())
    }
}
