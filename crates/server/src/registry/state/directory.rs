//! The directory of a state: its lock, how it is read, and how a change is written.
//!
//! A file is replaced by writing another beside it, flushing that to the disk, renaming it over the
//! old one, and flushing the directory. So a crash at any moment leaves the old file or the new
//! one. A file that is neither was damaged by something else, and is refused as a whole.

use std::collections::HashSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use beamline_catalog::ItemRecord;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::warn;

use super::record::{self, Records};

/// The name of the format in the state file.
const FORMAT: &str = "beamline state";
/// The version of the format; there is only one so far.
const VERSION: u32 = 1;
/// Largest state file that is read, in bytes.
const MAX_BYTES: u64 = 64 << 20;
/// Largest catalog that is read back, in bytes.
const MAX_CATALOG_BYTES: u64 = 8 << 30;

const STATE: &str = "state.json";
const PREVIOUS: &str = "state.previous.json";
const CATALOGS: &str = "catalogs";

/// Why the state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process has locked the directory.
    #[error(
        "state {}: another server uses this directory. Stop that server, or give each a directory of its own",
        .0.display()
    )]
    InUse(PathBuf),
    /// The operating system reported an error.
    #[error("state {}: cannot {action}: {source}", path.display())]
    Io {
        /// Path of the file or directory.
        path: PathBuf,
        /// The action that failed.
        action: &'static str,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The file does not hold what was written.
    #[error(
        "state {}: {why}. Nothing of it is used. Put a good copy in its place ({PREVIOUS} beside it is the \
         state before the last change), or move the file away to start with nothing",
        path.display()
    )]
    Damaged {
        /// Path of the state file.
        path: PathBuf,
        /// What is wrong with the file.
        why: String,
    },
    /// A newer server wrote the file.
    #[error(
        "state {}: written in version {version} of its format, this server reads version {VERSION}. Use a \
         newer server",
        path.display()
    )]
    Newer {
        /// Path of the state file.
        path: PathBuf,
        /// Version of the file's format.
        version: u32,
    },
}

/// The contents of the file. The digest is that of `state` in compact JSON, so white space does not
/// matter and everything else does.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: String,
    version: u32,
    sha256: String,
    state: Records,
}

/// The part that is read first, to distinguish a newer file from a damaged one.
#[derive(Deserialize)]
struct Header {
    format: String,
    version: u32,
}

/// A directory that this process uses exclusively, with the records in it.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    /// Locked while it is open. The system unlocks it when the process ends in any way.
    _lock: File,
    records: Records,
}

impl StateDirectory {
    /// Locks the directory, creates it if there is none, and reads it.
    ///
    /// # Errors
    ///
    /// When another server has locked it, it cannot be read, or it is damaged.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let catalogs = path.join(CATALOGS);
        fs::create_dir_all(&catalogs).map_err(on(&catalogs, "make the directory"))?;
        let path = path.canonicalize().map_err(on(path, "resolve the path"))?;
        if let Some(parent) = path.parent() {
            flush(parent)?;
        }
        flush(&path)?;
        let lock_path = path.join("lock");
        let options = File::options().create(true).write(true).truncate(false).open(&lock_path);
        let lock = options.map_err(on(&lock_path, "open the lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StateError::InUse(path)),
            Err(TryLockError::Error(source)) => return Err(on(&lock_path, "lock")(source)),
        }
        let records = read(&path.join(STATE))?;
        let directory = Self { path, _lock: lock, records };
        directory.sweep();
        Ok(directory)
    }

    /// The records on disk.
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// Writes new records to disk. When this returns, either these or the old ones are there in
    /// full.
    ///
    /// # Errors
    ///
    /// When they cannot be written.
    pub fn write(&mut self, next: Records) -> Result<(), StateError> {
        if next == self.records {
            return Ok(());
        }
        let file = self.path.join(STATE);
        let text = document(&next).map_err(|source| on(&file, "write")(source.into()))?;
        self.keep_previous();
        if let Err(error) = replace(&self.path, STATE, text.as_bytes()) {
            // The new file may be in place and not flushed. The client is about to hear that
            // nothing changed, so the old records must be written again.
            if let Ok(before) = document(&self.records) {
                let _ = replace(&self.path, STATE, before.as_bytes());
            }
            return Err(error);
        }
        self.records = next;
        self.sweep();
        Ok(())
    }

    /// Stores a catalog, and returns the digest that names it. A catalog that is already stored is
    /// not written again.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn put_catalog(&self, items: impl Iterator<Item = ItemRecord>) -> Result<String, StateError> {
        let directory = self.path.join(CATALOGS);
        let mut text = Vec::new();
        for item in items {
            serde_json::to_writer(&mut text, &item).map_err(|error| on(&directory, "write")(error.into()))?;
            text.push(b'\n');
        }
        let sha256 = digest(&text);
        if self.read_catalog(&sha256).is_err() {
            replace(&directory, &catalog_name(&sha256), &text)?;
        }
        Ok(sha256)
    }

    /// The path of a catalog's file.
    pub fn catalog_path(&self, sha256: &str) -> PathBuf {
        self.path.join(CATALOGS).join(catalog_name(sha256))
    }

    /// Reads the lines of a catalog.
    ///
    /// # Errors
    ///
    /// When the file is missing, or its contents do not match the digest.
    pub fn read_catalog(&self, sha256: &str) -> Result<Vec<u8>, StateError> {
        let path = self.catalog_path(sha256);
        let text = read_bounded(&path, MAX_CATALOG_BYTES).map_err(on(&path, "read"))?;
        if digest(&text) == sha256 {
            return Ok(text);
        }
        Err(StateError::Damaged {
            path,
            why: "the contents of the catalog are not those that were stored".into(),
        })
    }

    /// Keeps the current file beside the new one, in case another program damages the new one. A
    /// link is free, and losing it does no harm.
    fn keep_previous(&self) {
        let (current, previous) = (self.path.join(STATE), self.path.join(PREVIOUS));
        let _ = fs::remove_file(&previous);
        let _ = fs::hard_link(current, previous);
    }

    /// Deletes catalogs that no record names, so that their number is bounded by the catalogs in
    /// memory.
    fn sweep(&self) {
        let named: HashSet<String> = self.records.catalogs().map(catalog_name).collect();
        let Ok(entries) = fs::read_dir(self.path.join(CATALOGS)) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let ours = name.strip_suffix(".jsonl").is_some_and(record::is_digest) || name.ends_with(".new");
            if ours
                && !named.contains(&*name)
                && let Err(error) = fs::remove_file(entry.path())
            {
                warn!(file = %entry.path().display(), %error, "cannot delete a catalog that is no longer kept");
            }
        }
    }
}

fn catalog_name(sha256: &str) -> String {
    format!("{sha256}.jsonl")
}

/// Converts an error of the system, with the path and the action.
fn on(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { path, action, source }
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digest_of(records: &Records) -> serde_json::Result<String> {
    serde_json::to_vec(records).map(|text| digest(&text))
}

fn document(records: &Records) -> serde_json::Result<String> {
    let document = Document {
        format: FORMAT.into(),
        version: VERSION,
        sha256: digest_of(records)?,
        state: records.clone(),
    };
    serde_json::to_string_pretty(&document).map(|text| text + "\n")
}

/// Reads the records of a file. Without a file, the records are empty.
fn read(path: &Path) -> Result<Records, StateError> {
    let text = match read_bounded(path, MAX_BYTES) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Records::default()),
        Err(error) => return Err(on(path, "read")(error)),
    };
    let damaged = |why: String| StateError::Damaged { path: path.to_owned(), why };
    let header: Header =
        serde_json::from_slice(&text).map_err(|error| damaged(format!("the file is damaged: {error}")))?;
    if header.format != FORMAT {
        return Err(damaged(format!("the file is not a state: its format is {:?}", header.format)));
    }
    if header.version > VERSION {
        return Err(StateError::Newer { path: path.to_owned(), version: header.version });
    }
    let document: Document =
        serde_json::from_slice(&text).map_err(|error| damaged(format!("the file is damaged: {error}")))?;
    let found = digest_of(&document.state).map_err(|error| damaged(error.to_string()))?;
    if document.version != VERSION || found != document.sha256 {
        return Err(damaged("the file is damaged: its checksum does not match its contents".into()));
    }
    document.state.check().map_err(damaged)?;
    Ok(document.state)
}

fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
}

/// Replaces a file of a directory. Afterwards it holds these bytes even if the machine crashes.
fn replace(directory: &Path, name: &str, bytes: &[u8]) -> Result<(), StateError> {
    let (path, fresh) = (directory.join(name), directory.join(format!("{name}.new")));
    let written = File::create(&fresh).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    if let Err(error) = written {
        let _ = fs::remove_file(&fresh);
        return Err(on(&fresh, "write")(error));
    }
    fs::rename(&fresh, &path).map_err(on(&path, "replace the file"))?;
    flush(directory)
}

fn flush(directory: &Path) -> Result<(), StateError> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(on(directory, "flush the directory"))
}

#[cfg(test)]
mod tests {
    use beamline_catalog::SidPart;

    use super::*;
    use crate::registry::state::{RecordedCatalog, RecordedVersion, Source};

    fn records(catalogs: &[&str]) -> Records {
        let mut records = Records::default();
        let source = Source::ModelRoot { directory: Some("v1".into()), catalog: None, convention: None };
        let catalogs: Vec<RecordedCatalog> = catalogs
            .iter()
            .map(|sha256| RecordedCatalog { version: sha256[..16].into(), sha256: (*sha256).into() })
            .collect();
        let serving = catalogs.last().map(|catalog| catalog.version.clone());
        let record = RecordedVersion { sha256: "a".repeat(64), source, catalogs, serving };
        records.put("shop", &"a".repeat(12), record);
        records.put_label("shop", "stable", &"a".repeat(12));
        records
    }

    fn item(id: u32) -> ItemRecord {
        ItemRecord {
            item_id: format!("item {id}"),
            sid: vec![SidPart::Code(id)],
            tags: vec!["a".into()],
            title: None,
        }
    }

    #[test]
    fn what_was_written_is_read_again_and_one_server_has_it() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("deep/state");
        let mut state = StateDirectory::open(&path).unwrap();
        assert_eq!(state.records(), &Records::default());
        assert!(matches!(StateDirectory::open(&path), Err(StateError::InUse(_))));
        state.write(records(&[])).unwrap();
        drop(state);
        assert_eq!(StateDirectory::open(&path).unwrap().records(), &records(&[]));
    }

    #[test]
    fn every_damage_is_refused_by_name_or_changes_nothing() {
        let place = tempfile::tempdir().unwrap();
        StateDirectory::open(place.path()).unwrap().write(records(&[])).unwrap();
        let file = place.path().join(STATE);
        let good = fs::read(&file).unwrap();
        let check = |bytes: &[u8], what: &str| {
            fs::write(&file, bytes).unwrap();
            match StateDirectory::open(place.path()) {
                // The damage was in white space or the like.
                Ok(state) => assert_eq!(state.records(), &records(&[]), "{what}"),
                Err(error @ (StateError::Damaged { .. } | StateError::Newer { .. })) => {
                    let text = error.to_string();
                    assert!(text.contains("state.json") && text.contains(". "), "{what}: {text}");
                }
                Err(other) => panic!("{what}: {other}"),
            }
        };
        for end in 0..good.len() {
            check(&good[..end], &format!("cut at {end}"));
            for bits in [1, 0x20, 0xff] {
                let mut bytes = good.clone();
                bytes[end] ^= bits;
                check(&bytes, &format!("byte {end} xor {bits}"));
            }
        }
        // A half-written file of a crash is ignored.
        fs::write(&file, &good).unwrap();
        fs::write(place.path().join("state.json.new"), &good[..good.len() / 2]).unwrap();
        assert_eq!(StateDirectory::open(place.path()).unwrap().records(), &records(&[]));
        // The state before the last change is available.
        let mut state = StateDirectory::open(place.path()).unwrap();
        state.write(Records::default()).unwrap();
        assert_eq!(read(&place.path().join(PREVIOUS)).unwrap(), records(&[]));
    }

    #[test]
    fn a_change_that_cannot_be_written_changes_nothing() {
        let place = tempfile::tempdir().unwrap();
        let mut state = StateDirectory::open(place.path()).unwrap();
        state.write(records(&[])).unwrap();
        // A directory in the place of the new file: no user, not even root, can write there.
        let fresh = place.path().join("state.json.new");
        fs::create_dir(&fresh).unwrap();
        assert!(matches!(state.write(Records::default()), Err(StateError::Io { .. })));
        assert_eq!(state.records(), &records(&[]));
        drop(state);
        fs::remove_dir(&fresh).unwrap();
        assert_eq!(StateDirectory::open(place.path()).unwrap().records(), &records(&[]));
    }

    #[test]
    fn catalogs_are_addressed_by_content_checked_and_swept() {
        let place = tempfile::tempdir().unwrap();
        let mut state = StateDirectory::open(place.path()).unwrap();
        let first = state.put_catalog([item(1)].into_iter()).unwrap();
        let second = state.put_catalog([item(1), item(2)].into_iter()).unwrap();
        assert_eq!(state.put_catalog([item(1)].into_iter()).unwrap(), first);
        state.write(records(&[&first, &second])).unwrap();
        assert_eq!(state.read_catalog(&second).unwrap().iter().filter(|byte| **byte == b'\n').count(), 2);
        state.write(records(&[&second])).unwrap();
        assert!(matches!(state.read_catalog(&first), Err(StateError::Io { .. })), "nobody names it");
        fs::write(state.catalog_path(&second), "{}").unwrap();
        assert!(matches!(state.read_catalog(&second), Err(StateError::Damaged { .. })));
        // A damaged file is written anew.
        assert_eq!(state.put_catalog([item(1), item(2)].into_iter()).unwrap(), second);
        assert!(state.read_catalog(&second).is_ok());
    }
}
