//! Files of a checkpoint, opened and read without trusting them.
//!
//! Invariants: only regular files are opened, so that a pipe or a device cannot hang a load. Of each
//! file, at most the limit of its kind is read, whatever its size says.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::error::ModelError;

/// Most bytes of a config.json; real ones have a few kilobytes.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Most bytes of a convention.json: prompts of more text than any context holds are a mistake.
pub const MAX_CONVENTION_BYTES: u64 = 1 << 20;
/// Most bytes of an index of shards.
pub(super) const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Most bytes of a tokenizer.json; the largest real ones are a quarter of this.
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 128 << 20;

/// How Git LFS begins the file that stands for one it has not fetched.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// Opens a regular file.
pub(super) fn open(path: &Path) -> Result<File, ModelError> {
    let read = |source| ModelError::Read { path: path.to_owned(), source };
    // Before it is opened: opening a pipe waits for somebody to write to it.
    if !std::fs::metadata(path).map_err(read)?.is_file() {
        return Err(read(io::Error::other("it is not a regular file")));
    }
    File::open(path).map_err(read)
}

/// Reads a text file of at most `limit` bytes.
///
/// # Errors
///
/// When it is missing, no regular file, larger than that, or not UTF-8.
pub fn read_text(path: &Path, limit: u64) -> Result<String, ModelError> {
    let read = |source| ModelError::Read { path: path.to_owned(), source };
    let file = open(path)?;
    let size = file.metadata().map_err(read)?.len();
    let mut bytes = Vec::new();
    if size <= limit {
        // One byte more than may be: a file can grow, and those of /proc say that they are empty.
        file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(read)?;
    }
    if size > limit || bytes.len() as u64 > limit {
        let size = size.max(bytes.len() as u64);
        return Err(read(io::Error::other(format!("it has {size} bytes, more than the limit of {limit}"))));
    }
    if let Some(reason) = lfs_pointer(&bytes) {
        return Err(read(io::Error::other(reason)));
    }
    String::from_utf8(bytes).map_err(|error| read(io::Error::other(format!("it is not UTF-8: {error}"))))
}

/// What to do about a file that Git LFS has not fetched, if this is how one begins.
pub(super) fn lfs_pointer(start: &[u8]) -> Option<&'static str> {
    let reason = "it is a Git LFS pointer, not the file itself; run `git lfs pull`";
    start.starts_with(LFS_POINTER).then_some(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_large_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        let file = File::create(&path).unwrap();
        // Sparse: it takes no space.
        file.set_len(1 << 40).unwrap();
        let error = read_text(&path, 100).unwrap_err().to_string();
        assert!(error.contains("1099511627776 bytes, more than the limit of 100"), "{error}");
        std::fs::write(&path, [b'x'; 101]).unwrap();
        assert!(read_text(&path, 100).unwrap_err().to_string().contains("101 bytes"));
        assert_eq!(read_text(&path, 101).unwrap().len(), 101);
    }

    #[test]
    fn only_regular_files_are_opened() {
        for path in ["/dev/zero", "/", "/nonesuch"] {
            assert!(read_text(Path::new(path), 100).is_err(), "{path}");
        }
    }

    #[test]
    fn a_pointer_of_git_lfs_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokenizer.json");
        std::fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n").unwrap();
        let error = read_text(&path, 1000).unwrap_err().to_string();
        assert!(error.contains("git lfs pull"), "{error}");
    }
}
