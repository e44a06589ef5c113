//! Writing the keys and values of a step's rows into pages, by several threads at once.
//!
//! Place in the flow: whoever projects a group of rows writes their keys and values right away, while they lie in its own
//! core's cache. Reading them from another core's takes longer than writing them does.
//!
//! Keys of context pages are stored across: a row's key goes to a column. So consecutive positions of a page are turned
//! around together, a square at a time.
//!
//! What must not be here: who may write which page.

use std::ops::{Deref, Range};
use std::sync::Arc;

use super::Cpu;
use super::isa::{Isa, Level};
use super::pages::{Destination, PAGE_SIZE};
use super::parallel::Split;
use super::tile::SharedMatrix;

/// Rows and columns that are turned around at a time.
const SQUARE: usize = 16;

/// Where the rows of a step go.
///
/// Invariant: when it is said to be distinct, no place is there twice. All writing without asking each other rests on it.
#[derive(Debug, Default)]
pub struct Destinations {
    list: Vec<Destination>,
    is_distinct: bool,
    /// Per page: what was seen of it in a check.
    seen: Vec<Seen>,
    checks: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    check: u64,
    /// A bit for each row of the page.
    rows: u32,
    is_branch: bool,
}

impl Destinations {
    /// Makes it empty and keeps its memory.
    pub fn clear(&mut self) {
        self.list.clear();
        self.is_distinct = false;
    }

    /// Adds a row's.
    pub fn push(&mut self, destination: Destination) {
        self.list.push(destination);
        self.is_distinct = false;
    }

    /// Checks that no place is there twice, and no page both as a context page and as a branch page, which lie differently.
    ///
    /// # Errors
    ///
    /// Which place is.
    pub fn check(&mut self) -> Result<(), String> {
        self.checks += 1;
        for destination in &self.list {
            let (page, offset, is_branch) = match *destination {
                Destination::Cached => continue,
                Destination::Context { page, offset } => (page, offset, false),
                Destination::Branch { page, offset } => (page, offset, true),
            };
            let index = page.0 as usize;
            if self.seen.len() <= index {
                self.seen.resize(index + 1, Seen::default());
            }
            let seen = &mut self.seen[index];
            if seen.check != self.checks {
                *seen = Seen { check: self.checks, rows: 0, is_branch };
            }
            if offset >= PAGE_SIZE || seen.rows >> offset & 1 == 1 || seen.is_branch != is_branch {
                return Err(format!("row {offset} of page {index} is written twice"));
            }
            seen.rows |= 1 << offset;
        }
        self.is_distinct = true;
        Ok(())
    }
}

impl Deref for Destinations {
    type Target = [Destination];

    fn deref(&self) -> &[Destination] {
        &self.list
    }
}

/// New rows of a layer, with their keys and values among other columns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewRows<'a> {
    /// `[rows, width]`.
    pub(crate) rows: &'a [f32],
    /// Width of a row.
    pub(crate) width: usize,
    /// Column of the first head's key; those of the others follow.
    pub(crate) keys: usize,
    /// Column of the first head's value.
    pub(crate) values: usize,
}

/// The right to write some rows of a layer, once. As it cannot be copied, and its parts are of different rows, no place is
/// written by two threads.
pub(crate) struct PageWrites<'a> {
    heads: Arc<[HeadWriter<'a>]>,
    destinations: &'a [Destination],
}

/// The same, cut into parts of so many rows.
pub(crate) struct PageWritesInParts<'a>(PageWrites<'a>, usize);

/// One head of the layer.
#[derive(Clone, Copy)]
pub(super) struct HeadWriter<'a> {
    pub(super) key_dim: usize,
    pub(super) value_dim: usize,
    /// `[page and dimension, PAGE_SIZE]`, as context pages have them.
    pub(super) keys: SharedMatrix<'a>,
    /// `[page and offset, value_width]`.
    pub(super) values: SharedMatrix<'a>,
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
        assert!(destinations.is_distinct, "destinations are checked before anything is written");
        Self { heads: heads.into(), destinations }
    }

    /// Cuts it into parts of `rows` rows.
    pub(crate) fn in_parts(self, rows: usize) -> PageWritesInParts<'a> {
        PageWritesInParts(self, rows)
    }

    /// Writes the keys and values of its rows.
    pub(crate) fn write(self, cpu: &Cpu, new: NewRows<'_>) {
        assert_eq!(new.rows.len(), self.destinations.len() * new.width, "a row for every destination");
        cpu.each(self.heads.len(), 1, |index| {
            let head = self.heads[index];
            let (keys, values) = (new.keys + index * head.key_dim, new.values + index * head.value_dim);
            let mut first = 0;
            while first < self.destinations.len() {
                let count = run(&self.destinations[first..]);
                let rows = first..first + count;
                // SAFETY: no place is in the list twice, and only this holds the right to write those of its rows.
                unsafe { write_run(cpu.isa(), head, self.destinations[first], new, rows, keys, values) };
                first += count;
            }
        });
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

/// Writes rows to consecutive places from `destination` on; their keys and values are in columns from `keys` and `values` on.
///
/// # Safety
///
/// Nobody else reads or writes these places at the same time.
unsafe fn write_run(
    isa: Isa,
    head: HeadWriter<'_>,
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
            out.copy_from_slice(&key[..head.key_dim]);
            (page, offset)
        }
    };
    for (index, row) in rows.enumerate() {
        let place = page.0 as usize * PAGE_SIZE + offset + index;
        // SAFETY: by contract.
        let out = unsafe { head.values.row_segment(place, 0, head.value_dim) };
        out.copy_from_slice(&new.rows[row * new.width + values..][..head.value_dim]);
    }
}

/// Writes `rows` rows of `columns` values, `width` apart, to as many columns of a matrix from `first_column` on, its rows
/// beginning with `first_row`.
///
/// # Safety
///
/// Nobody else reads or writes these places at the same time.
unsafe fn write_across(
    isa: Isa,
    out: SharedMatrix<'_>,
    first_row: usize,
    first_column: usize,
    rows: usize,
    columns: usize,
    from: &[f32],
    width: usize,
) {
    let mut square = [[0.0f32; SQUARE]; SQUARE];
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
            for (column, square) in square[..across].iter().enumerate() {
                // SAFETY: by contract.
                let out = unsafe { out.row_segment(first_row + left + column, first_column + top, height) };
                match <&mut [f32; SQUARE]>::try_from(&mut *out) {
                    Ok(out) => *out = *square,
                    Err(_) => out.copy_from_slice(&square[..height]),
                }
            }
        }
    }
}

/// Makes rows columns.
fn turn(isa: Isa, square: &mut [[f32; SQUARE]; SQUARE]) {
    #[cfg(target_arch = "x86_64")]
    if isa.level() >= Level::Avx512 {
        // SAFETY: an `Isa` of this level exists only if the machine was found to have its features.
        return unsafe { wide::turn(square) };
    }
    let _ = isa;
    for row in 0..SQUARE {
        for column in 0..row {
            let (above, below) = square.split_at_mut(row);
            std::mem::swap(&mut above[column][row], &mut below[0][column]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod wide {
    //! Spelled out: left to itself, the compiler takes the values one by one.

    use std::arch::x86_64::{
        __m512, _mm512_castpd_ps, _mm512_castps_pd, _mm512_loadu_ps, _mm512_shuffle_f32x4, _mm512_storeu_ps,
        _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
    };

    use super::SQUARE;

    /// Squares of 4 by 4 are turned within each quarter of the registers, then quarters change places.
    #[target_feature(enable = "avx512f")]
    pub(super) fn turn(square: &mut [[f32; SQUARE]; SQUARE]) {
        // SAFETY: 16 values are read from 16 values; no alignment is asked for.
        let mut rows: [__m512; SQUARE] =
            std::array::from_fn(|row| unsafe { _mm512_loadu_ps(square[row].as_ptr()) });
        for four in rows.as_chunks_mut::<4>().0 {
            let [a, b, c, d] = *four;
            let pairs = [
                [_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d)],
                [_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d)],
            ];
            for (half, [ab, cd]) in pairs.into_iter().enumerate() {
                let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                four[2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
                four[2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            }
        }
        for within in 0..4 {
            let [a, b, c, d] = [0, 1, 2, 3].map(|four| rows[4 * four + within]);
            // Quarters 0 and 2, and quarters 1 and 3, of two registers each.
            let even = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d)];
            let odd = [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d)];
            let turned = [
                _mm512_shuffle_f32x4::<0x88>(even[0], even[1]),
                _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]),
                _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]),
                _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]),
            ];
            for (quarter, turned) in turned.into_iter().enumerate() {
                // SAFETY: 16 values are written to 16 values; no alignment is asked for.
                unsafe { _mm512_storeu_ps(square[4 * quarter + within].as_mut_ptr(), turned) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use beamline_kv_cache::PageId;

    use super::*;
    use crate::cpu::pages::PageStore;
    use crate::cpu::parallel::read;

    fn context(positions: Range<usize>, pages: &[u32]) -> impl Iterator<Item = Destination> {
        positions.map(|position| Destination::Context {
            page: PageId(pages[position / PAGE_SIZE]),
            offset: position % PAGE_SIZE,
        })
    }

    fn branch(page: u32, offset: usize) -> Destination {
        Destination::Branch { page: PageId(page), offset }
    }

    fn checked(all: impl IntoIterator<Item = Destination>) -> Result<Destinations, String> {
        let mut destinations = Destinations::default();
        all.into_iter().for_each(|destination| destinations.push(destination));
        destinations.check().map(|()| destinations)
    }

    #[test]
    fn rows_go_where_they_would_go_one_by_one() {
        // Pages that are not in order, a run that begins within a page, rows that are cached, branch rows.
        let all = context(5..81, &[4, 0, 3]).chain([Destination::Cached; 3]).chain(context(0..17, &[1]));
        let destinations = checked(all.chain([7, 8, 30].map(|offset| branch(2, offset)))).unwrap();
        for (heads, key_dim, value_dim) in [(3, 64, 64), (2, 20, 33), (1, 7, 5)] {
            let width = heads * (key_dim + value_dim) + 9;
            let rows: Vec<f32> = (0..destinations.len() * width).map(|i| i as f32 + 1.0).collect();
            let (keys, values) = (4, 4 + heads * key_dim + 5);
            let store = || PageStore::new(1, heads, key_dim, value_dim, 5).unwrap();
            let (mut expected, mut written) = (store(), store());
            for (head, pages) in expected.layer_mut(0).iter_mut().enumerate() {
                for (row, destination) in rows.chunks_exact(width).zip(&*destinations) {
                    let key = &row[keys + head * key_dim..][..key_dim];
                    pages.write(*destination, key, &row[values + head * value_dim..][..value_dim]);
                }
            }
            let cpu = Cpu::new(3).unwrap();
            let parts = (read(&rows, 10 * width), written.writes(0, &destinations).in_parts(10));
            cpu.each_part(parts, |_, (rows, writes)| {
                writes.write(&cpu.alone(), NewRows { rows, width, keys, values });
            });
            for (written, expected) in written.layer(0).iter().zip(expected.layer(0)) {
                for page in (0..5).map(PageId) {
                    assert_eq!(written.context_keys(page), expected.context_keys(page));
                    assert_eq!(written.values(page), expected.values(page));
                }
            }
        }
    }

    #[test]
    fn a_square_is_turned_with_every_instruction_set() {
        for isa in Isa::all() {
            let mut square =
                std::array::from_fn(|row| std::array::from_fn(|column| (16 * row + column) as f32));
            turn(isa, &mut square);
            for (row, values) in square.iter().enumerate() {
                assert_eq!(*values, std::array::from_fn(|column| (16 * column + row) as f32));
            }
        }
    }

    #[test]
    fn a_place_is_written_once() {
        assert!(checked(context(0..40, &[1, 2]).chain([branch(0, 0), branch(0, 31)])).is_ok());
        for twice in [context(39..40, &[1, 2]).next().unwrap(), branch(0, 31), branch(1, 31), branch(0, 32)] {
            let all = context(0..40, &[1, 2]).chain([branch(0, 0), branch(0, 31), twice]);
            assert!(checked(all).is_err(), "{twice:?}");
        }
    }

    #[test]
    #[should_panic(expected = "checked")]
    fn nothing_is_written_before_a_check() {
        let mut destinations = checked(context(0..3, &[0])).unwrap();
        destinations.push(branch(1, 0));
        PageStore::new(1, 1, 4, 4, 2).unwrap().writes(0, &destinations);
    }
}
