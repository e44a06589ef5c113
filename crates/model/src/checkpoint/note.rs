//! What a checkpoint's author should know and what keeps nobody from serving it.
//!
//! Place in the flow: collected while a checkpoint is opened and a convention is bound. `serve` logs
//! each as a warning; `inspect` prints them below the problems.

use std::fmt::{self, Display, Write};

use crate::escaped::Escaping;

/// Something that was noticed in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// A field that is not known and that nobody reads.
    UnknownField {
        /// File that holds the field.
        file: &'static str,
        /// Path of the field.
        field: String,
    },
    /// A field whose value is read by nobody, or not as it may be meant.
    Field {
        /// File that holds the field.
        file: &'static str,
        /// Path of the field.
        field: String,
        /// What is done with it.
        what: String,
    },
    /// A file that lies in the directory and is not read.
    UnreadFile {
        /// Name of the file.
        name: String,
        /// What is read instead.
        what: String,
    },
    /// Something about the values of tensors.
    Tensors(String),
    /// Something about the prompt, or the tokens that it is made of.
    Prompt(String),
}

impl Display for Note {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = Escaping(formatter);
        match self {
            Self::UnknownField { file, field } => {
                write!(out, "{file}: {field} is not known, so it changes nothing here")
            }
            Self::Field { file, field, what } => write!(out, "{file}: {field}: {what}"),
            Self::UnreadFile { name, what } => write!(out, "{name} is not read: {what}"),
            Self::Tensors(what) | Self::Prompt(what) => out.write_str(what),
        }
    }
}
