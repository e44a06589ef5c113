//! `OUTPUT.partial.json`: the job to which the unfinished output belongs, and its progress.
//!
//! It is replaced as a whole by renaming, after the data that it describes are safe on disk. So it
//! is true whenever the process or the machine stops.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Largest manifest that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// The settings that affect the output besides the input, by name.
pub(super) type Job = BTreeMap<String, Value>;

/// The contents of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// The job that is being answered.
    pub(super) job: Job,
    /// The progress of the job.
    pub(super) progress: Progress,
}

/// The progress of a job. All fields belong to the same moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Progress {
    /// Number of the last line or row of the input that is answered; 0 for none.
    pub(super) line: u64,
    /// Digest of the input up to that line.
    pub(super) input_sha256: String,
    /// Size of the answers, in bytes.
    pub(super) output_bytes: u64,
    /// Size of the TREC run, in bytes.
    pub(super) trec_bytes: u64,
    /// Number of requests that have an answer.
    pub(super) answered: u64,
    /// Number of requests that have an error.
    pub(super) failed: u64,
    /// Whether all requests are answered, and only the files' final names are missing.
    pub(super) complete: bool,
}

/// Why an interrupted run cannot be resumed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ManifestError {
    /// The manifest cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Path of the manifest.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The file is not a manifest.
    #[error("{} does not say how far the unfinished output is ({source}); --restart begins anew", path.display())]
    Malformed {
        /// Path of the manifest.
        path: PathBuf,
        /// The error of the parser.
        source: serde_json::Error,
    },
    /// The manifest belongs to another job.
    #[error(
        "an interrupted run has left {}, but it was another job. {}\nGive the same flags and files to go on with it, or \
         --restart to begin anew", path.display(), differences.join("; ")
    )]
    OtherJob {
        /// Path of the manifest.
        path: PathBuf,
        /// The settings that differ, with both values.
        differences: Vec<String>,
    },
}

impl Manifest {
    /// Reads the manifest, if there is one.
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

    /// Replaces the manifest.
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

    /// Checks that the manifest belongs to this job.
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

/// Flushes the names in a file's directory to disk.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

/// The path with a suffix after its name.
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
