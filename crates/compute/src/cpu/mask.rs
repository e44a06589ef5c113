//! Who sees whom in HSTU: one predicate for every variant.
//!
//! A sequence is `contextual | history | targets`. Contextual and history rows are *context* here, at
//! positions from 0 on. Targets are *branch* rows: they see the context and themselves, and have no
//! position of their own. Each row has an *id* by which distances are measured:
//!
//! ```text
//! C = contextual rows in the mask, W = window (0: none), F = rows at the end that see past the window
//! id(i) = i, or max(i - C + 1, 0) if C > 0;  M = id after the last context row, shared by all targets
//! d = id(row) - id(column)
//! sees = (row == column or d > 0) and (W == 0 or d <= W or (F > 0 and id(row) >= M - F))
//!        or C > 0 and id(row) == 0                       contextual rows see all of the context
//! ```
//!
//! The kernel uses it for every mask but the plain causal one, which is a special case with a shorter way.

use super::pages::PAGE_SIZE;

/// What is masked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mask {
    /// Leading rows that see the whole context.
    pub contextual: usize,
    /// Ids further back than this are not seen; 0: all are.
    pub window: usize,
    /// Ids at the end of the context whose rows see past the window.
    pub full_tail: usize,
}

/// A row that looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Viewer {
    /// A context row.
    Context {
        /// Position of the row.
        position: usize,
    },
    /// A branch row: a target.
    Branch,
}

impl Mask {
    /// Whether every context row sees the positions up to its own and every branch row the whole context.
    pub fn is_causal(self) -> bool {
        self.contextual == 0 && self.window == 0
    }

    /// Whether what a row sees depends on the length of the context. Its keys and values then do not
    /// serve a longer context.
    pub fn depends_on_length(self) -> bool {
        self.contextual > 0 || (self.window > 0 && self.full_tail > 0)
    }

    /// Whether a row sees a context column.
    pub fn sees(self, context_len: usize, viewer: Viewer, column: usize) -> bool {
        let id = |position: usize| match self.contextual {
            0 => position,
            contextual => (position + 1).saturating_sub(contextual),
        };
        let end = id(context_len);
        let own = match viewer {
            Viewer::Context { position } => id(position),
            Viewer::Branch => end,
        };
        let distance = own as isize - id(column) as isize;
        let itself = viewer == Viewer::Context { position: column };
        let near = self.window == 0
            || distance <= self.window as isize
            || (self.full_tail > 0 && own + self.full_tail >= end);
        ((itself || distance > 0) && near) || (self.contextual > 0 && own == 0)
    }

    /// The columns of a page that a row sees, bit by bit.
    #[inline(always)]
    pub(crate) fn page(self, context_len: usize, viewer: Viewer, page: usize) -> u32 {
        let first = page * PAGE_SIZE;
        if self.is_causal() {
            let end = match viewer {
                Viewer::Context { position } => position + 1,
                Viewer::Branch => context_len,
            };
            return first_bits(end.saturating_sub(first));
        }
        let columns = first..context_len.min(first + PAGE_SIZE);
        columns.fold(0, |bits, column| {
            bits | (u32::from(self.sees(context_len, viewer, column)) << (column - first))
        })
    }

    /// Pages that a context row sees something of, counted from 0.
    pub(crate) fn pages(self, context_len: usize, last_position: usize, first_position: usize) -> usize {
        let end = if first_position < self.contextual { context_len } else { last_position + 1 };
        end.div_ceil(PAGE_SIZE)
    }
}

/// The lowest bits, all if there are that many.
#[inline(always)]
fn first_bits(count: usize) -> u32 {
    if count >= PAGE_SIZE { u32::MAX } else { (1 << count) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of a sequence with targets as strings of 0 and 1.
    fn picture(mask: Mask, context_len: usize, targets: usize) -> Vec<String> {
        let row = |row: usize| {
            let column = |column: usize| match (row < context_len, column < context_len) {
                (true, true) => mask.sees(context_len, Viewer::Context { position: row }, column),
                (false, true) => mask.sees(context_len, Viewer::Branch, column),
                (_, false) => row == column,
            };
            (0..context_len + targets).map(|c| if column(c) { '1' } else { '0' }).collect()
        };
        (0..context_len + targets).map(row).collect()
    }

    #[test]
    fn the_worked_example_of_the_reference() {
        let mask = Mask { contextual: 2, ..Mask::default() };
        let expected = "11111000 11111000 11100000 11110000 11111000 11111100 11111010 11111001".split(' ');
        assert_eq!(picture(mask, 5, 3), expected.collect::<Vec<_>>());
        assert!(mask.depends_on_length());
    }

    #[test]
    fn windows_are_measured_from_the_shared_id_of_the_targets() {
        let mask = Mask { window: 2, ..Mask::default() };
        assert_eq!(picture(mask, 4, 2), ["100000", "110000", "111000", "011100", "001110", "001101"]);
        let mask = Mask { window: 1, full_tail: 1, ..Mask::default() };
        assert_eq!(picture(mask, 4, 1), ["10000", "11000", "01100", "11110", "11111"]);
    }

    #[test]
    fn bits_of_a_page_are_the_predicate() {
        for mask in [
            Mask::default(),
            Mask { contextual: 3, ..Mask::default() },
            Mask { window: 40, full_tail: 2, contextual: 1 },
        ] {
            for context_len in [3, 31, 32, 33, 70] {
                for viewer in
                    (0..context_len).map(|position| Viewer::Context { position }).chain([Viewer::Branch])
                {
                    for page in 0..3 {
                        let bits = mask.page(context_len, viewer, page);
                        for column in page * PAGE_SIZE..context_len.min((page + 1) * PAGE_SIZE) {
                            let expected = mask.sees(context_len, viewer, column);
                            assert_eq!(
                                bits >> (column % PAGE_SIZE) & 1 == 1,
                                expected,
                                "{mask:?} {viewer:?} {column}"
                            );
                        }
                    }
                }
            }
        }
    }
}
