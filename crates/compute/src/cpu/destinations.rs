//! Where the keys and values of a step's rows go, and that no place is written twice.
//!
//! Place in the flow: a batch notes where each row goes, and has it checked before a forward pass. The
//! threads that write pages ([`page_writes`](super::page_writes)) rely on that check.
//!
//! What must not be here: who may write which page.

use std::ops::Deref;

use super::pages::{Destination, PAGE_SIZE};

/// Where the rows of a step go.
///
/// Invariant: when `is_distinct` is set, no place is there twice. Threads rely on it to write without
/// asking each other.
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

    /// Whether a check found no place there twice, and nothing was added since.
    pub(super) fn is_distinct(&self) -> bool {
        self.is_distinct
    }

    /// Checks that no place is there twice, and no page both as a context page and as a branch page:
    /// their layouts differ.
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

#[cfg(test)]
pub(super) mod tests {
    use std::ops::Range;

    use beamline_kv_cache::PageId;

    use super::*;

    pub(in crate::cpu) fn context(
        positions: Range<usize>,
        pages: &[u32],
    ) -> impl Iterator<Item = Destination> {
        positions.map(|position| Destination::Context {
            page: PageId(pages[position / PAGE_SIZE]),
            offset: position % PAGE_SIZE,
        })
    }

    pub(in crate::cpu) fn branch(page: u32, offset: usize) -> Destination {
        Destination::Branch { page: PageId(page), offset }
    }

    pub(in crate::cpu) fn checked(
        all: impl IntoIterator<Item = Destination>,
    ) -> Result<Destinations, String> {
        let mut destinations = Destinations::default();
        all.into_iter().for_each(|destination| destinations.push(destination));
        destinations.check().map(|()| destinations)
    }

    #[test]
    fn a_place_is_written_once() {
        assert!(checked(context(0..40, &[1, 2]).chain([branch(0, 0), branch(0, 31)])).is_ok());
        for twice in [context(39..40, &[1, 2]).next().unwrap(), branch(0, 31), branch(1, 31), branch(0, 32)] {
            let all = context(0..40, &[1, 2]).chain([branch(0, 0), branch(0, 31), twice]);
            assert!(checked(all).is_err(), "{twice:?}");
        }
    }
}
