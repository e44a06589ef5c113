//! Computing shared rows only once.
//!
//! Two requests may begin with the same rows that are not cached yet: a user who asks twice, two
//! users of one prompt. The second waits for the pages of the first, and finds them cached when it
//! is admitted. The first is served in its place meanwhile.

use beamline_model::step::Slot;

use super::{Scheduler, order::Candidate};

impl<P> Scheduler<P> {
    /// The seat that is computing pages which a waiting request needs as well.
    pub(super) fn computes_the_same(&self, candidate: &Candidate) -> Option<Slot> {
        let index = self.tenants.position(candidate.tenant, candidate.id())?;
        let queued = &self.tenants.get(candidate.tenant).waiting[index];
        let page = self.limits.page_words();
        self.prefilling.iter().copied().find(|slot| {
            let running = self.seats[slot.0 as usize].running();
            let pages = running.demand.shared_pages.min(queued.demand.shared_pages);
            let (mine, theirs) = (&queued.address.words, &running.address.words);
            running.address.namespace == queued.address.namespace
                && running.published < pages
                && (0..=running.published).all(|at| {
                    let words = at * page..(at + 1) * page;
                    mine.get(words.clone()) == theirs.get(words)
                })
        })
    }
}
