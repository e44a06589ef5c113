//! The state as plain data, and how changes affect it. Files are not known here.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::registry::name;

/// Everything that a restart restores.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Records {
    /// The models, by name.
    pub models: BTreeMap<String, RecordedModel>,
}

/// A model with its labels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedModel {
    /// The version that each label points at.
    pub labels: BTreeMap<String, String>,
    /// The versions, by their digits.
    pub versions: BTreeMap<String, RecordedVersion>,
}

/// A loaded checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedVersion {
    /// Digest of the checkpoint. Another checkpoint in the same place is another version.
    pub sha256: String,
    /// The place of its files.
    pub source: Source,
    /// Catalogs that came over HTTP and are kept, oldest first. Empty while the catalog of the
    /// checkpoint serves and was never changed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub catalogs: Vec<RecordedCatalog>,
    /// Content version of the catalog that serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving: Option<String>,
}

/// A catalog in a file of the state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedCatalog {
    /// Content version of the catalog.
    pub version: String,
    /// Digest of the file, which is also its name.
    pub sha256: String,
}

/// The place of a checkpoint's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Source {
    /// Under the model root, in the directory of the model.
    ModelRoot {
        /// A directory within that, if the model has several checkpoints.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        directory: Option<String>,
        /// The catalog: a file of the checkpoint.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        catalog: Option<String>,
        /// The convention: a file of the checkpoint, or a preset.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        convention: Option<String>,
    },
    /// A place that the command line named.
    CommandLine {
        /// The directory of the checkpoint.
        checkpoint: PathBuf,
        /// The catalog, if it does not lie beside the checkpoint.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        catalog: Option<PathBuf>,
        /// A file or a preset, if convention.json does not lie beside the checkpoint.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        convention: Option<String>,
    },
}

impl Records {
    /// The record of a version.
    pub fn version(&self, model: &str, version: &str) -> Option<&RecordedVersion> {
        self.models.get(model)?.versions.get(version)
    }

    /// The version of a model with this digest, or the one whose digest begins with these digits,
    /// if there are enough of them.
    pub fn find(&self, model: &str, digits: &str) -> Option<(&str, &RecordedVersion)> {
        let versions = &self.models.get(model).filter(|_| name::is_version(digits))?.versions;
        let found = versions.iter().find(|(_, record)| record.sha256.starts_with(digits));
        found.map(|(version, record)| (version.as_str(), record))
    }

    /// The labels that point at a version.
    pub fn labels_of(&self, model: &str, version: &str) -> Vec<String> {
        let labels = self.models.get(model).into_iter().flat_map(|model| &model.labels);
        labels.filter(|(_, target)| *target == version).map(|(label, _)| label.clone()).collect()
    }

    /// Whether a model has a label.
    pub fn has_label(&self, model: &str, label: &str) -> bool {
        self.models.get(model).is_some_and(|model| model.labels.contains_key(label))
    }

    /// Adds a version, or replaces its record.
    pub fn put(&mut self, model: &str, version: &str, record: RecordedVersion) {
        self.models.entry(model.to_owned()).or_default().versions.insert(version.to_owned(), record);
    }

    /// Points a label at a version.
    pub fn put_label(&mut self, model: &str, label: &str, version: &str) {
        if let Some(model) = self.models.get_mut(model) {
            model.labels.insert(label.to_owned(), version.to_owned());
        }
    }

    /// Removes a label. Returns whether there was one.
    pub fn remove_label(&mut self, model: &str, label: &str) -> bool {
        self.models.get_mut(model).is_some_and(|model| model.labels.remove(label).is_some())
    }

    /// Removes a version, and the model with its last version.
    pub fn remove(&mut self, model: &str, version: &str) {
        let Some(found) = self.models.get_mut(model) else { return };
        found.versions.remove(version);
        found.labels.retain(|_, target| target != version);
        if found.versions.is_empty() {
            self.models.remove(model);
        }
    }

    /// Digests of all catalogs that are kept in files.
    pub fn catalogs(&self) -> impl Iterator<Item = &str> {
        let versions = self.models.values().flat_map(|model| model.versions.values());
        versions.flat_map(|version| &version.catalogs).map(|catalog| catalog.sha256.as_str())
    }

    /// Finds contradictions. Records that a server wrote have none.
    pub fn check(&self) -> Result<(), String> {
        for (model, RecordedModel { labels, versions }) in &self.models {
            if !name::is_name(model) || versions.is_empty() {
                return Err(format!("model {model:?} has no valid name, or no version"));
            }
            for (version, record) in versions {
                check_version(version, record).map_err(|why| format!("model {model:?}: {why}"))?;
            }
            for (label, target) in labels {
                if name::check_label("label", label).is_err() || !versions.contains_key(target) {
                    return Err(format!("model {model:?}: label {label:?} points at {target:?}"));
                }
            }
        }
        Ok(())
    }
}

fn check_version(version: &str, record: &RecordedVersion) -> Result<(), String> {
    let RecordedVersion { sha256, source: _, catalogs, serving } = record;
    if !name::is_version(version) || sha256.len() != 64 || !sha256.starts_with(version) {
        return Err(format!("version {version:?} with sha256 {sha256:?}"));
    }
    if let Some(catalog) = catalogs.iter().find(|catalog| !is_digest(&catalog.sha256)) {
        return Err(format!("version {version}: a catalog with sha256 {:?}", catalog.sha256));
    }
    let known = |serving: &String| catalogs.iter().any(|catalog| catalog.version == *serving);
    // A catalog of the checkpoint may serve without being kept in a file.
    match serving {
        Some(serving) if !known(serving) => {
            Err(format!("version {version}: catalog {serving:?} is not kept"))
        }
        None if !catalogs.is_empty() => Err(format!("version {version}: none of its catalogs serves")),
        _ => Ok(()),
    }
}

/// Whether a text is a sha256, and so a file name that stays within a directory.
pub(super) fn is_digest(text: &str) -> bool {
    text.len() == 64 && name::is_version(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(digit: char) -> (String, RecordedVersion) {
        let sha256: String = std::iter::repeat_n(digit, 64).collect();
        let source = Source::ModelRoot { directory: None, catalog: None, convention: None };
        (sha256[..12].to_owned(), RecordedVersion { sha256, source, catalogs: Vec::new(), serving: None })
    }

    fn records() -> Records {
        let mut records = Records::default();
        for digit in ['a', 'b'] {
            let (name, record) = version(digit);
            records.put("shop", &name, record);
        }
        records.put_label("shop", "stable", &version('a').0);
        records
    }

    #[test]
    fn a_version_goes_with_its_labels_and_the_last_one_with_its_model() {
        let mut records = records();
        let (a, b) = (version('a').0, version('b').0);
        assert_eq!(records.labels_of("shop", &a), ["stable"]);
        assert_eq!(records.find("shop", &"a".repeat(20)).unwrap().0, a);
        assert!(records.find("shop", "aa").is_none());
        records.remove("shop", &a);
        assert!(records.check().is_ok() && records.labels_of("shop", &a).is_empty());
        records.remove("shop", &b);
        assert_eq!(records, Records::default());
    }

    #[test]
    fn what_contradicts_itself_is_told() {
        let broken = |change: &dyn Fn(&mut RecordedModel)| {
            let mut records = records();
            change(records.models.get_mut("shop").unwrap());
            records.check().unwrap_err()
        };
        let (a, record) = version('a');
        let catalog = |sha256: &str| RecordedCatalog { version: "v".into(), sha256: sha256.into() };
        let with = |catalogs: Vec<RecordedCatalog>, serving: Option<&str>| RecordedVersion {
            catalogs,
            serving: serving.map(str::to_owned),
            ..record.clone()
        };
        broken(&|model| model.versions.clear());
        broken(&|model| drop(model.labels.insert("canary".into(), "cccccccccccc".into())));
        broken(&|model| drop(model.versions.insert("cccccccccccc".into(), record.clone())));
        // The name of a file must not lead out of the directory.
        broken(&|model| drop(model.versions.insert(a.clone(), with(vec![catalog("../../etc")], Some("v")))));
        broken(&|model| drop(model.versions.insert(a.clone(), with(vec![], Some("v")))));
        broken(&|model| drop(model.versions.insert(a.clone(), with(vec![catalog(&"0".repeat(64))], None))));
        assert_eq!(records().check(), Ok(()));
    }
}
