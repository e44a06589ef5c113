//! What instructions can do: plain loops of them on registers alone.

use std::sync::Barrier;

use beamline_compute::cpu::isa::Isa;

use crate::case::Effort;

/// What a kernel is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Instruction {
    /// Fused multiply-adds in single precision.
    MultiplyAdd,
    /// The faster of those, and dot products of bfloat16 pairs where the machine has them.
    Bfloat16,
    /// Dot products of bytes; where there are none, of pairs of 16 bits, and an addition.
    Bytes,
}

/// Rates of the loops that were asked for, in billions of operations a second.
pub(crate) struct Peaks {
    isa: Isa,
    threads: usize,
    effort: Effort,
    known: Vec<(Instruction, Option<f64>)>,
}

/// Rounds of a loop: some hundred thousand instructions, so that a run is shorter than a turn of the
/// scheduler.
const ROUNDS: usize = 20_000;

impl Peaks {
    pub(crate) fn new(isa: Isa, threads: usize, effort: Effort) -> Self {
        Self { isa, threads, effort, known: Vec::new() }
    }

    /// The rate of the instruction on all threads at once; none where there is no loop for it.
    pub(crate) fn rate(&mut self, instruction: Instruction) -> Option<f64> {
        if let Some((_, rate)) = self.known.iter().find(|(known, _)| *known == instruction) {
            return *rate;
        }
        let rates = loops(self.isa, instruction).into_iter().map(|plain| self.measure(plain));
        let rate = rates.reduce(f64::max);
        self.known.push((instruction, rate));
        rate
    }

    /// Every thread runs the loop while all others do; their best rates are added.
    fn measure(&self, plain: Loop) -> f64 {
        let barrier = Barrier::new(self.threads);
        let alone = || {
            barrier.wait();
            self.effort.best_of(|| (plain.run)(ROUNDS))
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads).map(|_| scope.spawn(alone)).collect();
            let seconds = threads.into_iter().map(|thread| thread.join().expect("a loop that ends"));
            seconds.map(|seconds| ROUNDS as f64 * plain.operations / seconds / 1e9).sum()
        })
    }
}

/// A loop, and the operations of one round of it.
struct Loop {
    run: fn(usize),
    operations: f64,
}

#[cfg(not(target_arch = "x86_64"))]
fn loops(_: Isa, _: Instruction) -> Vec<Loop> {
    Vec::new()
}

#[cfg(target_arch = "x86_64")]
fn loops(isa: Isa, instruction: Instruction) -> Vec<Loop> {
    // Each set implies those before it.
    let sets: Vec<&str> = Isa::all().into_iter().map(Isa::name).collect();
    let place = |name: &str| sets.iter().position(|&set| set == name);
    let has = |name: &str| place(name).is_some() && place(name) <= place(isa.name());
    let multiply_add = || match (has("avx512"), has("avx2")) {
        (true, _) => vec![x86::multiply_add_avx512()],
        (false, true) => vec![x86::multiply_add_avx2()],
        (false, false) => vec![],
    };
    match instruction {
        Instruction::MultiplyAdd => multiply_add(),
        Instruction::Bfloat16 => {
            let mut loops = multiply_add();
            if has("avx512bf16") {
                loops.push(x86::bfloat16_avx512());
            }
            loops
        }
        Instruction::Bytes if has("avx512vnni") => vec![x86::bytes_avx512()],
        Instruction::Bytes if has("avx512") => vec![x86::pairs_avx512()],
        Instruction::Bytes if has("avx2") => vec![x86::pairs_avx2()],
        Instruction::Bytes => vec![],
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The loops. Each keeps many sums going, which hides the time that an instruction takes.

    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::Loop;

    /// Makes a function that makes a loop: `$step(x, sum)` is run for every sum in every round.
    macro_rules! plain_loop {
        ($name:ident, $features:literal, [$($needed:tt),*], $chains:literal, $operations:expr, $start:expr, $step:expr) => {
            pub(super) fn $name() -> Loop {
                #[target_feature(enable = $features)]
                fn body(rounds: usize) {
                    let start = $start;
                    let x = black_box(start);
                    let mut sums = [start; $chains];
                    for _ in 0..rounds {
                        for sum in &mut sums {
                            *sum = $step(x, *sum);
                        }
                    }
                    black_box(&sums);
                }
                fn run(rounds: usize) {
                    assert!($(is_x86_feature_detected!($needed))&&*, "instructions of this machine");
                    // SAFETY: the machine has the instructions.
                    unsafe { body(rounds) }
                }
                Loop { run, operations: ($chains * $operations) as f64 }
            }
        };
    }

    plain_loop!(multiply_add_avx2, "avx2,fma", ["avx2", "fma"], 12, 16, _mm256_set1_ps(0.5), |x, sum| {
        _mm256_fmadd_ps(x, x, sum)
    });
    plain_loop!(multiply_add_avx512, "avx512f", ["avx512f"], 24, 32, _mm512_set1_ps(0.5), |x, sum| {
        _mm512_fmadd_ps(x, x, sum)
    });
    plain_loop!(pairs_avx2, "avx2", ["avx2"], 12, 32, _mm256_set1_epi16(3), |x, sum| {
        _mm256_add_epi32(_mm256_madd_epi16(x, sum), sum)
    });
    plain_loop!(
        pairs_avx512,
        "avx512f,avx512bw",
        ["avx512f", "avx512bw"],
        24,
        64,
        _mm512_set1_epi16(3),
        |x, sum| _mm512_add_epi32(_mm512_madd_epi16(x, sum), sum)
    );
    plain_loop!(
        bytes_avx512,
        "avx512f,avx512vnni",
        ["avx512f", "avx512vnni"],
        24,
        128,
        _mm512_set1_epi8(3),
        |x, sum| _mm512_dpbusd_epi32(sum, x, x)
    );
    plain_loop!(
        bfloat16_avx512,
        "avx512f,avx512bf16",
        ["avx512f", "avx512bf16"],
        24,
        64,
        _mm512_set1_ps(0.5),
        |x, sum| {
            // SAFETY: both types are 64 bytes, and every bit pattern is a value of either.
            let pairs: __m512bh = unsafe { std::mem::transmute(x) };
            _mm512_dpbf16_ps(sum, pairs, pairs)
        }
    );
}
