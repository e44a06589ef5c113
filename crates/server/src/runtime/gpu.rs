//! A graphics processor: opening it, and what HSTU models take and run there.
//!
//! Invariant: nothing here is reached unless the settings name a device.

use std::sync::Arc;

use beamline_catalog::Catalog;
use beamline_compute::cpu::Cpu;
use beamline_compute::cuda::device::Device;
use beamline_compute::cuda::pages::DevicePages;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::cuda::beams::check_beams;
use beamline_model::cuda::hstu::model::DeviceHstu;
use beamline_model::cuda::hstu::stack::DeviceStack;
use beamline_model::error::ModelError;
use beamline_model::executor::{Executor, ModelExecutor};
use beamline_model::families::hstu::config::{HstuConfig, Purpose};

use super::{Bytes, Files, LoadError, Scale};
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

/// Bytes of a page, and at most of the weights, of an HSTU model; an error if the kernels cannot run it. `beams` is also the most items of an answer.
pub(super) fn hstu_sizes(
    files: &Files,
    checkpoint: &Checkpoint<HstuConfig>,
    beams: usize,
) -> Result<Bytes, LoadError> {
    let config = checkpoint.config();
    if config.purpose() != Purpose::Rank {
        check_beams(beams).map_err(|source| files.blame(source))?;
    }
    let widths = DeviceStack::check(&config.stack).map_err(|source| files.blame(source))?;
    let [weights, beside] = DeviceHstu::bytes(config);
    let page = DevicePages::bytes_per_page(config.stack.layers, config.stack.heads, widths);
    Ok(Bytes { page, weights, beside })
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

/// Copies weights and trie of an HSTU model, and allocates the pages. What of it is left to the host runs on `cpu`.
pub(super) fn hstu_executor(
    gpu: &Arc<dyn Device>,
    files: &Files,
    checkpoint: &Checkpoint<HstuConfig>,
    cpu: &Arc<Cpu>,
    pages: usize,
    catalog: &Arc<Catalog>,
) -> Result<Box<dyn ModelExecutor>, LoadError> {
    let blame = |source: ModelError| files.blame(source);
    let model = Arc::new(DeviceHstu::load(gpu, checkpoint, cpu).map_err(blame)?);
    let executor = Executor::on_device(model, pages);
    let mut executor = executor.map_err(|error| blame(error.into()))?;
    // A model that ranks asks nothing of it.
    if checkpoint.config().purpose() != Purpose::Rank {
        executor.prepare(catalog).map_err(|error| blame(error.into()))?;
    }
    Ok(Box::new(executor))
}
