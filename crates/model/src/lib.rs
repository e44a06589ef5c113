//! Checkpoints, model families and the forward pass over paged KV.

pub mod batch;
pub mod checkpoint;
pub mod convention;
pub mod cpu;
pub mod decode;
pub mod error;
pub mod families;
pub mod step;
