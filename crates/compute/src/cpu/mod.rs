//! The CPU backend: a thread pool, kernels, and the pages they read and write.
//!
//! Place in the flow: `families` call these operations in the order of their architecture; nothing here knows
//! what a layer is, what a beam is, or who asks.
//!
//! Invariants: a row of any result depends on that row's inputs alone, bit for bit. The number of rows
//! in the call, the number of threads and the instruction set make no difference.

pub mod activation;
pub mod attention;
pub mod destinations;
mod fused;
pub mod isa;
pub mod kv_format;
pub mod linear;
pub mod mask;
mod memory;
mod page_contents;
mod page_writes;
pub mod pages;
pub mod parallel;
pub mod pointwise;
pub mod relative;
pub mod rotary;
pub mod stored;
pub mod tile;
pub mod time_buckets;
mod turn;
pub mod vector;

use std::sync::atomic::{AtomicBool, Ordering};

use isa::Isa;
use linear::Bf16Kernel;
pub use page_writes::{NewRows, PageWrites};
pub(crate) use stored::Bf16;

use crate::error::ComputeError;

/// Threads and instruction set.
#[derive(Debug)]
pub struct Cpu {
    /// `None`: everything runs on the calling thread.
    pool: Option<rayon::ThreadPool>,
    isa: Isa,
    bf16_kernel: Bf16Kernel,
}

/// Takes part in what other threads of the pool have to share, until there will be no more.
fn look_for_work(done: &AtomicBool) {
    let mut idle = 0_u32;
    while !done.load(Ordering::Relaxed) {
        match rayon::yield_now() {
            Some(rayon::Yield::Executed) => idle = 0,
            _ => {
                idle += 1;
                if idle.is_multiple_of(SPINS_BEFORE_YIELD) {
                    // Somebody else may want the core: the threads that read and write sockets, say.
                    std::thread::yield_now();
                } else {
                    std::hint::spin_loop();
                }
            }
        }
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Looks for work in vain after which a thread lets others run.
const SPINS_BEFORE_YIELD: u32 = 64;

impl Cpu {
    /// A backend with its own pool of `threads` threads (at least one).
    ///
    /// # Errors
    ///
    /// When the system refuses the threads.
    pub fn new(threads: usize) -> Result<Self, ComputeError> {
        Self::with_isa(threads, Isa::detect())
    }

    /// As [`Cpu::new`], with a chosen instruction set.
    ///
    /// # Errors
    ///
    /// When the system refuses the threads.
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Self, ComputeError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|index| format!("beamline-cpu-{index}"))
            .build()
            .map_err(|error| ComputeError::Limit(format!("cannot start {threads} threads: {error}")))?;
        Ok(Self { pool: Some(pool), isa, bf16_kernel: Bf16Kernel::fastest(isa) })
    }

    /// The same kernels on the calling thread alone, for work that is one of many tasks already.
    pub fn alone(&self) -> Self {
        Self { pool: None, ..*self }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub(crate) fn bf16_kernel(&self) -> Bf16Kernel {
        self.bf16_kernel
    }

    /// The same with the other kernel for bfloat16, if the machine has it.
    #[cfg(test)]
    pub(crate) fn with_bf16_kernel(mut self, kernel: Bf16Kernel) -> Self {
        self.bf16_kernel = kernel;
        self
    }

    /// Threads of the pool.
    pub fn threads(&self) -> usize {
        self.pool.as_ref().map_or(1, rayon::ThreadPool::current_num_threads)
    }

    /// Runs `work` inside the pool, so that parallel iterators use its threads.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }

    /// As [`Cpu::run`], with all threads kept awake until `work` returns. It is for a step, which is
    /// hundreds of short parallel parts. Between two parts a sleeping thread would have to be woken by
    /// the system, which takes longer than many parts do, above all on a virtual machine.
    pub fn run_awake<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        let Some(pool) = &self.pool else { return work() };
        let done = AtomicBool::new(false);
        pool.in_place_scope(|scope| {
            for _ in 1..self.threads() {
                scope.spawn(|_| look_for_work(&done));
            }
            // Also when the work panics.
            let _done = SetOnDrop(&done);
            pool.install(work)
        })
    }
}
