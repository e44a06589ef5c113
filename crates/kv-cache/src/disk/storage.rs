//! A file, or what takes its place in tests.

use std::{fs::File, io, os::unix::fs::FileExt};

/// Bytes that are read and written at positions, by several threads.
pub trait Storage: Send + Sync {
    /// How many bytes there are.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    fn len(&self) -> io::Result<u64>;

    /// Whether there are none.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    fn is_empty(&self) -> io::Result<bool> {
        self.len().map(|len| len == 0)
    }

    /// Reads all of `to`.
    ///
    /// # Errors
    ///
    /// When the system refuses; [`io::ErrorKind::UnexpectedEof`] when there are fewer bytes.
    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()>;

    /// Writes all of `from`, beyond the end too.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()>;

    /// Cuts, or fills up with zeros.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    fn set_len(&self, len: u64) -> io::Result<()>;
}

impl Storage for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(to, at)
    }

    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.write_all_at(from, at)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }
}
