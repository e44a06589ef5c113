//! An NVIDIA graphics processor: memory, pages, transfers, and kernels by name.
//!
//! Place in the flow: families on a GPU ask for kernels and products in one stream of work. Pages go to
//! host memory and come back in a second one.
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
//! layout     the rows of a step that attend with a softmax, cut into tiles
//! tiles      rows that a block of threads takes together
//! kernels    names, arguments and launch sizes of the kernels in `kernels/`
//! ```
//!
//! Everything except `gpu` is compiled and tested without CUDA: the tests run the same kernel sources on
//! the CPU. `gpu` runs on a stand-in for the driver there, in a rehearsal (docs/CUDA.md).

pub mod device;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod kernels;
pub mod layout;
pub mod pages;
pub mod pinned;
pub mod rows;
pub mod tiles;
pub mod transfers;
pub mod upload;
pub mod weights;
