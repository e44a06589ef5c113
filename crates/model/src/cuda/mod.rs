//! Decoders on an NVIDIA graphics processor.
//!
//! Place in the flow: [`DeviceExecutor`](executor::DeviceExecutor) is a [`StepModel`](crate::step::StepModel), as the CPU's executor is; the
//! scheduler sees no difference. Weights, pages, beams and trie lie in device memory; a step is a list of kernels and matrix
//! products in one stream, and nothing comes back but the beams of requests that finish. Pages go to host memory and come back in a second one.
//!
//! ```text
//! layout     plan -> arrays of rows and tiles          no device
//! device     what is asked of a device                 a trait
//! gpu        an NVIDIA GPU: driver, cuBLAS, kernels    feature `cuda`
//! catalog    trie and filters in device memory
//! pages      keys and values in device memory
//! transfers  pages on their way between device and host memory, beside the computing
//! pinned     page-locked host memory for them
//! qwen       weights, and the forward pass as a list of work
//! beams      the state of a search in device memory, and a step of it
//! executor   plans -> work -> answers
//! kernels    names, arguments and launch sizes of the kernels in `kernels/`
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
pub mod kernels;
pub mod layout;
pub mod pages;
pub mod pinned;
pub mod qwen;
pub mod transfers;
