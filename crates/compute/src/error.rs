//! What can go wrong between a family and a processor.

use crate::cuda::device::DeviceError;

/// Why a processor cannot do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ComputeError {
    /// Memory or threads cannot be had.
    #[error("{0}")]
    Limit(String),
    /// A caller broke a rule of this crate.
    #[error("{0}")]
    Internal(String),
}

impl From<candle_core::Error> for ComputeError {
    fn from(error: candle_core::Error) -> Self {
        Self::Internal(error.to_string())
    }
}

impl From<DeviceError> for ComputeError {
    fn from(error: DeviceError) -> Self {
        Self::Limit(error.to_string())
    }
}
