//! Checkpoints, model families and the forward pass over paged KV.
//!
//! Place in the flow: between the scheduler, which decides what runs in a step, and the processor, which
//! runs it.
//!
//! ```text
//! checkpoint ── config, tensors, digest          what the author brought, checked
//! convention ── tokens of SIDs, prompts          how this checkpoint writes histories and items
//! loaded     ── a checkpoint of any family, opened: the only face to the rest of the system
//! families   ── decoder, hstu, t5                checkpoint -> layers -> forward(batch, pages)
//! cuda       ── the families on a GPU
//! decode     ── exact constrained beam search
//! task       ── Job, Task, Answer                what a request wants and gets, in every family
//! step       ── Plan, Progress, StepModel        the boundary to the scheduler
//! rows       ── what of a request goes into a step
//! executor   ── one StepModel for all families and processors
//! reference  ── the families once more in candle-nn, for tests and `inspect --verify`
//! ```
//!
//! Invariants: the answer to a request is a function of checkpoint, catalog snapshot and request, bit
//! for bit on the CPU. Nothing in a checkpoint is used before all of it was checked.
//!
//! What this crate must not know: queues, deadlines, clocks, HTTP, users. Code that depends on a
//! processor, or is unsafe, lies in `compute`.

#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod convention;
pub mod cuda;
pub mod decode;
pub mod error;
pub mod escaped;
pub mod executor;
pub mod families;
pub mod loaded;
pub mod reference;
pub mod rows;
pub mod step;
pub mod task;
