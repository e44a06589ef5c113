//! The host tier: pages that were evicted from the device, kept in a second, separately bounded memory.
//!
//! ```text
//!             evict (or soon to be)            match_host              publish
//!  device page ───────────────────► HostPage ─────────────► Import ─────────────► device page, findable again
//!                 Export copies out      │ too old, or the oldest when room is needed: gone
//! ```
//!
//! [`KvCache`](crate::KvCache) decides *what* goes and comes back, a [`HostTier`] *how long* it stays, and the model's
//! page store moves the contents, when it is told to by a [`Transfer`](crate::Transfer). A [`HostPage`] is what the three
//! hand to each other.
//!
//! Invariants:
//!
//! - **Nothing is believed for its key.** A page comes back only for a context of its own namespace that is equal in
//!   every word from position 0 to the end of the page, and only once its contents have arrived in full.
//! - **A chain stays usable from its start.** Pages go to the tier tail first, as they are evicted, and count as used
//!   tail first when they are hit, so whatever a tier drops for its age it drops from the end of a chain. Where a page
//!   is missing all the same, the hit ends.
//! - **Bytes are what is bounded**: the contents, the words, and what the tier itself needs per page.
//!
//! What this must not know: what the contents mean, and, but for one implementation of the tier, the clock.

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
/// An implementation may drop any page at any time; the later a page was put or touched, the later it should go.
pub trait HostTier: Send {
    /// Keeps a page under a key, in place of what was kept under it. Its time to live begins anew.
    fn put(&mut self, key: HostKey, page: Arc<HostPage>);

    /// The page under a key, unless it was dropped or has outlived its time. The caller compares it with what it wants.
    fn get(&mut self, key: &HostKey) -> Option<Arc<HostPage>>;

    /// Pages were used together: afterwards each is newer than the ones named before it.
    fn touch(&mut self, keys: &[HostKey]);

    /// Drops the pages of namespaces that do not satisfy `keep`. Looks at every page: not for the steady path.
    fn retain(&mut self, keep: &dyn Fn(&Namespace) -> bool);

    /// Drops what has outlived its time. Called now and then, also when nothing else happens.
    fn expire(&mut self);

    /// What is kept, and what was dropped. Cheap.
    fn usage(&self) -> HostUsage;

    /// Puts a page again that is kept already, whole, so that it need not be copied. False if it is not.
    fn renew(&mut self, key: &HostKey, ns: &Namespace, words: &[u32]) -> bool {
        let kept = self.get(key).filter(|page| page.is_filled() && page.is_of(ns, words));
        let Some(page) = kept else { return false };
        self.put(*key, page);
        true
    }

    /// The page under a key, or a page that will be it, once it was read from where reading takes time, and that will
    /// never be filled if that fails. Whoever is to get it later must hold it until then.
    fn fetch(&mut self, key: &HostKey, _ns: &Namespace, _words: &[u32]) -> Option<Arc<HostPage>> {
        self.get(key)
    }

    /// To be held for every page that is being fetched, for as long as that is: it is counted.
    fn hold(&self) -> Option<Arc<()>> {
        None
    }

    /// Whether a page is kept where it outlives the process, or never will be.
    fn is_saved(&mut self, _key: &HostKey) -> bool {
        true
    }

    /// Whether there is room for one more page to be saved. If not, it may be tried later.
    fn may_save(&self) -> bool {
        false
    }

    /// Keeps a page that is still on the device where it outlives the process, and nowhere else.
    fn save(&mut self, _key: HostKey, _page: Arc<HostPage>) {}

    /// Takes note of what was written and read meanwhile, if anything is beside the calls of this trait.
    fn settle(&mut self) {}

    /// What is on disk, if pages are kept there.
    fn disk(&self) -> Option<DiskUsage> {
        None
    }

    /// How long reading what is being read will take, as far as that is known.
    fn reading_takes(&self) -> Duration {
        Duration::ZERO
    }

    /// How long a request should wait for what it fetches, if that was set.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// Sets who is to be told when something was written or read.
    fn set_waker(&mut self, _waker: Waker) {}
}

/// What a tier holds and has dropped.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct HostUsage {
    /// Gauge: pages kept.
    pub pages: u64,
    /// Gauge: bytes they are charged.
    pub bytes: u64,
    /// Bytes that may be kept.
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
    /// How many of the pages that would be evicted next are copied ahead, when a step leaves room for it: then an
    /// eviction costs no copy. 0 copies at eviction only.
    pub window: usize,
}
