//! Model families: one file or folder each, from checkpoint to forward pass.
//!
//! A family checks the tensors of a checkpoint against its configuration, packs them, and runs a
//! [`Batch`](beamline_compute::batch::Batch) over pages. It knows nothing of beams, catalogs or requests.

pub mod hstu;
pub mod qwen;
mod qwen_step;
pub mod t5;
pub mod tokens;
