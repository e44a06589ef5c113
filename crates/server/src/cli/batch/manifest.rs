//! `OUTPUT.partial.json`: which job the unfinished output belongs to, and how far it is.
//!
//! It is replaced as a whole by renaming, after what it speaks of is safe on disk. So whatever it says is true, whenever
//! the process or the machine stops.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Largest manifest that is read.
const MAX_BYTES: u64 = 1 << 20;

/// What shapes the output beside the input, by name.
pub(super) type Job = BTreeMap<String, Value>;

/// The file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// What is being answered.
    pub(super) job: Job,
    /// How far.
    pub(super) progress: Progress,
}

/// How far a job is. All of it belongs to the same moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Progress {
    /// The last line or row of the input that is answered; 0 for none.
    pub(super) line: u64,
    /// Digest of the input up to there.
    pub(super) input_sha256: String,
    /// Bytes of the answers.
    pub(super) output_bytes: u64,
    /// Bytes of the TREC run.
    pub(super) trec_bytes: u64,
    /// Requests that have an answer.
    pub(super) answered: u64,
    /// Requests that have an error.
    pub(super) failed: u64,
    /// Whether this is all, and only the names are still missing.
    pub(super) complete: bool,
}

/// Why an interrupted run cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub(super) enum ManifestError {
    /// It cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The manifest.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is no manifest.
    #[error("{} does not say how far the unfinished output is ({source}); --restart begins anew", path.display())]
    Malformed {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// It belongs to another job.
    #[error(
        "an interrupted run has left {}, but it was another job. {}\nGive the same flags and files to go on with it, or \
         --restart to begin anew", path.display(), differences.join("; ")
    )]
    OtherJob {
        /// The manifest.
        path: PathBuf,
        /// What differs, with both values.
        differences: Vec<String>,
    },
}

impl Manifest {
    /// Reads one, if there is one.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, ManifestError> {
        let io = |source| ManifestError::Io { path: path.to_owned(), source };
        let bytes = match fs::metadata(path).map(|file| file.len()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
            Ok(length) if length > MAX_BYTES => return Err(io(io::Error::other("too large for a manifest"))),
            Ok(_) => fs::read(path).map_err(io)?,
        };
        let manifest = serde_json::from_slice(&bytes);
        manifest.map(Some).map_err(|source| ManifestError::Malformed { path: path.to_owned(), source })
    }

    /// Replaces the file.
    pub(super) fn write(&self, path: &Path) -> Result<(), ManifestError> {
        let replace = || {
            let new = with_suffix(path, ".new");
            let mut file = File::create(&new)?;
            serde_json::to_writer_pretty(&mut file, self)?;
            file.write_all(b"\n")?;
            file.sync_data()?;
            fs::rename(&new, path)?;
            sync_directory(path)
        };
        replace().map_err(|source| ManifestError::Io { path: path.to_owned(), source })
    }

    /// Whether the job is this one.
    pub(super) fn check(&self, job: &Job, path: &Path) -> Result<(), ManifestError> {
        let missing = Value::Null;
        let mut names: Vec<&String> = self.job.keys().chain(job.keys()).collect();
        names.sort();
        names.dedup();
        let differences: Vec<String> = names
            .into_iter()
            .filter_map(|name| {
                let (then, now) = (self.job.get(name).unwrap_or(&missing), job.get(name).unwrap_or(&missing));
                (then != now).then(|| format!("{name}: {then} then, {now} now"))
            })
            .collect();
        if differences.is_empty() {
            return Ok(());
        }
        Err(ManifestError::OtherJob { path: path.to_owned(), differences })
    }
}

/// Makes names in the directory of a file safe on disk.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

/// The path with something after its name.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_differs_is_named_with_both_values() {
        let job = |pairs: &[(&str, u64)]| -> Job {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect()
        };
        let manifest = Manifest { job: job(&[("a", 1), ("b", 2)]), progress: Progress::default() };
        assert!(manifest.check(&manifest.job, Path::new("m")).is_ok());
        let error = manifest.check(&job(&[("a", 1), ("b", 3), ("c", 4)]), Path::new("m")).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("b: 2 then, 3 now; c: null then, 4 now"), "{text}");
    }

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.json");
        assert!(Manifest::read(&path).unwrap().is_none());
        let progress = Progress { line: 7, complete: true, ..Progress::default() };
        let manifest = Manifest { job: Job::from([("a".into(), json!([1]))]), progress };
        manifest.write(&path).unwrap();
        assert_eq!(Manifest::read(&path).unwrap(), Some(manifest));
        fs::write(&path, "{").unwrap();
        assert!(matches!(Manifest::read(&path), Err(ManifestError::Malformed { .. })));
    }
}
