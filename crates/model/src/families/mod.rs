//! Model families: one folder each, from checkpoint to forward pass.
//!
//! A family checks the tensors of a checkpoint against its configuration, packs them, and runs a
//! [`Batch`](beamline_compute::batch::Batch) over pages. It knows nothing of beams, catalogs or requests.

pub mod decoder;
pub mod hstu;
pub mod t5;
