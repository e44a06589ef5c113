//! The admin key, which a client must send to change models and catalogs.
//!
//! Invariants: only the sha256 of the key is kept, so that the key cannot be logged. The comparison
//! with another key takes a time that does not depend on where they differ.

use std::fmt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::SettingsError;

/// The variable that holds the key itself, for users without a file. There is no flag for it,
/// because every user of the machine can see flags.
pub(super) const VARIABLE: &str = "BEAMLINE_ADMIN_KEY";
/// Least length of a key, in bytes. Shorter keys can be guessed.
const LEAST_BYTES: usize = 16;
/// Largest key file, in bytes. A longer file is not a key.
const MOST_BYTES: u64 = 4096;

/// An admin key, as its digest.
#[derive(Clone)]
pub struct AdminKey {
    digest: [u8; 32],
}

impl AdminKey {
    /// Reads the key from a file, else from the environment, if there is one.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or the key is too short.
    pub fn read(file: Option<&Path>) -> Result<Option<Self>, SettingsError> {
        match text(file)? {
            Some(text) => Self::new(text.trim()).map(Some),
            None => Ok(None),
        }
    }

    /// A key with this text.
    ///
    /// # Errors
    ///
    /// When it is too short.
    pub fn new(text: &str) -> Result<Self, SettingsError> {
        if text.len() < LEAST_BYTES {
            return Err(SettingsError::Key(format!(
                "has {} characters and needs at least {LEAST_BYTES}: make one with `openssl rand -hex 32`",
                text.chars().count()
            )));
        }
        Ok(Self { digest: Sha256::digest(text).into() })
    }

    /// Whether a client's key is this one. The full digests are compared, so the time says nothing
    /// about the key.
    pub fn is(&self, other: &str) -> bool {
        let other: [u8; 32] = Sha256::digest(other).into();
        let differ = self.digest.iter().zip(&other).fold(0_u8, |differ, (a, b)| differ | (a ^ b));
        std::hint::black_box(differ) == 0
    }
}

impl fmt::Debug for AdminKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdminKey")
    }
}

/// The text of the file, else that of the variable. Clients use this, too.
pub(crate) fn text(file: Option<&Path>) -> Result<Option<String>, SettingsError> {
    let Some(path) = file else { return Ok(std::env::var(VARIABLE).ok()) };
    let read = |source| SettingsError::Read { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(read)?.len() > MOST_BYTES {
        return Err(SettingsError::Key(format!("must have at most {MOST_BYTES} bytes")));
    }
    std::fs::read_to_string(path).map(Some).map_err(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_itself_alone_and_shown_to_nobody() {
        let key = AdminKey::new("0123456789abcdef").unwrap();
        assert!(key.is("0123456789abcdef"));
        assert!(!key.is("0123456789abcdeg") && !key.is("") && !key.is("0123456789abcdef "));
        assert_eq!(format!("{key:?}"), "AdminKey");
        assert!(AdminKey::new("short").is_err());
    }

    #[test]
    fn a_line_end_in_the_file_is_not_of_the_key() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, "0123456789abcdef\n").unwrap();
        assert!(AdminKey::read(Some(&path)).unwrap().unwrap().is("0123456789abcdef"));
        assert!(AdminKey::read(Some(&directory.path().join("none"))).is_err());
    }
}
