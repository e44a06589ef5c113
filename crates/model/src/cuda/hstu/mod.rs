//! HSTU on an NVIDIA graphics processor.
//!
//! Place in the flow: a [`DeviceFamily`](crate::executor::cuda::DeviceFamily), for all variants.
//!
//! ```text
//! layout     plan -> arrays of rows and items       no device
//! embedding  ids -> rows: tables on the device, or rows made on the host where small networks make them
//! stack      weights of the layers, and the forward pass as a list of work
//! step       the rows of a step, and the memory it is computed in
//! model      all of it, and what makes answers of final states
//! family     all of it as an executor sees it
//! ```
//!
//! Weights are bf16; embedding tables and the residual stream are single precision. Only the inputs of
//! products are rounded.

pub mod embedding;
mod family;
pub mod layout;
pub mod model;
pub mod stack;
pub mod step;
