//! Models on an NVIDIA graphics processor, over `beamline_compute::cuda`.
//!
//! Place in the flow: each is a [`DeviceFamily`](crate::executor::cuda::DeviceFamily), which the
//! executor runs as it runs the CPU's. Weights, pages, beams and trie lie in device memory; a step is a
//! list of kernels and matrix products in one stream. Only the beams of finished requests, and final
//! states of candidates to be scored, come back.
//!
//! ```text
//! catalog    trie and filters in device memory
//! beams      the state of a search in device memory, and a step of it
//! searches   all searches of a step, from states to beams
//!
//! decoder    weights of a decoder, and its forward pass as a list of work
//! decoder_step  rows of a decoder in a step
//! hstu       the same for HSTU
//! ```
//!
//! Answers agree with the CPU's to the tolerance of bf16; see docs/CUDA.md.

pub mod beams;
pub mod catalog;
pub mod decoder;
mod decoder_step;
pub mod hstu;
pub(crate) mod searches;
