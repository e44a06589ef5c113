//! Checkpoints, model families and the forward pass over paged KV.

pub mod step;
