//! What is measured, and how.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use beamline_compute::cpu::Cpu;

use crate::peaks::Instruction;

/// A kernel with its operands.
pub(crate) trait Kernel: Send {
    /// Gets the operands ready for these threads and instructions; not timed.
    fn prepare(&mut self, cpu: &Cpu);
    /// What is timed.
    fn run(&mut self, cpu: &Cpu);
}

/// A kernel on one shape.
pub(crate) struct Case {
    /// As in "products".
    pub(crate) family: &'static str,
    /// As in "f32".
    pub(crate) format: &'static str,
    /// As in "S gate, 321 rows".
    pub(crate) shape: String,
    /// Names of the instruction sets that have a kernel of their own for it.
    pub(crate) differs_at: &'static [&'static str],
    /// What the kernel is made of; none where no instruction stands for it.
    pub(crate) instruction: Option<Instruction>,
    /// Operations of one run: a multiply-add is two.
    pub(crate) operations: f64,
    /// The least share of the plain loop's rate that `--check` lets pass on one thread.
    pub(crate) demand: Option<f64>,
    pub(crate) kernel: Box<dyn Kernel>,
}

impl Case {
    pub(crate) fn title(&self) -> String {
        format!("{} {} {}", self.family, self.format, self.shape)
    }
}

/// How long to try, and by which clock.
#[derive(Clone, Copy)]
pub(crate) struct Effort {
    /// Of one case.
    time: Duration,
    /// Runs of one case, even if they take longer.
    least_runs: usize,
    threads: usize,
}

/// What is shorter is run several times between two looks at the clock.
const SHORT: Duration = Duration::from_micros(20);
/// What is longer is seldom left alone by the rest of the machine.
const LONG: Duration = Duration::from_millis(2);

impl Effort {
    pub(crate) fn new(quick: bool, threads: usize) -> Self {
        let (time, least_runs) = if quick { (40, 3) } else { (200, 7) };
        Self { time: Duration::from_millis(time), least_runs, threads }
    }

    /// The shortest run of many, in seconds.
    pub(crate) fn best(self, cpu: &Cpu, kernel: &mut dyn Kernel) -> f64 {
        kernel.prepare(cpu);
        cpu.run_awake(|| self.best_of(|| kernel.run(cpu)))
    }

    /// As [`Effort::best`], for anything.
    pub(crate) fn best_of(self, mut run: impl FnMut()) -> f64 {
        // The first one finds caches cold and memory untouched.
        run();
        let begin = Instant::now();
        run();
        let once = begin.elapsed();
        let times = SHORT.as_nanos().div_ceil(once.as_nanos().max(1)).max(1) as u32;
        let clock = if self.threads == 1 && once > LONG { thread_time } else { wall_time };
        let (mut best, mut runs) = (Duration::MAX, 0);
        while runs < self.least_runs || begin.elapsed() < self.time {
            let start = clock();
            (0..times).for_each(|_| run());
            best = best.min(clock() - start);
            runs += 1;
        }
        best.as_secs_f64() / f64::from(times)
    }
}

fn wall_time() -> Duration {
    static BEGIN: OnceLock<Instant> = OnceLock::new();
    BEGIN.get_or_init(Instant::now).elapsed()
}

/// Time that the calling thread has run: what others take of its core does not count.
#[cfg(target_os = "linux")]
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a value of the type that the call fills in.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(status, 0, "every thread has a clock");
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

#[cfg(not(target_os = "linux"))]
fn thread_time() -> Duration {
    wall_time()
}
