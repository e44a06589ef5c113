//! Models on a graphics processor: opening it, how large everything is there, and the executor.
//!
//! Invariant: nothing here is reached unless the settings name a device.

use std::sync::Arc;

use beamline_catalog::Catalog;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::cpu::Cpu;
use beamline_model::cuda::beams::MOST_BEAMS;
use beamline_model::cuda::device::Device;
use beamline_model::cuda::executor::DeviceExecutor;
use beamline_model::cuda::hstu::executor::HstuDeviceExecutor;
use beamline_model::cuda::hstu::model::DeviceHstu;
use beamline_model::cuda::hstu::stack::DeviceStack;
use beamline_model::cuda::kernels;
use beamline_model::cuda::pages::DevicePages;
use beamline_model::cuda::qwen::DeviceQwen;
use beamline_model::error::ModelError;
use beamline_model::families::hstu::config::{HstuConfig, Purpose};

use super::{Bytes, Files, LoadError, Scale};
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

fn check_beams(beams: usize) -> Result<(), LoadError> {
    match beams > MOST_BEAMS {
        true => Err(LoadError::Limits(format!("max-beam-width is {beams}: at most {MOST_BEAMS} on CUDA"))),
        false => Ok(()),
    }
}

/// Bytes of a page, and at most of the weights; an error if the kernels cannot run this model.
pub(super) fn sizes(
    checkpoint: &Checkpoint,
    positions: usize,
    steps: usize,
    beams: usize,
) -> Result<Bytes, LoadError> {
    let config = checkpoint.config();
    check_beams(beams)?;
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
    let page = DevicePages::bytes_per_page(config.layers, config.kv_heads, [padded; 2]);
    Ok(Bytes { page, weights, beside: 0 })
}

/// The same of an HSTU model. `beams` is also the most items of an answer.
pub(super) fn hstu_sizes(
    files: &Files,
    checkpoint: &Checkpoint<HstuConfig>,
    beams: usize,
) -> Result<Bytes, LoadError> {
    let config = checkpoint.config();
    if config.purpose() != Purpose::Rank {
        check_beams(beams)?;
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

/// The same for an HSTU model. What of it is left to the host runs on `cpu`.
pub(super) fn hstu_executor(
    gpu: &Arc<dyn Device>,
    files: &Files,
    checkpoint: &Checkpoint<HstuConfig>,
    cpu: &Arc<Cpu>,
    pages: usize,
    catalog: &Arc<Catalog>,
) -> Result<HstuDeviceExecutor, LoadError> {
    let blame = |source: ModelError| files.blame(source);
    let model = Arc::new(DeviceHstu::load(gpu, checkpoint, cpu).map_err(blame)?);
    let executor = HstuDeviceExecutor::new(model, Arc::clone(cpu), pages);
    let mut executor = executor.map_err(|error| blame(error.into()))?;
    // A model that ranks asks nothing of it.
    if checkpoint.config().purpose() != Purpose::Rank {
        executor.prepare(catalog).map_err(|error| blame(error.into()))?;
    }
    Ok(executor)
}
