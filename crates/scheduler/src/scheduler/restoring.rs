//! Pages that come back from host memory, and pages that are copied there ahead of their eviction.
//!
//! A step waits for the transfers of its plan. So a plan holds few transfers that its other
//! requests do not need: at most `max_step_transfers`. A context that comes back in more pages
//! takes several steps. The other requests go on in them, and this one gets no rows. When no other
//! request waits, all pages come at once.
//!
//! Pages that a step brought back count only when the step has succeeded. Otherwise they are
//! ordered again: the host pages are held until then, even if the tier drops them.

use beamline_kv_cache::Transfer;
use beamline_model::step::{Plan, Slot};

use super::Scheduler;

impl<P> Scheduler<P> {
    /// Orders at most `most` pages back for one request. Returns how many.
    pub(super) fn import(&mut self, slot: Slot, most: usize, plan: &mut Plan) -> usize {
        let seat = &mut self.seats[slot.0 as usize];
        let count = seat.left_to_order().min(most);
        let Some(running) = &mut seat.running else { unreachable!("a listed seat is taken") };
        if count == 0 {
            return 0;
        }
        let wanted = running.ordered..running.ordered + count;
        let pages = &seat.context_pages[running.published..];
        plan.transfers.extend(
            wanted.clone().map(|i| Transfer::Import { from: seat.restoring[i].clone(), page: pages[i] }),
        );
        running.ordered = wanted.end;
        self.importing.push(slot);
        count
    }

    /// Records the pages that the successful step brought back.
    pub(super) fn confirm_imports(&mut self) {
        for slot in self.importing.drain(..) {
            let seat = &mut self.seats[slot.0 as usize];
            let Some(running) = &mut seat.running else { unreachable!("a seat is kept during a step") };
            self.stats.restored_pages += (running.ordered - running.restored) as u64;
            running.restored = running.ordered;
            if running.restored == seat.restoring.len() {
                seat.restoring.clear();
                (running.ordered, running.restored) = (0, 0);
            }
        }
    }

    /// Forgets the pages that the failed step was to bring back: their state is unknown.
    pub(super) fn forget_imports(&mut self) {
        for slot in self.importing.drain(..) {
            let Some(running) = &mut self.seats[slot.0 as usize].running else {
                unreachable!("a seat is kept during a step")
            };
            running.ordered = running.restored;
        }
    }

    /// Fills the plan up with copies of the pages that would be evicted next.
    pub(super) fn copy_ahead(&mut self, plan: &mut Plan) {
        if plan.is_empty() {
            assert!(plan.transfers.is_empty(), "pages are evicted for whoever computes");
            return;
        }
        self.cache.copy_ahead(self.transfers_left(plan));
        self.cache.take_transfers(&mut plan.transfers);
    }

    pub(super) fn transfers_left(&self, plan: &Plan) -> usize {
        self.limits.config.max_step_transfers.saturating_sub(plan.transfers.len())
    }
}
