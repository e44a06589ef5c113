//! Where inputs lie.

use std::io;
use std::path::{Path, PathBuf};

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The corpus of a target. An input that failed once stays here, so that every test run tries it again.
pub fn folder(target: &str) -> PathBuf {
    root().join("fuzz/corpus").join(target)
}

/// The contents of a folder's files, in order of their names; nothing where there is no folder.
///
/// # Errors
///
/// When a file cannot be read.
pub fn files(folder: &Path) -> io::Result<Vec<Vec<u8>>> {
    paths(folder)?.iter().map(std::fs::read).collect()
}

/// A folder's files, in order of their names; nothing where there is no folder.
///
/// # Errors
///
/// When the folder cannot be read.
pub fn paths(folder: &Path) -> io::Result<Vec<PathBuf>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let mut paths = entries.collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}
