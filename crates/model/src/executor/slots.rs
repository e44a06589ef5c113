//! The places of the requests in flight: what every executor keeps between two steps.

use crate::step::{Slot, StepError};

/// One place per open slot.
#[derive(Debug)]
pub(super) struct Slots<T>(Vec<Option<T>>);

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Slots<T> {
    /// Takes a place that is free, which the scheduler promises.
    pub(super) fn open(&mut self, slot: Slot, request: T) {
        let index = slot.0 as usize;
        if self.0.len() <= index {
            self.0.resize_with(index + 1, || None);
        }
        assert!(self.0[index].is_none(), "slot {index} is opened once");
        self.0[index] = Some(request);
    }

    /// The request of an open slot, to be changed.
    pub(super) fn get_mut(&mut self, slot: Slot) -> Result<&mut T, StepError> {
        self.0.get_mut(slot.0 as usize).and_then(Option::as_mut).ok_or_else(|| not_open(slot))
    }

    /// Gives a place up. One that is free stays so.
    pub(super) fn close(&mut self, slot: Slot) {
        if let Some(place) = self.0.get_mut(slot.0 as usize) {
            *place = None;
        }
    }
}

fn not_open(slot: Slot) -> StepError {
    StepError(format!("slot {} is not open", slot.0))
}
