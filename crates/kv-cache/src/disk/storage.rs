//! A file, or what takes its place in tests.

use std::{fs::File, io, os::unix::fs::FileExt};

/// Bytes that several threads read and write at given positions.
pub trait Storage: Send + Sync {
    /// Number of bytes.
    ///
    /// # Errors
    ///
    /// When the operating system reports an error.
    fn len(&self) -> io::Result<u64>;

    /// Whether there are no bytes.
    ///
    /// # Errors
    ///
    /// When the operating system reports an error.
    fn is_empty(&self) -> io::Result<bool> {
        self.len().map(|len| len == 0)
    }

    /// Fills `to` with the bytes from position `at`.
    ///
    /// # Errors
    ///
    /// When the operating system reports an error; [`io::ErrorKind::UnexpectedEof`] when there are
    /// fewer bytes.
    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()>;

    /// Writes all of `from` at position `at`, beyond the end if need be.
    ///
    /// # Errors
    ///
    /// When the operating system reports an error.
    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()>;

    /// Sets the number of bytes: cuts them, or fills up with zeros.
    ///
    /// # Errors
    ///
    /// When the operating system reports an error.
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
