//! The host tier: pages that were evicted from the device, kept in a second, separately bounded memory.
//!
//! ```text
//!             evict (or soon to be)            match_host              publish
//!  device page ───────────────────► HostPage ─────────────► Import ─────────────► device page, findable
//!                 Export copies out      │ too old, or the oldest when room is needed: gone
//! ```
//!
//! [`KvCache`](crate::KvCache) decides *what* goes and comes back, and a [`HostTier`] *how long* it
//! stays. The model's page store moves the contents as a [`Transfer`](crate::Transfer) says. The
//! three exchange [`HostPage`]s.
//!
//! Invariants:
//!
//! - **A key alone proves nothing.** A page comes back only for a context of its own namespace that
//!   is equal in every word from position 0 to the end of the page, and only once its contents have
//!   arrived in full.
//! - **A chain stays usable from its start.** Pages go to the tier tail first, as they are evicted,
//!   and count as used tail first when they are hit. So a page that a tier drops for its age comes
//!   from the end of a chain. Where a page is missing all the same, the hit ends.
//! - **The bound is in bytes**: the contents, the words, and what the tier itself needs per page.
//!
//! What this must not know: what the contents mean. Nor the clock, except inside one implementation
//! of the tier.

mod lru;
mod moka;
mod page;

use std::{sync::Arc, time::Duration};

use crate::{
    disk::{DiskUsage, Waker},
    namespace::Namespace,
};

pub use self::{
    lru::LruTier,
    moka::MokaTier,
    page::{HostContents, HostKey, HostPage},
};

/// Keeps host pages within a bound of bytes.
///
/// An implementation may drop any page at any time; the later a page was put or touched, the later
/// it should go.
pub trait HostTier: Send {
    /// Keeps a page under a key and replaces what was kept there. Its time to live starts anew.
    fn put(&mut self, key: HostKey, page: Arc<HostPage>);

    /// The page under a key, unless it was dropped or has outlived its time. The caller compares it
    /// with the page it wants.
    fn get(&mut self, key: &HostKey) -> Option<Arc<HostPage>>;

    /// Marks pages as used together: afterwards each is newer than the ones named before it.
    fn touch(&mut self, keys: &[HostKey]);

    /// Drops the pages whose namespace does not satisfy `keep`. Looks at every page: not for the
    /// steady path.
    fn retain(&mut self, keep: &dyn Fn(&Namespace) -> bool);

    /// Drops pages that have outlived their time. Called now and then, also when nothing else
    /// happens.
    fn expire(&mut self);

    /// What is kept, and what was dropped. Takes constant time.
    fn usage(&self) -> HostUsage;

    /// Puts a page again that the tier still holds in full, so that it need not be copied. Returns
    /// whether it did.
    fn renew(&mut self, key: &HostKey, ns: &Namespace, words: &[u32]) -> bool {
        let kept = self.get(key).filter(|page| page.is_filled() && page.is_of(ns, words));
        let Some(page) = kept else { return false };
        self.put(*key, page);
        true
    }

    /// The page under a key. Where reading takes time, this starts the read and returns a page that
    /// is filled later, or never if the read fails. The caller must hold the page until then.
    fn fetch(&mut self, key: &HostKey, _ns: &Namespace, _words: &[u32]) -> Option<Arc<HostPage>> {
        self.get(key)
    }

    /// A token to hold for as long as a page is being fetched. The tier counts the tokens.
    fn hold(&self) -> Option<Arc<()>> {
        None
    }

    /// Whether the page needs no saving: it is kept where it outlives the process, or never will
    /// be.
    fn is_saved(&mut self, _key: &HostKey) -> bool {
        true
    }

    /// Whether there is room to save one more page. If not, try again later.
    fn may_save(&self) -> bool {
        false
    }

    /// Saves a page that is still on the device to where it outlives the process, and nowhere else.
    fn save(&mut self, _key: HostKey, _page: Arc<HostPage>) {}

    /// Processes the reads and writes that were completed since the last call, if there are any.
    fn settle(&mut self) {}

    /// What is on disk; `None` if pages are not kept there.
    fn disk(&self) -> Option<DiskUsage> {
        None
    }

    /// How long the current reads will take, as far as that is known.
    fn reading_takes(&self) -> Duration {
        Duration::ZERO
    }

    /// How long a request should wait for the pages it fetches; `None` if not configured.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// Sets the function to call when something was written or read.
    fn set_waker(&mut self, _waker: Waker) {}
}

/// What a tier holds and has dropped.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct HostUsage {
    /// Gauge: pages kept.
    pub pages: u64,
    /// Gauge: bytes charged for these pages.
    pub bytes: u64,
    /// Most bytes that may be kept.
    pub capacity: u64,
    /// Counter: pages dropped to make room.
    pub evictions: u64,
    /// Counter: pages dropped because they had outlived their time.
    pub expirations: u64,
}

/// What a [`KvCache`](crate::KvCache) needs to use a tier.
pub struct HostMemory {
    /// Where pages are kept.
    pub tier: Box<dyn HostTier>,
    /// Bytes of the contents of one page, as the page store moves them.
    pub page_bytes: usize,
    /// How many of the pages that would be evicted next are copied ahead, when a step leaves room
    /// for it: then an eviction costs no copy. 0 copies at eviction only.
    pub window: usize,
}
