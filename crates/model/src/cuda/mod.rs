//! Models on an NVIDIA graphics processor.
//!
//! Place in the flow: [`DeviceExecutor`](executor::DeviceExecutor) for decoders and
//! [`HstuDeviceExecutor`](hstu::executor::HstuDeviceExecutor) are [`StepModel`](crate::step::StepModel)s, as the CPU's executors are; the
//! scheduler sees no difference. Weights, pages, beams and trie lie in device memory; a step is a list of kernels and matrix
//! products in one stream, and nothing comes back but the beams of requests that finish, and final states of candidates to be ranked. Pages go
//! to host memory and come back in a second stream.
//!
//! ```text
//! device     what is asked of a device                 a trait
//! gpu        an NVIDIA GPU: driver, cuBLAS, kernels    feature `cuda`
//! weights    tensors -> device memory
//! pages      keys and values in device memory
//! transfers  pages on their way between device and host memory, beside the computing
//! pinned     page-locked host memory for them
//! upload     arrays of a step, copied in one piece
//! rows       what the rows of a step are, in every family
//! tiles      rows that a block of threads takes together
//! catalog    trie and filters in device memory
//! beams      the state of a search in device memory, and a step of it
//! searches   all searches of a step, from states to beams
//! kernels    names, arguments and launch sizes of the kernels in `kernels/`
//!
//! layout     plan -> arrays of a decoder's rows        no device
//! qwen       weights of a decoder, and its forward pass as a list of work
//! executor   plans of a decoder -> work -> answers
//! hstu       the same three for HSTU
//! ```
//!
//! Everything but `gpu` is compiled and tested without CUDA: the tests run the same kernel sources on the CPU. `gpu` runs there on a stand-in for the
//! driver, in a rehearsal (docs/CUDA.md).
//!
//! Answers agree with the CPU's to the tolerance of bf16; see docs/CUDA.md.

pub mod beams;
pub mod catalog;
pub mod device;
pub mod executor;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod hstu;
pub mod kernels;
pub mod layout;
pub mod pages;
pub mod pinned;
pub mod qwen;
pub mod rows;
mod searches;
pub mod tiles;
pub mod transfers;
pub mod upload;
mod weights;
