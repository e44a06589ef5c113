//! The register tile that all matrix products are made of.
//!
//! Rows times a *panel* of columns, [`PANEL`] of them for weights and keys. An output element is one chain of fused multiply-adds over the
//! inner dimension, from first to last; neither the number of rows in a call nor the instruction set changes
//! that chain. This is what makes the answer for a row independent of what shares its batch.

use super::isa::per_isa;

/// Columns of a panel. Also the number of keys in a page, so that a page of keys is a panel.
pub const PANEL: usize = 32;

/// Adds to `sums` the product of `R` rows of `inner` values, `stride` apart in `rows`, and `inner` rows of `W` values,
/// `panel_stride` apart in `panel`.
#[inline(always)]
pub(crate) fn accumulate<const R: usize, const W: usize>(
    rows: &[f32],
    stride: usize,
    inner: usize,
    panel: &[f32],
    panel_stride: usize,
    sums: &mut [[f32; W]; R],
) {
    // A local copy stays in registers during the loop; what others can point at would be stored every time.
    let mut registers = *sums;
    let rows: [&[f32]; R] = std::array::from_fn(|row| &rows[row * stride..][..inner]);
    for k in 0..inner {
        let weights = &panel[k * panel_stride..][..W];
        for row in 0..R {
            let value = rows[row][k];
            for column in 0..W {
                registers[row][column] = value.mul_add(weights[column], registers[row][column]);
            }
        }
    }
    *sums = registers;
}

/// Most rows that attention multiplies at a time.
pub(crate) const TALLEST: usize = 8;

per_isa! {
    /// Adds to `sums`, rows `sums_stride` apart, the products of as many rows of `inner` values, `stride` apart, and `inner`
    /// rows of `columns` values (a panel or half of one), `panel_stride` apart.
    ///
    /// A function of its own, never inlined, so that the sums stay in registers.
    pub(crate) fn multiply_rows(rows: &[f32], stride: usize, inner: usize, panel: &[f32], panel_stride: usize, columns: usize,
        sums: &mut [f32], sums_stride: usize) = multiply_rows_body
}

#[inline(always)]
fn multiply_rows_body<const R: usize>(
    rows: &[f32],
    stride: usize,
    inner: usize,
    panel: &[f32],
    panel_stride: usize,
    columns: usize,
    sums: &mut [f32],
    sums_stride: usize,
) {
    let mut row = 0;
    let mut left = sums.len().div_ceil(sums_stride);
    macro_rules! take {
        ($height:literal) => {
            while left >= $height && ($height <= 2 || R > 2) {
                let (rows, sums) = (&rows[row * stride..], &mut sums[row * sums_stride..]);
                if columns == PANEL {
                    run::<$height, PANEL>(rows, stride, inner, panel, panel_stride, sums, sums_stride);
                } else {
                    run::<$height, { PANEL / 2 }>(
                        rows,
                        stride,
                        inner,
                        panel,
                        panel_stride,
                        sums,
                        sums_stride,
                    );
                }
                row += $height;
                left -= $height;
            }
        };
    }
    take!(8);
    take!(4);
    take!(2);
    take!(1);
}

#[inline(always)]
fn run<const H: usize, const W: usize>(
    rows: &[f32],
    stride: usize,
    inner: usize,
    panel: &[f32],
    panel_stride: usize,
    sums: &mut [f32],
    sums_stride: usize,
) {
    let mut tile = [[0.0f32; W]; H];
    for (row, tile) in tile.iter_mut().enumerate() {
        tile.copy_from_slice(&sums[row * sums_stride..][..W]);
    }
    accumulate(rows, stride, inner, panel, panel_stride, &mut tile);
    for (row, tile) in tile.iter().enumerate() {
        sums[row * sums_stride..][..W].copy_from_slice(tile);
    }
}

/// A matrix that several threads write at once, each its own rectangle.
#[derive(Clone, Copy)]
pub(crate) struct SharedMatrix<'a> {
    values: *mut f32,
    len: usize,
    columns: usize,
    _borrow: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer is only used by `row_segment`, whose contract forbids overlapping access.
unsafe impl Send for SharedMatrix<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedMatrix<'_> {}

impl<'a> SharedMatrix<'a> {
    /// Row-major values, `columns` wide.
    pub(crate) fn new(values: &'a mut [f32], columns: usize) -> Self {
        Self { values: values.as_mut_ptr(), len: values.len(), columns, _borrow: std::marker::PhantomData }
    }

    /// The same values in rows of another width.
    #[inline(always)]
    pub(crate) fn with_columns(self, columns: usize) -> Self {
        Self { columns, ..self }
    }

    /// Width of a row.
    #[inline(always)]
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// `width` values of a row from `column` on.
    ///
    /// # Safety
    ///
    /// While the returned slice lives, no other call may return a slice that overlaps it. Bounds are checked.
    #[inline(always)]
    pub(crate) unsafe fn row_segment(&self, row: usize, column: usize, width: usize) -> &'a mut [f32] {
        let start = row * self.columns + column;
        assert!(column + width <= self.columns && start + width <= self.len, "segment within the matrix");
        // SAFETY: in bounds by the assertion, within the borrow by the lifetime, exclusive by contract.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(start), width) }
    }
}
