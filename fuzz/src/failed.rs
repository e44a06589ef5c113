//! Inputs that failed: where they are kept until somebody has looked at them.
//!
//! A panic is caught and its input kept. A stack that overflows, or memory that the system refuses, ends
//! the process at once. So the current input lies in a file of its own, which is then left behind.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::corpus;

/// The file of the input that is being run.
const CURRENT: &str = "current";

/// Where `cargo xtask fuzz` keeps inputs.
fn folder(target: &str) -> PathBuf {
    corpus::root().join("target/fuzz").join(target)
}

/// Inputs on which a target has failed, with their files: those of `cargo xtask fuzz` and those of
/// cargo-fuzz.
///
/// # Errors
///
/// When a file cannot be read.
pub fn inputs(target: &str) -> io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let artifacts = corpus::root().join("fuzz/libfuzzer/artifacts").join(target);
    let mut found = Vec::new();
    for path in [folder(target), artifacts].iter().map(|folder| corpus::paths(folder)) {
        for path in path? {
            found.push((path.clone(), std::fs::read(path)?));
        }
    }
    Ok(found)
}

/// Keeps a failing input. Gives its file.
///
/// # Errors
///
/// When it cannot be written.
pub fn keep(target: &str, input: &[u8]) -> Result<PathBuf> {
    keep_in(&folder(target), input)
}

fn keep_in(folder: &Path, input: &[u8]) -> Result<PathBuf> {
    let digest = Sha256::digest(input);
    let name: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let place = folder.join(name);
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&place, input))
        .with_context(|| format!("cannot write {}", place.display()))?;
    Ok(place)
}

/// The input that is being run, in a file that is left behind when the process ends while it runs.
#[derive(Debug)]
pub struct Current {
    file: File,
    path: PathBuf,
    left_behind: Option<PathBuf>,
}

impl Current {
    /// Of a target. What an earlier run left behind is kept under another name.
    ///
    /// # Errors
    ///
    /// When its file cannot be written.
    pub fn of(target: &str) -> Result<Self> {
        Self::within(&folder(target))
    }

    fn within(folder: &Path) -> Result<Self> {
        let path = folder.join(CURRENT);
        let left_behind = match std::fs::read(&path) {
            Ok(input) => Some(keep_in(folder, &input)?),
            Err(_) => None,
        };
        let create = || std::fs::create_dir_all(folder).and_then(|()| File::create(&path));
        let file = create().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { file, path, left_behind })
    }

    /// The input during which an earlier run ended.
    pub fn left_behind(&self) -> Option<&Path> {
        self.left_behind.as_deref()
    }

    /// Writes the input that is run next.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn set(&self, input: &[u8]) -> Result<()> {
        let write = self.file.write_all_at(input, 0).and_then(|()| self.file.set_len(input.len() as u64));
        write.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        // What failed in an orderly way was kept.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_input_of_a_process_that_was_ended_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let at = |folder: &tempfile::TempDir| Current::within(folder.path()).unwrap();
        let first = at(&folder);
        assert_eq!(first.left_behind(), None);
        first.set(b"a longer input").unwrap();
        first.set(b"the last").unwrap();
        // As when the process ends without another word.
        std::mem::forget(first);
        let second = at(&folder);
        assert_eq!(std::fs::read(second.left_behind().unwrap()).unwrap(), b"the last");
        drop(second);
        assert_eq!(at(&folder).left_behind(), None, "a run that came to its end leaves nothing behind");
    }
}
