//! Pages that come back from host memory, and pages that are copied there ahead of their eviction.
//!
//! A step waits for the transfers of its plan, so a plan holds few of them that others in it do not
//! need: at most `max_step_transfers`. A context that comes back in more pages takes several steps,
//! in which the others go on; nobody computes for it meanwhile. When nobody else is there to wait,
//! all of it comes at once.
//!
//! What a step brought back counts only when the step has succeeded. Otherwise it is ordered again:
//! the host pages are held until then, whatever the tier drops.

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

    /// The step has succeeded, so what it was to bring back is back.
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

    /// The step has failed, so nothing is known of what it was to bring back.
    pub(super) fn forget_imports(&mut self) {
        for slot in self.importing.drain(..) {
            let Some(running) = &mut self.seats[slot.0 as usize].running else {
                unreachable!("a seat is kept during a step")
            };
            running.ordered = running.restored;
        }
    }

    /// Fills the plan up with copies of what would be evicted next.
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
