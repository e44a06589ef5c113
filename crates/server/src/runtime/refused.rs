//! What a client is told of a checkpoint that was refused.

use beamline_model::error::ModelError;

use super::LoadError;
use crate::error::{Error, Refused};

impl LoadError {
    /// The same for a client. `redact` removes the paths of this machine from a text.
    pub fn for_client(&self, redact: impl Fn(&str) -> String) -> Error {
        let why = match self {
            Self::Model { source, .. } => match source {
                ModelError::Read { .. } => Refused::Unreadable,
                ModelError::Tensors { .. } | ModelError::Changed { .. } | ModelError::Zeros(_) => {
                    Refused::Damaged
                }
                ModelError::Config(_) | ModelError::Directory(_) => Refused::Unsupported,
                ModelError::Mismatch(_) => Refused::Mismatch,
                ModelError::NotFinite { .. } => Refused::NotFinite,
                ModelError::Tokenizer(_) | ModelError::Convention(_) => Refused::Convention,
                ModelError::Limit(_) => Refused::Limits,
                ModelError::Internal(_) => return Error::internal(self),
            },
            Self::Panicked => Refused::Damaged,
            Self::Layout { .. } => Refused::Unreadable,
            Self::NoConvention(_) => Refused::Convention,
            Self::Catalog { .. } | Self::NoCatalog { .. } | Self::Depth { .. } => Refused::Catalog,
            // These errors are temporary and not a fault of the model.
            Self::Probe(error @ (Error::Overloaded | Error::Backlog { .. } | Error::Draining)) => {
                return error.clone();
            }
            Self::Limits(_) => Refused::Limits,
            Self::Device { .. } => Refused::Unsupported,
            Self::Memory(_) => Refused::Memory,
            Self::Probe(_) | Self::WrongAnswer(_) => Refused::Probe,
            Self::NotThere(_) => Refused::Unreadable,
            Self::Changed { .. } => Refused::Mismatch,
            Self::Settings(_) | Self::Engine(_) | Self::State(_) | Self::Disk(_) => {
                return Error::internal(self);
            }
        };
        Error::Refused { why, message: redact(&self.to_string()) }
    }
}
