//! A graphics processor: opening it, and how much of its memory pages take.
//!
//! Invariant: nothing here is reached unless the settings name a device.

use std::sync::Arc;

use beamline_compute::cuda::device::Device;

use super::{LoadError, Scale};
use crate::settings::{ByteSize, DeviceChoice};

/// Memory that is left to activations, logits, tries and the driver.
const RESERVED: usize = 3 << 30;

/// Opens a graphics processor.
#[cfg(feature = "cuda")]
pub(super) fn open(device: DeviceChoice, number: usize) -> Result<Arc<dyn Device>, LoadError> {
    let fail = |error: beamline_compute::cuda::device::DeviceError| LoadError::Device {
        device,
        why: error.to_string(),
    };
    beamline_compute::cuda::gpu::Gpu::open(number).map_err(fail)
}

/// There is none to open.
#[cfg(not(feature = "cuda"))]
pub(super) fn open(device: DeviceChoice, _number: usize) -> Result<Arc<dyn Device>, LoadError> {
    let why = "this binary was built without CUDA; build with `--features cuda`".into();
    Err(LoadError::Device { device, why })
}

/// Most of what is free beside the weights.
pub(super) fn kv_memory(gpu: &dyn Device, weights: usize, scale: Scale) -> Option<ByteSize> {
    match scale {
        Scale::OneRequest => None,
        Scale::Server => {
            let left = gpu.free_bytes().saturating_sub(weights).saturating_sub(RESERVED);
            Some(ByteSize(left / 10 * 9))
        }
    }
}
