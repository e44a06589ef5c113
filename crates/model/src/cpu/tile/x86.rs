//! The product for AVX2 and AVX-512, spelled out.
//!
//! Left to itself, the compiler vectorises some heights along the rows, with shuffles and sums that
//! it keeps in memory, several times slower.
//!
//! A tile of sums stays in registers while the inner dimension passes by: 6 rows of 2 registers of
//! AVX2's 16, or 8 rows of 2 of AVX-512's 32. Fewer rows are wider where that is possible, because
//! a chain of multiply-adds waits four cycles for each of its steps, so there must be at least
//! eight chains.

use std::arch::x86_64::{
    __m256, __m512, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use super::Product;

/// Makes a module with the product for one instruction set.
///
/// Tiles of up to `$low` rows are four registers wide, others up to `$tallest` two; what is left of
/// the columns is one or two wide.
macro_rules! kernels {
    (
        $module:ident, $features:literal, heights: [$($height:literal)*], tallest: $tallest:literal, low: $low:literal,
        register: $register:ty, lanes: $lanes:literal, zero: $zero:ident,
        load: $load:ident, store: $store:ident, broadcast: $broadcast:ident, multiply_add: $multiply_add:ident
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
            pub(in super::super) unsafe fn add(product: &Product<'_>, sums: *mut f32, stride: usize) {
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
                product: &Product<'_>,
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
                product: &Product<'_>,
                first: usize,
                sums: *mut f32,
                stride: usize,
            ) {
                let mut column = 0;
                while column < product.columns {
                    column += match (product.columns - column) / $lanes {
                        // SAFETY: by contract; so many columns are left.
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
                product: &Product<'_>,
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
                }
                // SAFETY: by contract. The panel's last row need not be followed by another, so it
                // wraps.
                let (rows_at, mut weights_at) = unsafe {
                    (rows.values.as_ptr().add(first * rows.stride), panel.values.as_ptr().add(column))
                };
                for k in 0..inner {
                    let mut weights: [$register; N] = [$zero(); N];
                    for n in 0..N {
                        // SAFETY: by contract; no alignment is asked for.
                        weights[n] = unsafe { $load(weights_at.add(n * $lanes)) };
                    }
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

kernels!(
    avx2, "avx2,fma", heights: [1 2 3 4 5 6], tallest: 6, low: 3,
    register: __m256, lanes: 8, zero: _mm256_setzero_ps,
    load: _mm256_loadu_ps, store: _mm256_storeu_ps, broadcast: _mm256_set1_ps, multiply_add: _mm256_fmadd_ps
);

kernels!(
    avx512, "avx512f,avx512bw,avx512vl,avx2,fma", heights: [1 2 3 4 5 6 7 8], tallest: 8, low: 2,
    register: __m512, lanes: 16, zero: _mm512_setzero_ps,
    load: _mm512_loadu_ps, store: _mm512_storeu_ps, broadcast: _mm512_set1_ps, multiply_add: _mm512_fmadd_ps
);
