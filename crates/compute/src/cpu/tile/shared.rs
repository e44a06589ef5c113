//! A matrix that several threads write at once.

/// A matrix that several threads write at once, each its own rectangle.
#[derive(Clone, Copy)]
pub(crate) struct SharedMatrix<'a, T = f32> {
    values: *mut T,
    len: usize,
    columns: usize,
    _borrow: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: the pointer is only used by `row_segment`, whose contract forbids overlapping access.
unsafe impl<T: Send> Send for SharedMatrix<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMatrix<'_, T> {}

impl<'a, T> SharedMatrix<'a, T> {
    /// Row-major values, `columns` wide.
    pub(crate) fn new(values: &'a mut [T], columns: usize) -> Self {
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
    /// While the returned slice lives, no other call may return a slice that overlaps it. Bounds
    /// are checked.
    #[inline(always)]
    pub(crate) unsafe fn row_segment(&self, row: usize, column: usize, width: usize) -> &'a mut [T] {
        let start = row * self.columns + column;
        assert!(column + width <= self.columns && start + width <= self.len, "segment within the matrix");
        // SAFETY: in bounds by the assertion, within the borrow by the lifetime, exclusive by contract.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(start), width) }
    }
}
