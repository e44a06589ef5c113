//! Everything that knows a processor: kernels, the contents of pages, and the rows of a step.
//!
//! Place in the flow: below `model`, whose families call these operations in the order of their
//! architecture. All `unsafe` code of the project that computes is in this crate.
//!
//! ```text
//! cpu        ── linear, attention, pages, ..      kernels for every instruction set, and a pool of threads
//! cuda       ── device, pages, transfers, ..      the same for an NVIDIA GPU; `kernels/` holds its sources
//! batch      ── rows of one step on the CPU
//! page_uses  ── who reads and writes which pages in a step, one rule for both
//! ```
//!
//! Invariants: a row of a result depends on the inputs of that row alone, bit for bit on the CPU,
//! whatever shares the call. A step writes a page for one request only.
//!
//! What this crate must not know: checkpoints, families, catalogs, searches, requests.

pub mod batch;
pub mod cpu;
pub mod cuda;
pub mod error;
pub mod page_uses;
