//! Using the host tier: which pages leave the device for it, and which come back.
//!
//! A page leaves when it is evicted. A step need not wait for copies: the pages that would be
//! evicted next are copied ahead, a few per step. A page that is already in the tier when it is
//! evicted costs nothing.
//!
//! Where pages outlive the process, those that stay on the device are copied as well, once, and not
//! into host memory.
//!
//! A page comes back by [`KvCache::match_host`], which continues where the match on the device
//! ended. The caller allocates pages for those found, has the contents imported, and then publishes
//! them like pages it had computed. Until then no other request can see them.

use std::sync::Arc;

use crate::{
    cache::KvCache,
    chain::Link,
    host::{HostKey, HostMemory, HostPage},
    namespace::Namespace,
    page::{PageId, PageRef},
    transfer::Transfer,
};

/// The host tier, and what the cache needs to use it.
pub(crate) struct Host {
    pub(crate) memory: HostMemory,
    /// Transfers that were ordered and not yet taken, in order.
    transfers: Vec<Transfer>,
    /// Scratch: pages to be copied ahead.
    cold: Vec<PageId>,
    /// Scratch: keys of a chain that was hit.
    keys: Vec<HostKey>,
    /// Published pages that were not saved yet, if the tier saves pages. At most twice as many as
    /// there are pages.
    unsaved: Vec<PageRef>,
}

impl KvCache {
    /// Gives the cache a second memory for the pages that it evicts.
    #[must_use]
    pub fn with_host_memory(mut self, memory: HostMemory) -> Self {
        self.host = Some(Host {
            memory,
            transfers: Vec::new(),
            cold: Vec::new(),
            keys: Vec::new(),
            unsaved: Vec::new(),
        });
        self
    }

    /// Continues a match in the host tier: appends to `out` the host pages that follow the
    /// published pages `matched`, in order, up to `max_positions` positions of the context. Returns
    /// the positions they cover.
    ///
    /// Each was compared: its namespace, and every word from position 0 on. The pages stay usable
    /// for as long as they are held, even if the tier drops them meanwhile.
    pub fn match_host(
        &mut self,
        ns: &Namespace,
        words: &[u32],
        max_positions: usize,
        matched: &[PageId],
        out: &mut Vec<Arc<HostPage>>,
    ) -> usize {
        let limit = (words.len() / self.words_per_position).min(max_positions) / self.page_size;
        if self.host.is_none() || matched.len() >= limit {
            return 0;
        }
        let mut link = match matched.last() {
            Some(&last) => self.place(last).link,
            None => self.hash.root(ns),
        };
        let (first, words_per_page) = (out.len(), self.words_per_page());
        let Some(host) = &mut self.host else { return 0 };
        host.keys.clear();
        for index in matched.len()..limit {
            let end = (index + 1) * words_per_page;
            link = self.hash.next(&link, &words[end - words_per_page..end]);
            let key = key_of(&link);
            let Some(page) = host.memory.tier.get(&key) else { break };
            if !page.is_of(ns, &words[..end]) {
                self.counters.hash_collisions += 1;
                break;
            }
            if !page.is_filled() {
                break;
            }
            host.keys.push(key);
            out.push(page);
        }
        // Tail first, so that the end of a chain is dropped before its beginning.
        host.keys.reverse();
        host.memory.tier.touch(&host.keys);
        let found = (out.len() - first) * self.page_size;
        self.counters.host_lookups += 1;
        self.counters.host_hit_positions += found as u64;
        found
    }

    /// Copies at most `most` pages ahead. First come those that would be evicted next and are not
    /// in the host tier yet, as far as [`HostMemory::window`] reaches; then those that are to
    /// outlive the process, the newest first.
    pub fn copy_ahead(&mut self, most: usize) {
        let copied = self.copy_cold(most);
        self.save(most - copied);
    }

    /// Copies pages that would be evicted next. Returns how many.
    fn copy_cold(&mut self, most: usize) -> usize {
        let Some(host) = &mut self.host else { return 0 };
        let window = host.memory.window.saturating_sub(self.free.len());
        let mut cold = std::mem::take(&mut host.cold);
        cold.clear();
        let next = self.unreferenced.iter().take(window).map(PageId);
        let is_new = |page: &PageId| self.pages[page.index()].place().is_some_and(|place| !place.copied);
        cold.extend(next.filter(is_new).take(most));
        for &page in &cold {
            self.offload(page);
        }
        let copied = cold.len();
        if let Some(host) = &mut self.host {
            host.cold = cold;
        }
        copied
    }

    /// Copies at most `most` pages of the device to where they outlive the process. The end of a
    /// chain comes first, so that it is the oldest there, too.
    fn save(&mut self, most: usize) {
        let mut left = most;
        while left > 0
            && let Some(host) = &mut self.host
            && host.memory.tier.may_save()
            && let Some(PageRef { page: id, generation }) = host.unsaved.pop()
        {
            let page = &self.pages[id.index()];
            let Some(place) = page.place().filter(|_| page.generation == generation) else { continue };
            let (ns, key) = (place.ns, key_of(&place.link));
            if host.memory.tier.is_saved(&key) {
                continue;
            }
            let page_bytes = host.memory.page_bytes;
            let page = HostPage::new(ns, self.words_up_to(id), page_bytes);
            let Some(host) = &mut self.host else { return };
            host.memory.tier.save(key, Arc::clone(&page));
            host.transfers.push(Transfer::Export { page: id, to: page });
            left -= 1;
        }
    }

    /// Notes that a published page is to be saved, if the tier saves pages.
    pub(crate) fn save_later(&mut self, page: PageRef) {
        let Some(host) = self.host.as_mut().filter(|host| host.memory.tier.disk().is_some()) else { return };
        if host.unsaved.len() >= 2 * self.pages.len() {
            let pages = &self.pages;
            host.unsaved.retain(|old| pages[old.page.index()].generation == old.generation);
        }
        host.unsaved.push(page);
    }

    /// Appends the ordered transfers, in order. Carry them out in the next step, before the pages
    /// allocated since are written, or never.
    pub fn take_transfers(&mut self, out: &mut Vec<Transfer>) {
        if let Some(host) = &mut self.host {
            out.append(&mut host.transfers);
        }
    }

    /// Drops pages of the host tier that have outlived their time. Worth calling when the engine is
    /// idle.
    pub fn expire_host(&mut self) {
        if let Some(host) = &mut self.host {
            host.memory.tier.expire();
        }
    }

    /// Processes completed disk reads and writes. Worth calling before every step.
    pub fn settle(&mut self) {
        if let Some(host) = &mut self.host {
            host.memory.tier.settle();
        }
    }

    /// Puts a published page into the host tier, if there is one. Pages after it must have been put before.
    pub(crate) fn offload(&mut self, id: PageId) {
        if self.host.is_none() {
            return;
        }
        let words = self.words_up_to(id);
        let Some(host) = &mut self.host else { return };
        let Some(place) = self.pages[id.index()].place_mut() else { panic!("{id:?} is not published") };
        place.copied = true;
        let key = key_of(&place.link);
        // The same content has the same bits. The page is the newest again, as its chain is.
        if host.memory.tier.renew(&key, &place.ns, &words) {
            return;
        }
        let page = HostPage::new(place.ns, words, host.memory.page_bytes);
        host.memory.tier.put(key, Arc::clone(&page));
        host.transfers.push(Transfer::Export { page: id, to: page });
        self.counters.host_exports += 1;
    }

    /// The words of a published page's context, from position 0 to the end of the page.
    fn words_up_to(&self, id: PageId) -> Box<[u32]> {
        let words_per_page = self.words_per_page();
        let pages = self.place(id).depth as usize + 1;
        let mut words = vec![0; pages * words_per_page].into_boxed_slice();
        let mut cursor = Some(id);
        for piece in words.chunks_exact_mut(words_per_page).rev() {
            let Some(page) = cursor else { unreachable!("a chain is as long as its tail is deep") };
            piece.copy_from_slice(self.words.of(page));
            cursor = self.place(page).parent.map(|parent| parent.page);
        }
        words
    }
}

pub(crate) fn key_of(link: &Link) -> HostKey {
    HostKey(link.bytes())
}
