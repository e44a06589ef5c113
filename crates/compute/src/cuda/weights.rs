//! Weights on their way to the device: matrices in bf16, vectors in single precision.
//!
//! Place in the flow: the families load their tensors through this, from the host's single precision.

use std::sync::Arc;

use half::bf16;

use super::device::{Device, Memory};
use crate::error::ComputeError;

/// Values that are converted to bf16 at a time.
const CONVERTED: usize = 1 << 22;

/// Copies matrices one below the other, in bf16.
pub fn matrix(device: &Arc<dyn Device>, parts: &[candle_core::Tensor]) -> Result<Memory, ComputeError> {
    let values: usize = parts.iter().map(candle_core::Tensor::elem_count).sum();
    let memory = Memory::zeroed(device, 2 * values)?;
    let mut at = memory.address();
    for part in parts {
        let part: Vec<f32> = part.flatten_all()?.to_vec1()?;
        for part in part.chunks(CONVERTED) {
            let converted: Vec<bf16> = part.iter().map(|&x| bf16::from_f32(x)).collect();
            let bytes: &[u8] = bytemuck::cast_slice(&converted);
            device.upload(bytes, at)?;
            at += bytes.len() as u64;
        }
    }
    Ok(memory)
}

/// Copies vectors one behind the other, in single precision.
pub fn vector(device: &Arc<dyn Device>, parts: &[candle_core::Tensor]) -> Result<Memory, ComputeError> {
    let mut values: Vec<f32> = Vec::new();
    for part in parts {
        values.extend(part.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(Memory::of(device, &values)?)
}
