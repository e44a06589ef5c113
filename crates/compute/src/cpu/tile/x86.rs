//! The product for AVX2 and AVX-512, spelled out.
//!
//! Left to itself, the compiler vectorises some heights along the rows, with shuffles and sums that
//! it keeps in memory, several times slower.
//!
//! A tile of sums stays in registers while the inner dimension passes by: 6 rows of 2 registers of
//! AVX2's 16, or 8 rows of 2 of AVX-512's 32. Fewer rows are wider where that is possible, because
//! a chain of multiply-adds waits four cycles for each of its steps, so there must be at least
//! eight chains.
//!
//! A bfloat16 is the upper half of a number in single precision, so widening puts a zero below it. One
//! load fetches two registers' worth. One interleaving with zeros each widens them, and leaves them in
//! another order: every second group of four columns in the first register, the others in the second. So
//! the sums are brought into that order before the inner dimension passes by, and back afterwards, which
//! costs almost nothing in comparison.

use std::arch::x86_64::{
    __m256, __m512, _mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_permute2f128_ps, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_setzero_si256, _mm256_slli_epi32, _mm256_storeu_ps, _mm256_unpackhi_epi16, _mm256_unpacklo_epi16,
    _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_f32x4, _mm512_slli_epi32,
    _mm512_storeu_ps, _mm512_unpackhi_epi16, _mm512_unpacklo_epi16,
};

use super::Product;
use crate::cpu::Bf16;

/// Numbers of panels that there are kernels for.
pub trait Kernels: Sized {
    /// Adds a product to sums with AVX2.
    ///
    /// # Safety
    ///
    /// Rows, panel and sums reach as far as the product says, no other thread reads or writes the sums,
    /// and the machine has AVX2 and FMA.
    unsafe fn avx2(product: &Product<'_, Self>, sums: *mut f32, stride: usize);

    /// The same with AVX-512.
    ///
    /// # Safety
    ///
    /// As [`Kernels::avx2`], of a machine with AVX-512 F, BW and VL.
    unsafe fn avx512(product: &Product<'_, Self>, sums: *mut f32, stride: usize);
}

/// [`Kernels`] out of two modules.
macro_rules! kernels_of {
    ($number:ty, $avx2:ident, $avx512:ident) => {
        impl Kernels for $number {
            #[inline(always)]
            unsafe fn avx2(product: &Product<'_, Self>, sums: *mut f32, stride: usize) {
                // SAFETY: by contract.
                unsafe { $avx2::add(product, sums, stride) }
            }

            #[inline(always)]
            unsafe fn avx512(product: &Product<'_, Self>, sums: *mut f32, stride: usize) {
                // SAFETY: by contract.
                unsafe { $avx512::add(product, sums, stride) }
            }
        }
    };
}

kernels_of!(f32, avx2, avx512);
kernels_of!(Bf16, avx2_bf16, avx512_bf16);

/// Makes a module with the product for one instruction set and one kind of panel. `weights` reads
/// registers of the panel in an order of its own; `enter` brings registers of sums into it, and `leave`
/// back.
///
/// Tiles of up to `$low` rows are four registers wide, others up to `$tallest` two; what is left of
/// the columns is one or two wide.
macro_rules! kernels {
    (
        $module:ident, $features:literal, heights: [$($height:literal)*], tallest: $tallest:literal, low: $low:literal,
        register: $register:ty, lanes: $lanes:literal, zero: $zero:ident,
        load: $load:ident, store: $store:ident, broadcast: $broadcast:ident, multiply_add: $multiply_add:ident,
        number: $number:ty, weights: $weights:ident, enter: $enter:ident, leave: $leave:ident
    ) => {
        pub(super) mod $module {
            use super::*;

            /// Rows of the tallest tile.
            pub(in super::super) const TALLEST: usize = $tallest;

            /// Adds a product to sums, in tiles of equal height as far as possible.
            ///
            /// # Safety
            ///
            /// Rows, panel and sums reach as far as the product says, and nobody else reads or
            /// writes the sums.
            #[target_feature(enable = $features)]
            pub(in super::super) unsafe fn add(product: &Product<'_, $number>, sums: *mut f32, stride: usize) {
                let mut first = 0;
                for tiles in (1..=product.height.div_ceil(TALLEST)).rev() {
                    let height = (product.height - first).div_ceil(tiles);
                    // SAFETY: by contract; these rows are among the product's.
                    unsafe { add_rows(product, first, height, sums, stride) };
                    first += height;
                }
            }

            /// As [`add`], for some rows.
            ///
            /// # Safety
            ///
            /// As there; the rows are among the product's.
            #[target_feature(enable = $features)]
            #[inline]
            unsafe fn add_rows(
                product: &Product<'_, $number>,
                first: usize,
                height: usize,
                sums: *mut f32,
                stride: usize,
            ) {
                match height {
                    // SAFETY: by contract.
                    $($height => unsafe { add_columns::<$height>(product, first, sums, stride) },)*
                    height => unreachable!("a tile of {height} rows"),
                }
            }

            /// All columns of `H` rows.
            ///
            /// # Safety
            ///
            /// As [`add_rows`].
            #[target_feature(enable = $features)]
            #[inline(never)]
            unsafe fn add_columns<const H: usize>(
                product: &Product<'_, $number>,
                first: usize,
                sums: *mut f32,
                stride: usize,
            ) {
                let mut column = 0;
                while column < product.columns {
                    column += match (product.columns - column) / $lanes {
                        // SAFETY: by contract; this number of columns is left.
                        4.. if H <= $low => unsafe { add_tile::<H, 4>(product, first, column, sums, stride) },
                        // SAFETY: as above.
                        2.. => unsafe { add_tile::<H, 2>(product, first, column, sums, stride) },
                        // SAFETY: as above.
                        _ => unsafe { add_tile::<H, 1>(product, first, column, sums, stride) },
                    };
                }
            }

            /// `N` registers of columns of `H` rows. Returns how many columns that is.
            ///
            /// # Safety
            ///
            /// As [`add_rows`]; the columns are among the product's.
            #[target_feature(enable = $features)]
            #[inline]
            unsafe fn add_tile<const H: usize, const N: usize>(
                product: &Product<'_, $number>,
                first: usize,
                column: usize,
                sums: *mut f32,
                stride: usize,
            ) -> usize {
                let Product { rows, panel, inner, .. } = *product;
                let at = |row: usize, n: usize| (first + row) * stride + column + n * $lanes;
                let mut tile: [[$register; N]; H] = [[$zero(); N]; H];
                for row in 0..H {
                    for n in 0..N {
                        // SAFETY: by contract; no alignment is asked for.
                        tile[row][n] = unsafe { $load(sums.add(at(row, n))) };
                    }
                    tile[row] = $enter(tile[row]);
                }
                // SAFETY: by contract. The panel's last row need not be followed by another, so it
                // wraps.
                let (rows_at, mut weights_at) = unsafe {
                    (rows.values.as_ptr().add(first * rows.stride), panel.values.as_ptr().add(column))
                };
                for k in 0..inner {
                    // SAFETY: by contract, this number of columns is there.
                    let weights: [$register; N] = unsafe { $weights::<N>(weights_at) };
                    weights_at = weights_at.wrapping_add(panel.stride);
                    for row in 0..H {
                        // SAFETY: by contract.
                        let value = $broadcast(unsafe { *rows_at.add(row * rows.stride + k) });
                        for n in 0..N {
                            tile[row][n] = $multiply_add(value, weights[n], tile[row][n]);
                        }
                    }
                }
                for row in 0..H {
                    tile[row] = $leave(tile[row]);
                    for n in 0..N {
                        // SAFETY: by contract; no alignment is asked for.
                        unsafe { $store(sums.add(at(row, n)), tile[row][n]) };
                    }
                }
                N * $lanes
            }
        }
    };
}

/// The order in which registers lie in memory.
#[inline(always)]
fn as_it_is<R, const N: usize>(registers: [R; N]) -> [R; N] {
    registers
}

/// `N` registers of a panel in single precision.
///
/// # Safety
///
/// `from` points to as many values as the registers hold.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn load_256<const N: usize>(from: *const f32) -> [__m256; N] {
    let mut registers = [_mm256_setzero_ps(); N];
    for (n, register) in registers.iter_mut().enumerate() {
        // SAFETY: by contract; no alignment is asked for.
        *register = unsafe { _mm256_loadu_ps(from.add(8 * n)) };
    }
    registers
}

/// `N` registers of a panel in bfloat16, pairs of them in the order of [`interleave_256`].
///
/// # Safety
///
/// `from` points to as many values as the registers hold.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn widen_256<const N: usize>(from: *const Bf16) -> [__m256; N] {
    let mut registers = [_mm256_setzero_ps(); N];
    let (pairs, rest) = registers.as_chunks_mut::<2>();
    let rest_from = from.wrapping_add(16 * pairs.len());
    for (n, pair) in pairs.iter_mut().enumerate() {
        // SAFETY: by contract; no alignment is asked for.
        let halves = unsafe { _mm256_loadu_si256(from.add(16 * n).cast()) };
        let zero = _mm256_setzero_si256();
        pair[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, halves));
        pair[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, halves));
    }
    for register in rest {
        // SAFETY: by contract; no alignment is asked for.
        let halves = unsafe { _mm_loadu_si128(rest_from.cast()) };
        *register = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)));
    }
    registers
}

/// From columns `0..8` and `8..16` to `0..4, 8..12` and `4..8, 12..16`, and back.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn interleave_256<const N: usize>(mut registers: [__m256; N]) -> [__m256; N] {
    for pair in registers.as_chunks_mut::<2>().0 {
        let [a, b] = *pair;
        *pair = [_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b)];
    }
    registers
}

/// As [`load_256`], in wider registers.
///
/// # Safety
///
/// `from` points to as many values as the registers hold.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
#[inline]
unsafe fn load_512<const N: usize>(from: *const f32) -> [__m512; N] {
    let mut registers = [_mm512_setzero_ps(); N];
    for (n, register) in registers.iter_mut().enumerate() {
        // SAFETY: by contract; no alignment is asked for.
        *register = unsafe { _mm512_loadu_ps(from.add(16 * n)) };
    }
    registers
}

/// As [`widen_256`], in the order of [`interleave_512`].
///
/// # Safety
///
/// `from` points to as many values as the registers hold.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
#[inline]
unsafe fn widen_512<const N: usize>(from: *const Bf16) -> [__m512; N] {
    let mut registers = [_mm512_setzero_ps(); N];
    let (pairs, rest) = registers.as_chunks_mut::<2>();
    let rest_from = from.wrapping_add(32 * pairs.len());
    for (n, pair) in pairs.iter_mut().enumerate() {
        // SAFETY: by contract; no alignment is asked for.
        let halves = unsafe { _mm512_loadu_si512(from.add(32 * n).cast()) };
        let zero = _mm512_setzero_si512();
        pair[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, halves));
        pair[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, halves));
    }
    for register in rest {
        // SAFETY: by contract; no alignment is asked for.
        let halves = unsafe { _mm256_loadu_si256(rest_from.cast()) };
        *register = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)));
    }
    registers
}

/// From columns `0..16` and `16..32` to the groups of four `0, 2, 4, 6` and `1, 3, 5, 7`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
#[inline]
fn interleave_512<const N: usize>(mut registers: [__m512; N]) -> [__m512; N] {
    for pair in registers.as_chunks_mut::<2>().0 {
        let [a, b] = *pair;
        *pair = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b)];
    }
    registers
}

/// The way back of [`interleave_512`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
#[inline]
fn part_512<const N: usize>(mut registers: [__m512; N]) -> [__m512; N] {
    for pair in registers.as_chunks_mut::<2>().0 {
        let [even, odd] = *pair;
        // Groups 0, 2, 1, 3 of the columns, and 4, 6, 5, 7.
        let halves = [_mm512_shuffle_f32x4::<0x44>(even, odd), _mm512_shuffle_f32x4::<0xee>(even, odd)];
        *pair = halves.map(|half| _mm512_shuffle_f32x4::<0xd8>(half, half));
    }
    registers
}

kernels!(
    avx2, "avx2,fma", heights: [1 2 3 4 5 6], tallest: 6, low: 3,
    register: __m256, lanes: 8, zero: _mm256_setzero_ps,
    load: _mm256_loadu_ps, store: _mm256_storeu_ps, broadcast: _mm256_set1_ps, multiply_add: _mm256_fmadd_ps,
    number: f32, weights: load_256, enter: as_it_is, leave: as_it_is
);

kernels!(
    avx2_bf16, "avx2,fma", heights: [1 2 3 4 5 6], tallest: 6, low: 3,
    register: __m256, lanes: 8, zero: _mm256_setzero_ps,
    load: _mm256_loadu_ps, store: _mm256_storeu_ps, broadcast: _mm256_set1_ps, multiply_add: _mm256_fmadd_ps,
    number: Bf16, weights: widen_256, enter: interleave_256, leave: interleave_256
);

kernels!(
    avx512, "avx512f,avx512bw,avx512vl,avx2,fma", heights: [1 2 3 4 5 6 7 8], tallest: 8, low: 2,
    register: __m512, lanes: 16, zero: _mm512_setzero_ps,
    load: _mm512_loadu_ps, store: _mm512_storeu_ps, broadcast: _mm512_set1_ps, multiply_add: _mm512_fmadd_ps,
    number: f32, weights: load_512, enter: as_it_is, leave: as_it_is
);

kernels!(
    avx512_bf16, "avx512f,avx512bw,avx512vl,avx2,fma", heights: [1 2 3 4 5 6 7 8], tallest: 8, low: 2,
    register: __m512, lanes: 16, zero: _mm512_setzero_ps,
    load: _mm512_loadu_ps, store: _mm512_storeu_ps, broadcast: _mm512_set1_ps, multiply_add: _mm512_fmadd_ps,
    number: Bf16, weights: widen_512, enter: interleave_512, leave: part_512
);
