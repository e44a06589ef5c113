//! What can go wrong in this crate, in words for the person who brought the checkpoint.
//!
//! Invariant: a message prints no control character, whatever the names in a file hold.

use std::fmt::{self, Display, Write};
use std::path::PathBuf;

use beamline_compute::cuda::device::DeviceError;
use beamline_compute::error::ComputeError;

use crate::escaped::Escaping;

/// Problems that a message names.
const NAMED: usize = 8;

/// Why a checkpoint cannot be served.
#[derive(Debug)]
pub enum ModelError {
    /// A file is missing or unreadable.
    Read {
        /// Path of the file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The directory holds the wrong files.
    Directory(String),
    /// config.json cannot be understood or asks for something this build cannot do.
    Config(String),
    /// A safetensors file or its index is damaged.
    Tensors {
        /// File name within the checkpoint.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is another one than when it was opened.
    Changed {
        /// File name within the checkpoint.
        file: String,
        /// How that was noticed.
        reason: String,
    },
    /// The tensors do not fit the configuration. Holds every wrong tensor; the message names the first
    /// few.
    Mismatch(Vec<String>),
    /// A weight is NaN or infinite.
    NotFinite {
        /// Name of the tensor.
        name: String,
        /// How many values.
        count: usize,
        /// Flat index of the first one.
        first: usize,
    },
    /// Weights hold nothing but zeros, though a trained model has none such. Names them.
    Zeros(Vec<String>),
    /// tokenizer.json is damaged.
    Tokenizer(String),
    /// The convention is malformed or does not fit the tokenizer.
    Convention(String),
    /// The page pool or a workspace cannot be had.
    Limit(String),
    /// A tensor operation failed that validation should have made impossible.
    Internal(String),
}

impl Display for ModelError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = Escaping(formatter);
        match self {
            Self::Read { path, source } => write!(out, "cannot read {}: {source}", path.display()),
            Self::Directory(reason) => write!(out, "{reason}"),
            Self::Config(reason) => write!(out, "config.json: {reason}"),
            Self::Tensors { file, reason } => write!(out, "{file}: {reason}"),
            Self::Changed { file, reason } => {
                write!(
                    out,
                    "{file} changed while it was loaded: {reason}; write a checkpoint beside the old one and load it when it is whole"
                )
            }
            Self::Mismatch(problems) => {
                write!(out, "the tensors do not fit config.json: {}", first_few(problems))
            }
            Self::NotFinite { name, count, first } => write!(
                out,
                "tensor {name} holds NaN or infinity: {count} of its values are not finite, the first at index {first}"
            ),
            Self::Zeros(names) => write!(
                out,
                "tensors hold nothing but zeros, as after a copy that was interrupted: {}; copy the weights again",
                first_few(names)
            ),
            Self::Tokenizer(reason) => write!(out, "tokenizer.json: {reason}"),
            Self::Convention(reason) => write!(out, "convention: {reason}"),
            Self::Limit(reason) => write!(out, "limits: {reason}"),
            Self::Internal(reason) => write!(out, "internal: {reason}. This is a bug."),
        }
    }
}

/// The message of the system is part of the text: a printed chain of causes would hold it twice.
impl std::error::Error for ModelError {}

/// One wrong size in config.json makes every tensor wrong; a message of all of them hides what it says.
fn first_few(problems: &[String]) -> String {
    let named = problems.get(..NAMED).unwrap_or(problems).join("; ");
    match problems.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named}; and {more} more (`beamline inspect` lists all)"),
    }
}

impl From<ComputeError> for ModelError {
    fn from(error: ComputeError) -> Self {
        match error {
            ComputeError::Limit(reason) => Self::Limit(reason),
            ComputeError::Internal(reason) => Self::Internal(reason),
        }
    }
}

impl From<DeviceError> for ModelError {
    fn from(error: DeviceError) -> Self {
        ComputeError::from(error).into()
    }
}

impl From<candle_core::Error> for ModelError {
    fn from(error: candle_core::Error) -> Self {
        Self::Internal(error.to_string())
    }
}
