//! The CPU backend: a thread pool, kernels, and the pages they read and write.
//!
//! Place in the flow: `families` call these operations in the order of their architecture; nothing here knows
//! what a layer is, what a beam is, or who asks.
//!
//! Invariants: a row of any result depends on that row's inputs alone, bit for bit, whatever the number of rows
//! in the call, the number of threads, or the instruction set.

pub mod attention;
pub mod isa;
pub mod linear;
mod page_contents;
pub mod pages;
pub mod rotary;
pub mod tile;
pub mod vector;

use isa::Isa;

use crate::error::ModelError;

/// Threads and instruction set.
#[derive(Debug)]
pub struct Cpu {
    pool: rayon::ThreadPool,
    isa: Isa,
}

impl Cpu {
    /// A backend with its own pool of `threads` threads (at least one).
    ///
    /// # Errors
    ///
    /// When the system refuses the threads.
    pub fn new(threads: usize) -> Result<Self, ModelError> {
        Self::with_isa(threads, Isa::detect())
    }

    /// As [`Cpu::new`], with a chosen instruction set.
    ///
    /// # Errors
    ///
    /// When the system refuses the threads.
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Self, ModelError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|index| format!("beamline-cpu-{index}"))
            .build()
            .map_err(|error| ModelError::Limit(format!("cannot start {threads} threads: {error}")))?;
        Ok(Self { pool, isa })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads of the pool.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `work` inside the pool, so that parallel iterators use its threads.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }
}
