//! A budget for the bytes of bodies in memory.
//!
//! Every request has a small allowance of its own, so that large bodies never keep small ones out:
//! there are at most as many requests as connections. Bytes beyond the allowance come from one
//! pool.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that a request may hold without the pool.
const ALLOWANCE: usize = 16 << 10;
/// Unit of the pool, in bytes.
const UNIT: usize = 1 << 10;

/// The pool that all requests share.
#[derive(Debug)]
pub struct BodyBudget {
    units: Arc<Semaphore>,
}

/// The bytes that one request holds; given back when dropped.
#[derive(Debug)]
pub struct Held {
    units: Arc<Semaphore>,
    taken: Option<OwnedSemaphorePermit>,
}

/// The error when the pool has too few bytes left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRoom;

impl BodyBudget {
    /// A pool of `bytes` bytes.
    pub fn new(bytes: usize) -> Self {
        let units = bytes.div_ceil(UNIT).min(Semaphore::MAX_PERMITS);
        Self { units: Arc::new(Semaphore::new(units)) }
    }

    /// Begins the holding of one request, which is empty at first.
    pub fn hold(&self) -> Held {
        Held { units: Arc::clone(&self.units), taken: None }
    }
}

impl Held {
    /// Makes sure that the request holds budget for `bytes` in all.
    ///
    /// # Errors
    ///
    /// [`OutOfRoom`] when other requests hold too much. The bytes that this request holds stay
    /// held.
    pub fn cover(&mut self, bytes: usize) -> Result<(), OutOfRoom> {
        let needed = bytes.saturating_sub(ALLOWANCE).div_ceil(UNIT);
        let more = needed.saturating_sub(self.taken.as_ref().map_or(0, OwnedSemaphorePermit::num_permits));
        if more == 0 {
            return Ok(());
        }
        let more = u32::try_from(more).map_err(|_| OutOfRoom)?;
        let permit = Arc::clone(&self.units).try_acquire_many_owned(more).map_err(|_| OutOfRoom)?;
        match &mut self.taken {
            Some(taken) => taken.merge(permit),
            None => self.taken = Some(permit),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_bodies_share_a_pool_and_small_ones_need_none() {
        let budget = BodyBudget::new(100 << 10);
        let (mut first, mut second) = (budget.hold(), budget.hold());
        assert_eq!(first.cover(10 << 10), Ok(()));
        assert_eq!(first.cover(96 << 10), Ok(()));
        assert_eq!(second.cover(60 << 10), Err(OutOfRoom));
        // Asking again for bytes that are already held costs nothing, and small requests always
        // fit.
        assert_eq!(first.cover(96 << 10), Ok(()));
        assert_eq!(first.cover(116 << 10), Ok(()));
        assert_eq!(second.cover(ALLOWANCE), Ok(()));
        drop(first);
        assert_eq!(second.cover(60 << 10), Ok(()));
        assert_eq!(second.cover(usize::MAX), Err(OutOfRoom));
    }
}
