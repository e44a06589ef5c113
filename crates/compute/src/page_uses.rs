//! Which pages a step reads and writes, and for whom: one rule for every device.
//!
//! Place in the flow: the layouts of a step, [`Batch`](crate::batch::Batch) and
//! [`Rows`](crate::cuda::rows::Rows), note here what each request does with the page table;
//! executors check it before anything runs.
//!
//! Invariant: a page that a step writes is written by one request, for one purpose, and read by no
//! other request of the step. The scheduler promises this. A broken promise would show one user
//! another's history, so it is checked again here, where it would do the harm.

use std::ops::Range;

/// Uses of the pages of one step.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PageUses {
    uses: Vec<Use>,
    /// For each page, who wrote it last.
    writers: Vec<Writer>,
    /// Counts steps, so that nothing has to be cleared between them.
    step: u64,
}

/// What one request does: ranges of the page table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Use {
    owner: u32,
    read: Range<usize>,
    written: Range<usize>,
    branch: bool,
}

/// Who wrote a page, in which step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Writer {
    step: u64,
    owner: u32,
    /// As branch rows, not as context rows.
    branch: bool,
}

impl PageUses {
    /// Begins a step.
    pub fn clear(&mut self) {
        self.uses.clear();
        self.step += 1;
    }

    /// Begins another part of the same step: what was written before counts.
    pub fn clear_part(&mut self) {
        self.uses.clear();
    }

    /// A request computes context rows. Its context lies in the pages `table` of the page table, of
    /// which it writes those from number `first_written` on.
    pub fn push_context(&mut self, owner: u32, table: Range<usize>, first_written: usize) {
        let written = (table.start + first_written).min(table.end)..table.end;
        self.uses.push(Use { owner, read: table, written, branch: false });
    }

    /// A request computes branch rows over a context. Its branch pages are its own, all of them.
    pub fn push_branch(&mut self, owner: u32, context: Range<usize>, branch: Range<usize>) {
        self.uses.push(Use { owner, read: context, written: branch, branch: true });
    }

    /// Places of the page table that are written.
    pub fn written(&self) -> impl Iterator<Item = usize> {
        self.uses.iter().flat_map(|used| used.written.clone())
    }

    /// Checks the rule over a store of `pages` pages. `page` is the page table.
    ///
    /// # Errors
    ///
    /// Which page breaks it.
    pub fn check(&mut self, pages: usize, page: impl Fn(usize) -> u32) -> Result<(), String> {
        let Self { uses, writers, step } = self;
        // From one on, so that a page that was never written is not taken for one of the first step.
        let step = *step + 1;
        writers.resize(pages, Writer::default());
        let exists = |page: u32| match (page as usize) < pages {
            true => Ok(page as usize),
            false => Err(format!("page {page} of {pages} is used")),
        };
        for Use { owner, written, branch, .. } in uses.iter() {
            let writer = Writer { step, owner: *owner, branch: *branch };
            for page in written.clone().map(&page) {
                let last = &mut writers[exists(page)?];
                match *last {
                    Writer { step, .. } if step != writer.step => *last = writer,
                    Writer { owner, .. } if owner != writer.owner => {
                        return Err(format!("page {page} is written by two requests"));
                    }
                    Writer { branch, .. } if branch != writer.branch => {
                        return Err(format!("page {page} is written as context and as branch"));
                    }
                    Writer { .. } => {}
                }
            }
        }
        for Use { owner, read, .. } in uses.iter() {
            for page in read.clone().map(&page) {
                match writers[exists(page)?] {
                    Writer { step: last, .. } if last != step => {}
                    Writer { owner: writer, .. } if writer != *owner => {
                        return Err(format!("page {page} is written by one request and read by another"));
                    }
                    Writer { branch: true, .. } => {
                        return Err(format!("page {page} is read as context and written as branch"));
                    }
                    Writer { .. } => {}
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_need_not_be_cleared() {
        let mut uses = PageUses::default();
        uses.push_context(7, 0..2, 0);
        uses.push_branch(7, 0..2, 2..3);
        assert_eq!(uses.check(3, |place| place as u32), Ok(()));
    }

    /// What a request does: owner, context pages, the first of them that is written, branch pages.
    type Does<'a> = (u32, &'a [u32], Option<usize>, &'a [u32]);

    fn check(parts: &[&[Does<'_>]]) -> Result<(), String> {
        let mut uses = PageUses::default();
        uses.clear();
        for part in parts {
            let mut table: Vec<u32> = Vec::new();
            uses.clear_part();
            for &(owner, context, first_written, branch) in *part {
                let start = table.len();
                table.extend(context);
                let end = table.len();
                table.extend(branch);
                match first_written {
                    Some(first) => uses.push_context(owner, start..end, first),
                    None => uses.push_branch(owner, start..end, end..table.len()),
                }
            }
            uses.check(16, |at| table[at])?;
        }
        Ok(())
    }

    #[test]
    fn what_is_read_may_be_shared_and_what_is_written_may_not() {
        // Shared pages are read by all; each writes its own.
        assert_eq!(
            check(&[&[(1, &[0, 1], Some(1), &[]), (2, &[0, 2], Some(1), &[]), (3, &[0], None, &[4])]]),
            Ok(())
        );
        // A context that was whole before is read only.
        assert_eq!(check(&[&[(1, &[0, 1], Some(2), &[]), (2, &[0, 1], None, &[4])]]), Ok(()));
        let fails = |parts: &[&[Does<'_>]], why: &str| assert_eq!(check(parts), Err(why.into()));
        fails(&[&[(1, &[0], Some(0), &[]), (2, &[0], Some(0), &[])]], "page 0 is written by two requests");
        let read = "page 1 is written by one request and read by another";
        fails(&[&[(1, &[0, 1], Some(1), &[]), (2, &[0, 1], Some(2), &[])]], read);
        fails(&[&[(1, &[0, 1], Some(1), &[]), (2, &[0, 1], None, &[4])]], read);
        fails(&[&[(1, &[16], Some(1), &[])]], "page 16 of 16 is used");
    }

    #[test]
    fn branch_pages_belong_to_one_request() {
        let fails = |parts: &[&[Does<'_>]], why: &str| assert_eq!(check(parts), Err(why.into()));
        // Even where the rows of this step would lie in different places: the rows before them are
        // read.
        fails(&[&[(1, &[0], None, &[4, 5]), (2, &[1], None, &[5, 6])]], "page 5 is written by two requests");
        fails(
            &[&[(1, &[0], None, &[4]), (2, &[4], Some(1), &[])]],
            "page 4 is written by one request and read by another",
        );
        fails(&[&[(1, &[0], Some(0), &[]), (2, &[1], None, &[0])]], "page 0 is written by two requests");
        fails(&[&[(1, &[0, 4], None, &[4])]], "page 4 is read as context and written as branch");
    }

    #[test]
    fn a_later_part_of_a_step_sees_what_an_earlier_one_wrote_and_a_later_step_does_not() {
        let (writes, reads): (&[Does<'_>], &[Does<'_>]) =
            (&[(1, &[0], Some(0), &[])], &[(2, &[0], None, &[4])]);
        assert!(check(&[writes, reads]).is_err());
        let mut uses = PageUses::default();
        for (owner, first_written) in [(1, 0), (2, 1)] {
            uses.clear();
            uses.push_context(owner, 0..1, first_written);
            assert_eq!(uses.check(16, |_| 0), Ok(()));
        }
    }
}
