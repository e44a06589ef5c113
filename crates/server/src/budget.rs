//! The memory that loaded versions may take together, and who has taken how much.
//!
//! Place in the flow: a load reserves weights and pages before it allocates them. A catalog is counted once
//! it is built, because its size is not known before, and before it serves. A [`Reservation`] lives as long
//! as the memory it stands for, which for a version or catalog that is being replaced is until its last request has ended.
//!
//! Invariant: the sum of all reservations never exceeds the limit.
//!
//! What this must not know: what the memory is for, but to say it when there is none.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::settings::ByteSize;

/// Memory for weights, KV pages and catalogs.
#[derive(Debug)]
pub struct Budget {
    limit: Option<usize>,
    used: Mutex<usize>,
}

/// Memory that was asked for and is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} need {} of memory, {} of {} are free",
    ByteSize(*.needed), ByteSize(*.free), ByteSize(*.limit)
)]
pub struct OverBudget {
    /// What they were wanted for, in the plural.
    pub what: &'static str,
    /// Bytes asked for.
    pub needed: usize,
    /// Bytes that nobody has.
    pub free: usize,
    /// Bytes that may be taken in all.
    pub limit: usize,
}

/// Memory that somebody has; given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    /// A budget of `limit` bytes, or without limit.
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

    /// A reservation of nothing, for what is tried and not kept.
    pub fn nothing(self: &Arc<Self>) -> Reservation {
        Reservation { budget: Arc::clone(self), bytes: 0 }
    }

    /// Takes memory for `what`, which is named in the plural when there is not enough.
    ///
    /// # Errors
    ///
    /// When there is less.
    pub fn reserve(self: &Arc<Self>, what: &'static str, needed: usize) -> Result<Reservation, OverBudget> {
        let mut used = self.lock();
        if let Some(limit) = self.limit {
            let free = limit.saturating_sub(*used);
            if needed > free {
                return Err(OverBudget { what, needed, free, limit });
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

impl Reservation {
    /// What was taken.
    pub fn bytes(&self) -> usize {
        self.bytes
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
        let first = budget.reserve("pages", 60).unwrap();
        let error = budget.reserve("pages", 41).unwrap_err();
        assert_eq!(error, OverBudget { what: "pages", needed: 41, free: 40, limit: 100 });
        assert_eq!(error.to_string(), "pages need 41 B of memory, 40 B of 100 B are free");
        let second = budget.reserve("names", 40).unwrap();
        assert_eq!(budget.used(), 100);
        drop((first, second));
        assert_eq!(budget.used(), 0);
        assert!(Budget::new(None).reserve("pages", usize::MAX).is_ok());
    }
}
