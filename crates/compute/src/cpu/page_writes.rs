//! Writing the keys and values of a step's rows into pages, by several threads at once.
//!
//! Place in the flow: the thread that projects a group of rows writes their keys and values right away,
//! while they lie in its own core's cache. Reading them from another core's takes longer than writing
//! them does.
//!
//! Keys of context pages are stored transposed: a row's key goes to a column. So consecutive positions
//! of a page are transposed together, a square at a time.
//!
//! What must not be here: who may write which page.

use std::ops::Range;
use std::sync::Arc;

use super::destinations::Destinations;
use super::isa::Isa;
use super::pages::{Destination, PAGE_SIZE};
use super::parallel::Split;
use super::stored::Stored;
use super::tile::SharedMatrix;
use super::turn::{SQUARE, turn};
use super::{Bf16, Cpu};

/// New rows of a layer, with their keys and values among other columns.
#[derive(Clone, Copy, Debug)]
pub struct NewRows<'a> {
    /// Projected rows, `[rows, width]`.
    pub rows: &'a [f32],
    /// Width of a row.
    pub width: usize,
    /// Column of the first head's key; those of the others follow.
    pub keys: usize,
    /// Column of the first head's value.
    pub values: usize,
}

/// The right to write some rows of a layer, once. It cannot be copied, and its parts are of different
/// rows. So no place is written by two threads.
pub struct PageWrites<'a> {
    heads: Arc<[HeadWriter<'a>]>,
    destinations: &'a [Destination],
}

/// The same right, cut into parts of this number of rows.
pub struct PageWritesInParts<'a>(PageWrites<'a>, usize);

/// One head of the layer, in either format.
#[derive(Clone, Copy)]
pub(super) enum HeadWriter<'a> {
    F32(Writer<'a, f32>),
    Bf16(Writer<'a, Bf16>),
}

/// One head of the layer.
#[derive(Clone, Copy)]
pub(super) struct Writer<'a, T> {
    pub(super) key_dim: usize,
    pub(super) value_dim: usize,
    /// `[page and dimension, PAGE_SIZE]`, as context pages have them.
    pub(super) keys: SharedMatrix<'a, T>,
    /// `[page and offset, value_width]`.
    pub(super) values: SharedMatrix<'a, T>,
}

impl<'a> Split for PageWritesInParts<'a> {
    type Part = PageWrites<'a>;

    fn parts(&self) -> usize {
        self.0.destinations.len().div_ceil(self.1)
    }

    unsafe fn part(&self, index: usize) -> PageWrites<'a> {
        // By contract each number is given once, so no two parts have a row in common.
        let rows = index * self.1..self.0.destinations.len().min((index + 1) * self.1);
        PageWrites { heads: Arc::clone(&self.0.heads), destinations: &self.0.destinations[rows] }
    }
}

impl<'a> PageWrites<'a> {
    pub(super) fn new(heads: Vec<HeadWriter<'a>>, destinations: &'a Destinations) -> Self {
        assert!(destinations.is_distinct(), "destinations are checked before anything is written");
        Self { heads: heads.into(), destinations }
    }

    /// Cuts it into parts of `rows` rows.
    pub fn in_parts(self, rows: usize) -> PageWritesInParts<'a> {
        PageWritesInParts(self, rows)
    }

    /// Writes the keys and values of its rows.
    pub fn write(self, cpu: &Cpu, new: NewRows<'_>) {
        assert_eq!(new.rows.len(), self.destinations.len() * new.width, "a row for every destination");
        cpu.each(self.heads.len(), 1, |index| {
            match self.heads[index] {
                // SAFETY: only this holds the right to write the places of its rows.
                HeadWriter::F32(head) => unsafe {
                    write_head(cpu.isa(), head, self.destinations, new, index)
                },
                // SAFETY: as above.
                HeadWriter::Bf16(head) => unsafe {
                    write_head(cpu.isa(), head, self.destinations, new, index)
                },
            }
        });
    }
}

/// Writes the keys and values of all rows with one head.
///
/// # Safety
///
/// No place is among the destinations twice, and nobody else reads or writes one of them at the same time.
unsafe fn write_head<T: Stored>(
    isa: Isa,
    head: Writer<'_, T>,
    destinations: &[Destination],
    new: NewRows<'_>,
    index: usize,
) {
    let (keys, values) = (new.keys + index * head.key_dim, new.values + index * head.value_dim);
    let mut first = 0;
    while first < destinations.len() {
        let count = run(&destinations[first..]);
        let rows = first..first + count;
        // SAFETY: by contract.
        unsafe { write_run(isa, head, destinations[first], new, rows, keys, values) };
        first += count;
    }
}

/// How many destinations from the first on are consecutive positions of one context page; 1 for any other.
fn run(destinations: &[Destination]) -> usize {
    let Some(&Destination::Context { page, offset }) = destinations.first() else { return 1 };
    let continues = |(index, destination): &(usize, &Destination)| {
        **destination == Destination::Context { page, offset: offset + index }
    };
    destinations.iter().enumerate().take_while(continues).count()
}

/// Writes rows to consecutive places from `destination` on. Their keys and values are in columns from
/// `keys` and `values` on.
///
/// # Safety
///
/// Nobody else reads or writes these places at the same time.
unsafe fn write_run<T: Stored>(
    isa: Isa,
    head: Writer<'_, T>,
    destination: Destination,
    new: NewRows<'_>,
    rows: Range<usize>,
    keys: usize,
    values: usize,
) {
    let key = &new.rows[rows.start * new.width + keys..];
    let (page, offset) = match destination {
        Destination::Cached => return,
        Destination::Context { page, offset } => {
            let (count, first) = (rows.len(), page.0 as usize * head.key_dim);
            // SAFETY: by contract.
            unsafe { write_across(isa, head.keys, first, offset, count, head.key_dim, key, new.width) };
            (page, offset)
        }
        Destination::Branch { page, offset } => {
            let row = page.0 as usize * PAGE_SIZE + offset;
            // SAFETY: by contract. A branch page is not a context page at the same time.
            let out = unsafe { head.keys.with_columns(head.key_dim).row_segment(row, 0, head.key_dim) };
            T::put(isa, &key[..head.key_dim], out);
            (page, offset)
        }
    };
    for (index, row) in rows.enumerate() {
        let place = page.0 as usize * PAGE_SIZE + offset + index;
        // SAFETY: by contract.
        let out = unsafe { head.values.row_segment(place, 0, head.value_dim) };
        T::put(isa, &new.rows[row * new.width + values..][..head.value_dim], out);
    }
}

/// Writes `rows` rows of `columns` values, `width` apart, transposed into a matrix: one column per row
/// from `first_column` on, one row per value from `first_row` on.
///
/// # Safety
///
/// Nobody else reads or writes these places at the same time.
unsafe fn write_across<T: Stored>(
    isa: Isa,
    out: SharedMatrix<'_, T>,
    first_row: usize,
    first_column: usize,
    rows: usize,
    columns: usize,
    from: &[f32],
    width: usize,
) {
    let (mut square, mut spare) = ([[0.0; SQUARE]; SQUARE], [[T::zeroed(); SQUARE]; SQUARE]);
    for top in (0..rows).step_by(SQUARE) {
        let height = SQUARE.min(rows - top);
        for left in (0..columns).step_by(SQUARE) {
            let across = SQUARE.min(columns - left);
            for (row, square) in square[..height].iter_mut().enumerate() {
                let from = &from[(top + row) * width + left..];
                match from.first_chunk() {
                    // What is not wanted of it is not written.
                    Some(from) => *square = *from,
                    None => square[..across].copy_from_slice(&from[..across]),
                }
            }
            turn(isa, &mut square);
            let square = T::put_square(isa, &square, &mut spare);
            for (column, square) in square[..across].iter().enumerate() {
                // SAFETY: by contract.
                let out = unsafe { out.row_segment(first_row + left + column, first_column + top, height) };
                match <&mut [T; SQUARE]>::try_from(&mut *out) {
                    Ok(out) => *out = *square,
                    Err(_) => out.copy_from_slice(&square[..height]),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use beamline_kv_cache::{PageContents, PageId};

    use super::*;
    use crate::cpu::destinations::tests::{branch, checked, context};
    use crate::cpu::kv_format::KvFormat;
    use crate::cpu::pages::{PageShape, PageStore};
    use crate::cpu::parallel::read;

    #[test]
    fn rows_go_where_they_would_go_one_by_one() {
        // Pages that are not in order, a run that begins within a page, rows that are cached, branch rows.
        let all = context(5..81, &[4, 0, 3]).chain([Destination::Cached; 3]).chain(context(0..17, &[1]));
        let destinations = checked(all.chain([7, 8, 30].map(|offset| branch(2, offset)))).unwrap();
        for (heads, key_dim, value_dim) in [(3, 64, 64), (2, 20, 33), (1, 7, 5)] {
            let width = heads * (key_dim + value_dim) + 9;
            let number = |i: usize| ((i as u32).wrapping_mul(0x9e37_79b9) >> 8) as f32 + 1.0;
            let rows: Vec<f32> = (0..destinations.len() * width).map(number).collect();
            let (keys, values) = (4, 4 + heads * key_dim + 5);
            for format in KvFormat::ALL {
                let shape = PageShape { format, layers: 1, heads, key_dim, value_dim };
                let (mut expected, mut written) =
                    (PageStore::new(shape, 5).unwrap(), PageStore::new(shape, 5).unwrap());
                for (head, (row, destination)) in (0..heads)
                    .flat_map(|head| rows.chunks_exact(width).zip(&*destinations).map(move |row| (head, row)))
                {
                    let key = &row[keys + head * key_dim..][..key_dim];
                    let value = &row[values + head * value_dim..][..value_dim];
                    expected.write(0, head, *destination, key, value);
                }
                let cpu = Cpu::new(3).unwrap();
                let parts = (read(&rows, 10 * width), written.writes(0, &destinations).in_parts(10));
                cpu.each_part(parts, |_, (rows, writes)| {
                    writes.write(&cpu.alone(), NewRows { rows, width, keys, values });
                });
                for page in (0..5).map(PageId) {
                    let contents = |store: &PageStore| {
                        let mut bytes = vec![0; store.page_bytes()];
                        store.export(page, &mut bytes).unwrap();
                        bytes
                    };
                    assert!(contents(&written) == contents(&expected), "page {page:?} in {format}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "checked")]
    fn nothing_is_written_before_a_check() {
        let mut destinations = checked(context(0..3, &[0])).unwrap();
        destinations.push(branch(1, 0));
        let shape = PageShape { format: KvFormat::F32, layers: 1, heads: 1, key_dim: 4, value_dim: 4 };
        PageStore::new(shape, 2).unwrap().writes(0, &destinations);
    }
}
