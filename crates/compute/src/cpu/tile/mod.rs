//! The product that attention is made of: some rows times a panel of columns, added to sums.
//!
//! ```text
//! mod       the product, its checks, and the kernel for machines that have none of their own
//! x86       the kernels for AVX2 and AVX-512, spelled out
//! shared    a matrix that several threads write at once
//! ```
//!
//! An output element is one chain of fused multiply-adds over the inner dimension, from first to
//! last, that begins with what was in the sums. Neither the number of rows in a call, nor the tiles
//! they are cut into, nor the instruction set changes that chain. This is what makes the answer for
//! a row independent of what shares its batch.

mod shared;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use shared::SharedMatrix;
#[cfg(target_arch = "x86_64")]
pub use x86::Kernels;

use super::fused::add_scaled;
use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::isa::Level;
use super::stored::Stored;

/// Numbers of panels that there are kernels for: where none are spelled out, all.
#[cfg(not(target_arch = "x86_64"))]
/// What a stored type needs of the machine: nothing here.
pub trait Kernels {}
#[cfg(not(target_arch = "x86_64"))]
impl<T> Kernels for T {}

/// Columns of a panel of weights. Also the number of keys in a page, so that a page of keys is a panel.
pub const PANEL: usize = 32;

/// Columns of a product come in multiples of this: a vector register of the widest instruction set.
pub(crate) const COLUMNS: usize = 16;

/// No instruction set has more [`rows_at_once`].
pub(crate) const MOST_ROWS: usize = 12;

/// How many rows attention had better take at a time: they fill one register tile, or two.
pub(crate) fn rows_at_once(isa: Isa) -> usize {
    match isa.level() {
        #[cfg(target_arch = "x86_64")]
        level if level >= Level::Avx512 => x86::avx512::TALLEST,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => 2 * x86::avx2::TALLEST,
        _ => 2 * TALLEST,
    }
}

/// Rows of values, `stride` apart.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a, T = f32> {
    /// All values, row after row.
    pub values: &'a [T],
    /// From the first value of a row to that of the next.
    pub stride: usize,
}

/// `height` rows of `inner` values, times `inner` rows of `columns` values.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a, T = f32> {
    /// The rows on the left.
    pub rows: Strided<'a>,
    /// The matrix on the right, widened to single precision as it is read.
    pub panel: Strided<'a, T>,
    /// Rows on the left.
    pub height: usize,
    /// Values of a row on the left, which is rows of the panel.
    pub inner: usize,
    /// Columns of the panel, a multiple of [`COLUMNS`].
    pub columns: usize,
}

impl<T: Stored> Product<'_, T> {
    /// Adds the product to sums, whose rows lie `stride` apart.
    pub(crate) fn add_to(self, isa: Isa, sums: &mut [f32], stride: usize) {
        if self.height == 0 || self.inner == 0 || self.columns == 0 {
            return;
        }
        self.check(sums.len(), stride);
        match isa.level() {
            // SAFETY: an `Isa` of this level exists only if the machine was found to have its
            // features. All rows lie within their slices, which was checked.
            #[cfg(target_arch = "x86_64")]
            level if level >= Level::Avx512 => unsafe { T::avx512(&self, sums.as_mut_ptr(), stride) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { T::avx2(&self, sums.as_mut_ptr(), stride) },
            _ => add(&self, sums, stride),
        }
    }

    /// Every row of all three matrices lies within its slice.
    fn check(&self, sums: usize, stride: usize) {
        let end = |rows: usize, stride: usize, width: usize| {
            (rows - 1).checked_mul(stride).and_then(|start| start.checked_add(width))
        };
        let fits = |end: Option<usize>, len: usize| end.is_some_and(|end| end <= len);
        let Self { rows, panel, height, inner, columns } = *self;
        assert!(columns.is_multiple_of(COLUMNS), "{columns} columns");
        assert!(fits(end(height, rows.stride, inner), rows.values.len()), "rows within their slice");
        assert!(fits(end(inner, panel.stride, columns), panel.values.len()), "a panel within its slice");
        assert!(fits(end(height, stride, columns), sums), "sums within their slice");
    }
}

/// Rows of a tile where the compiler chooses the instructions.
const TALLEST: usize = 4;

fn add<T: Stored>(product: &Product<'_, T>, sums: &mut [f32], stride: usize) {
    for column in (0..product.columns).step_by(COLUMNS) {
        let mut row = 0;
        while row < product.height {
            let sums = &mut sums[row * stride + column..];
            row += match product.height - row {
                TALLEST.. => add_tile::<TALLEST, T>(product, row, column, sums, stride),
                _ => add_tile::<1, T>(product, row, column, sums, stride),
            };
        }
    }
}

/// Returns its height.
#[inline(always)]
fn add_tile<const H: usize, T: Stored>(
    product: &Product<'_, T>,
    first_row: usize,
    column: usize,
    sums: &mut [f32],
    stride: usize,
) -> usize {
    let Product { rows, panel, inner, .. } = *product;
    // Local arrays stay in registers during the loop; what others can point at would be stored
    // every time.
    let mut tile = [[0.0f32; COLUMNS]; H];
    for (row, tile) in tile.iter_mut().enumerate() {
        tile.copy_from_slice(&sums[row * stride..][..COLUMNS]);
    }
    let rows: [&[f32]; H] =
        std::array::from_fn(|row| &rows.values[(first_row + row) * rows.stride..][..inner]);
    let weights = panel.values[column..].chunks(panel.stride.max(1));
    for (k, weights) in weights.take(inner).enumerate() {
        let Some(weights) = weights.first_chunk::<COLUMNS>() else { break };
        let weights = weights.map(T::widen);
        for row in 0..H {
            add_scaled(rows[row][k], &weights, &mut tile[row]);
        }
    }
    for (row, tile) in tile.iter().enumerate() {
        sums[row * stride..][..COLUMNS].copy_from_slice(tile);
    }
    H
}
