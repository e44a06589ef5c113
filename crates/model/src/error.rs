//! What can go wrong in this crate, in words for the person who brought the checkpoint.

use std::path::PathBuf;

/// Problems that a message names.
const NAMED: usize = 8;

/// Why a checkpoint cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file is missing or unreadable.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// config.json cannot be understood or asks for something this build cannot do.
    #[error("config.json: {0}")]
    Config(String),
    /// A safetensors file or its index is damaged.
    #[error("{file}: {reason}")]
    Tensors {
        /// File name within the checkpoint.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The tensors do not fit the configuration. Holds every tensor that is wrong; the message names the first few.
    #[error("the tensors do not fit config.json: {}", first_few(.0))]
    Mismatch(Vec<String>),
    /// A weight is NaN or infinite.
    #[error(
        "tensor {name} holds NaN or infinity: {count} of its values are not finite, the first at index {first}"
    )]
    NotFinite {
        /// Tensor.
        name: String,
        /// How many values.
        count: usize,
        /// Flat index of the first one.
        first: usize,
    },
    /// tokenizer.json is damaged.
    #[error("tokenizer.json: {0}")]
    Tokenizer(String),
    /// The convention is malformed or does not fit the tokenizer.
    #[error("convention: {0}")]
    Convention(String),
    /// The page pool or a workspace cannot be had.
    #[error("limits: {0}")]
    Limit(String),
    /// A tensor operation failed that validation should have made impossible.
    #[error("internal: {0}. This is a bug.")]
    Internal(String),
}

/// One wrong size in config.json makes every tensor wrong; a message of all of them hides what it says.
fn first_few(problems: &[String]) -> String {
    let named = problems.get(..NAMED).unwrap_or(problems).join("; ");
    match problems.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named}; and {more} more (`beamline inspect` lists all)"),
    }
}

impl From<candle_core::Error> for ModelError {
    fn from(error: candle_core::Error) -> Self {
        Self::Internal(error.to_string())
    }
}
