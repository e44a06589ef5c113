//! Which vector instructions the kernels use, chosen once at run time.
//!
//! Most kernel bodies are ordinary safe Rust over fixed-size arrays, compiled once per instruction
//! set by the macro `per_isa`; only the matrix products of `linear` and `tile` are spelled out. All
//! of them compute every output element with the same operations in the same order (fused
//! multiply-adds included), so the instruction set changes the speed and never a bit of the result.

/// An instruction set that this machine is known to have.
///
/// Values other than portable come only from [`Isa::detect`], which is what makes calling the
/// specialised kernels sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Portable,
    Avx2,
    Avx512,
    /// With dot products of bytes (VNNI).
    Avx512Vnni,
    /// With dot products of bfloat16 pairs as well.
    Avx512Bf16,
}

impl Isa {
    /// The best instruction set of this machine; the environment variable `BEAMLINE_CPU_ISA` (a
    /// [name](Self::name)) lowers it, for tests of the slower kernels. Asking for more than there
    /// is has no effect.
    pub fn detect() -> Self {
        let asked = std::env::var("BEAMLINE_CPU_ISA").unwrap_or_default();
        let most = LEVELS.into_iter().find(|&level| Self(level).name() == asked);
        Self(best().min(most.unwrap_or(Level::Avx512Bf16)))
    }

    /// Every instruction set of this machine, slowest first.
    pub fn all() -> Vec<Self> {
        LEVELS.into_iter().filter(|&level| level <= best()).map(Self).collect()
    }

    /// The name used in logs and by `BEAMLINE_CPU_ISA`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Vnni => "avx512vnni",
            Level::Avx512Bf16 => "avx512bf16",
        }
    }

    pub(crate) fn level(self) -> Level {
        self.0
    }
}

/// All levels, slowest first; each implies those before it.
const LEVELS: [Level; 5] =
    [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Vnni, Level::Avx512Bf16];

#[cfg(target_arch = "x86_64")]
fn best() -> Level {
    let steps = [
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw"),
        is_x86_feature_detected!("avx512vnni"),
        is_x86_feature_detected!("avx512bf16"),
    ];
    LEVELS[steps.into_iter().take_while(|&step| step).count()]
}

#[cfg(not(target_arch = "x86_64"))]
fn best() -> Level {
    Level::Portable
}

/// Compiles `body::<ROWS>` for each instruction set and makes a function `name(isa, ..)` that calls
/// the right one. `ROWS` is how many rows a register tile holds: as many as the vector registers of
/// that set allow.
macro_rules! per_isa {
    (
        $(#[$attribute:meta])*
        $vis:vis fn $name:ident$(<$generic:ident: $bound:ident>)?($($argument:ident: $type:ty),* $(,)?) = $body:ident
    ) => {
        $(#[$attribute])*
        $vis fn $name$(<$generic: $bound>)?(level: $crate::cpu::isa::Isa, $($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[inline(never)]
            fn avx2$(<$generic: $bound>)?($($argument: $type),*) {
                $body::<2 $(, $generic)?>($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
            #[inline(never)]
            fn avx512$(<$generic: $bound>)?($($argument: $type),*) {
                $body::<8 $(, $generic)?>($($argument),*)
            }
            match level.level() {
                // SAFETY: an `Isa` of this level exists only if `Isa::detect` or `Isa::all` found
                // its features on this machine.
                #[cfg(target_arch = "x86_64")]
                level if level >= $crate::cpu::isa::Level::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::isa::Level::Avx2 => unsafe { avx2($($argument),*) },
                _ => $body::<2 $(, $generic)?>($($argument),*),
            }
        }
    };
}
pub(crate) use per_isa;
