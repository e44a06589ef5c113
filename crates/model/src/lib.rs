//! Checkpoints, model families and the forward pass over paged KV.

pub mod checkpoint;
pub mod error;
pub mod step;
