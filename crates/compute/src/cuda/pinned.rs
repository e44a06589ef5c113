//! Page-locked memory for pages that left the device.
//!
//! Page-locked, because only such memory is copied beside the computing and at the full rate of the bus.
//! Whole host pages, because passing each through a smaller page-locked piece would cost the engine's
//! thread a copy of its own per page. Locking is slow, so it is done for many pages at a time, when the
//! first page of a slab is wanted. A slab is kept for as long as any of its pages. So the memory that
//! the tier once held stays locked, and a step that makes a slab takes longer by that time.
//!
//! Invariant: a place is given out again as soon as it is dropped, copies on their way or not. That is
//! sound because all copies go through one queue, in order, and the host reads what arrived only while
//! the place is held.

use std::sync::{Arc, Mutex, PoisonError};

use super::device::{Device, DeviceError};

/// Bytes that are locked at a time, unless a page is larger.
const SLAB: usize = 64 << 20;

/// Places of one size.
#[derive(Debug)]
pub struct PinnedPages {
    device: Arc<dyn Device>,
    page_bytes: usize,
    slabs: Mutex<Slabs>,
}

#[derive(Debug, Default)]
struct Slabs {
    all: Vec<u64>,
    free: Vec<u64>,
}

/// A place for the contents of one page.
#[derive(Debug)]
pub struct PinnedPage {
    pages: Arc<PinnedPages>,
    address: u64,
}

impl PinnedPages {
    /// A pool without slabs.
    pub fn new(device: &Arc<dyn Device>, page_bytes: usize) -> Arc<Self> {
        Arc::new(Self { device: Arc::clone(device), page_bytes, slabs: Mutex::default() })
    }

    /// A place, whose contents are undefined.
    ///
    /// # Errors
    ///
    /// When no more memory can be locked.
    pub fn take(self: &Arc<Self>) -> Result<PinnedPage, DeviceError> {
        let mut slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        let address = match slabs.free.pop() {
            Some(address) => address,
            None => {
                let slab = self.device.pin(self.slab_bytes())?;
                slabs.all.push(slab);
                // The first page of a slab comes first.
                let others =
                    (1..self.pages_of_slab()).rev().map(|page| slab + (page * self.page_bytes) as u64);
                slabs.free.extend(others);
                slab
            }
        };
        Ok(PinnedPage { pages: Arc::clone(self), address })
    }

    fn pages_of_slab(&self) -> usize {
        (SLAB / self.page_bytes.max(1)).max(1)
    }

    fn slab_bytes(&self) -> usize {
        self.pages_of_slab() * self.page_bytes
    }
}

impl Drop for PinnedPages {
    fn drop(&mut self) {
        // Copies may still be on their way. What fails here is told by what comes next.
        let _ = self.device.wait();
        let bytes = self.slab_bytes();
        let slabs = self.slabs.get_mut().unwrap_or_else(PoisonError::into_inner);
        for slab in slabs.all.drain(..) {
            self.device.unpin(slab, bytes);
        }
    }
}

impl PinnedPage {
    /// Where it is.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// What it holds.
    ///
    /// # Safety
    ///
    /// All of it was written, and no copy that writes it is on its way.
    pub unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: the slab is there for as long as the place is; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.pages.page_bytes) }
    }
}

impl Drop for PinnedPage {
    fn drop(&mut self) {
        let mut slabs = self.pages.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        slabs.free.push(self.address);
    }
}
