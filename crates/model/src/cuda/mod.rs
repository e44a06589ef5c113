//! Models on an NVIDIA graphics processor, over `beamline_compute::cuda`.
//!
//! Place in the flow: [`DeviceExecutor`](executor::DeviceExecutor) for decoders and
//! [`HstuDeviceExecutor`](hstu::executor::HstuDeviceExecutor) are [`StepModel`](crate::step::StepModel)s, as the CPU's executors
//! are; the scheduler sees no difference. Weights, pages, beams and trie lie in device memory; a step is a list of kernels and
//! matrix products in one stream. Only the beams of requests that finish, and final states of candidates to be ranked, come back.
//!
//! ```text
//! catalog    trie and filters in device memory
//! beams      the state of a search in device memory, and a step of it
//! searches   all searches of a step, from states to beams
//!
//! qwen       weights of a decoder, and its forward pass as a list of work
//! executor   plans of a decoder -> work -> answers
//! hstu       the same for HSTU
//! ```
//!
//! Answers agree with the CPU's to the tolerance of bf16; see docs/CUDA.md.

pub mod beams;
pub mod catalog;
pub mod executor;
pub mod hstu;
pub mod qwen;
mod searches;
