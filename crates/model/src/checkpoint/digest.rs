//! The identity of a checkpoint: sha256 over the sorted lines `name sha256(content)` of its files, in
//! hexadecimal.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use sha2::{Digest, Sha256};

/// What was read so far, file by file.
#[derive(Debug, Default)]
pub(super) struct FileDigests(BTreeMap<String, String>);

impl FileDigests {
    /// Adds a file by its content.
    pub(super) fn add(&mut self, name: &str, content: &[u8]) {
        self.add_hash(name, &Sha256::digest(content));
    }

    /// Adds a file by the sha256 of its content.
    pub(super) fn add_hash(&mut self, name: &str, hash: &[u8]) {
        self.0.insert(name.to_owned(), hex(hash));
    }

    /// The digest over all files.
    pub(super) fn digest(&self) -> String {
        let lines = self.0.iter().fold(String::new(), |mut lines, (name, hash)| {
            let _ = writeln!(lines, "{name} {hash}");
            lines
        });
        hex(&Sha256::digest(lines.as_bytes()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
