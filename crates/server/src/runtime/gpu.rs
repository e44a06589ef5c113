//! Models on a graphics processor: opening it, how large everything is there, and the executor.
//!
//! Invariant: nothing here is reached unless the settings name a device.

use std::sync::Arc;

use beamline_catalog::Catalog;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::cuda::beams::MOST_BEAMS;
use beamline_model::cuda::device::Device;
use beamline_model::cuda::executor::DeviceExecutor;
use beamline_model::cuda::kernels;
use beamline_model::cuda::pages::DevicePages;
use beamline_model::cuda::qwen::DeviceQwen;
use beamline_model::error::ModelError;

use super::{Files, LoadError, Scale};
use crate::settings::{ByteSize, DeviceChoice};

/// Memory that is left to activations, logits, tries and the driver.
const RESERVED: usize = 3 << 30;

/// Opens a graphics processor.
#[cfg(feature = "cuda")]
pub(super) fn open(device: DeviceChoice, number: usize) -> Result<Arc<dyn Device>, LoadError> {
    let fail = |error: beamline_model::cuda::device::DeviceError| LoadError::Device {
        device,
        why: error.to_string(),
    };
    beamline_model::cuda::gpu::Gpu::open(number).map_err(fail)
}

/// There is none to open.
#[cfg(not(feature = "cuda"))]
pub(super) fn open(device: DeviceChoice, _number: usize) -> Result<Arc<dyn Device>, LoadError> {
    let why = "this binary was built without CUDA; build with `--features cuda`".into();
    Err(LoadError::Device { device, why })
}

/// Bytes of a page, and at most of the weights; an error if the kernels cannot run this model.
pub(super) fn sizes(
    checkpoint: &Checkpoint,
    positions: usize,
    steps: usize,
    beams: usize,
) -> Result<(usize, usize), LoadError> {
    let config = checkpoint.config();
    if beams > MOST_BEAMS {
        return Err(LoadError::Limits(format!("max-beam-width is {beams}: at most {MOST_BEAMS} on CUDA")));
    }
    let padded = kernels::padded_dim(config.head_dim)
        .ok_or_else(|| LoadError::Limits(format!("head_dim {}: not implemented on CUDA", config.head_dim)))?;
    if steps > kernels::MOST_ANCESTORS {
        return Err(LoadError::Limits(format!(
            "{steps} generated tokens: at most {} on CUDA",
            kernels::MOST_ANCESTORS
        )));
    }
    let rotary = positions.saturating_mul(config.head_dim).saturating_mul(4);
    let weights = checkpoint.tensors().parameters().saturating_mul(2).saturating_add(rotary);
    Ok((DevicePages::bytes_per_page(config.layers, config.kv_heads, [padded; 2]), weights))
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

/// Copies weights and trie, and allocates the pages.
pub(super) fn executor(
    gpu: &Arc<dyn Device>,
    files: &Files,
    checkpoint: &Checkpoint,
    positions: usize,
    pages: usize,
    catalog: &Arc<Catalog>,
) -> Result<DeviceExecutor, LoadError> {
    let blame = |source: ModelError| files.blame(source);
    let model = DeviceQwen::load(gpu, checkpoint, positions).map_err(blame)?;
    let mut executor = DeviceExecutor::new(Arc::new(model), pages).map_err(|error| blame(error.into()))?;
    executor.prepare(catalog).map_err(|error| blame(error.into()))?;
    Ok(executor)
}
