//! The acknowledged state of a server, kept on disk: which versions are loaded, where labels point,
//! which catalogs serve.
//!
//! | module | one idea |
//! | --- | --- |
//! | [`record`] | the state as plain data, and how changes affect it |
//! | [`directory`] | the directory that holds it: lock, atomic replacement, checksums |
//!
//! ```text
//! DIR/lock                     held by the one server that uses the directory
//! DIR/state.json               versions, labels, and names of catalogs: human-readable, checksummed
//! DIR/state.previous.json      the state before the last change
//! DIR/catalogs/<sha256>.jsonl  catalogs that came over HTTP, addressed by content
//! ```
//!
//! Invariants: a change is on disk before it is acknowledged; the file on disk is always that of
//! before a change or that of after it; a damaged file is refused by name, never guessed at.

mod directory;
mod record;

pub use directory::{StateDirectory, StateError};
pub use record::{RecordedCatalog, RecordedModel, RecordedVersion, Records, Source};

use crate::error::Error;

/// A change that could not be written. The cause is logged for the operator.
pub(super) fn not_kept(cause: StateError) -> Error {
    tracing::error!(%cause, "a change was refused: it could not be written to the state directory");
    Error::NotKept
}
