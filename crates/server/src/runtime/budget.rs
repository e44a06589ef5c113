//! The memory that loaded versions may take together, and who has taken how much.
//!
//! Place in the flow: a load reserves all it will need before it allocates weights or pages. A [`Reservation`] lives as
//! long as the memory it stands for, which for a version that is being replaced is until its last request has ended.
//!
//! Invariant: the sum of all reservations never exceeds the limit.
//!
//! What this must not know: what the memory is for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::settings::ByteSize;

/// Memory for weights and KV pages.
#[derive(Debug)]
pub struct Budget {
    limit: Option<usize>,
    used: Mutex<usize>,
}

/// Memory that was asked for and is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "needs {} of memory for weights and KV pages, {} of {} are free",
    ByteSize(*.needed), ByteSize(*.free), ByteSize(*.limit)
)]
pub struct OverBudget {
    /// Bytes asked for.
    pub needed: usize,
    /// Bytes that nobody has.
    pub free: usize,
    /// All bytes.
    pub limit: usize,
}

/// Memory that somebody has; given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    /// A budget of so many bytes, or without limit.
    pub fn new(limit: Option<usize>) -> Arc<Self> {
        Arc::new(Self { limit, used: Mutex::new(0) })
    }

    /// All bytes, if there is a limit.
    pub fn limit(&self) -> Option<usize> {
        self.limit
    }

    /// Bytes that are taken.
    pub fn used(&self) -> usize {
        *self.lock()
    }

    /// Takes memory.
    ///
    /// # Errors
    ///
    /// When there is less.
    pub fn reserve(self: &Arc<Self>, needed: usize) -> Result<Reservation, OverBudget> {
        let mut used = self.lock();
        if let Some(limit) = self.limit {
            let free = limit.saturating_sub(*used);
            if needed > free {
                return Err(OverBudget { needed, free, limit });
            }
        }
        *used = used.saturating_add(needed);
        Ok(Reservation { budget: Arc::clone(self), bytes: needed })
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        // A number is never half written.
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut used = self.budget.lock();
        *used = used.saturating_sub(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_free_is_refused_and_what_is_dropped_is_free() {
        let budget = Budget::new(Some(100));
        let first = budget.reserve(60).unwrap();
        assert_eq!(budget.reserve(41).unwrap_err(), OverBudget { needed: 41, free: 40, limit: 100 });
        let second = budget.reserve(40).unwrap();
        assert_eq!(budget.used(), 100);
        drop((first, second));
        assert_eq!(budget.used(), 0);
        assert!(Budget::new(None).reserve(usize::MAX).is_ok());
    }
}
