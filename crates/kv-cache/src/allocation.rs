//! References, free pages, and eviction.
//!
//! A page that loses its last reference becomes free, or, if published, joins the unreferenced
//! pages as their newest. Since chains are held whole and given back tail first, that list has
//! children before their parent: its oldest page is always a leaf.

use thiserror::Error;

use crate::cache::KvCache;
use crate::page::{PageId, State};

/// [`KvCache::allocate`] was asked for more pages than are available. The cache is unchanged.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Error)]
#[error("wanted {wanted} pages, {available} are available")]
pub struct OutOfPages {
    /// Pages asked for.
    pub wanted: usize,
    /// Pages free or evictable at that moment.
    pub available: usize,
}

impl KvCache {
    /// Pages that can be allocated now: the free ones and the unreferenced ones. Exact:
    /// [`KvCache::allocate`] of `n` pages succeeds if and only if `n <= available()`.
    ///
    /// A match takes unreferenced pages out of this number, so match first and allocate after.
    pub fn available(&self) -> usize {
        self.free.len() + self.unreferenced.len()
    }

    /// Takes `n` pages, all or none, and appends them to `out`, each with one reference. When the
    /// free pages run out, those unreferenced for longest are evicted, the tail of a chain before
    /// its head, into the host tier if there is one: then [`KvCache::take_transfers`] is due before
    /// the pages are written.
    pub fn allocate(&mut self, n: usize, out: &mut Vec<PageId>) -> Result<(), OutOfPages> {
        let available = self.available();
        if n > available {
            return Err(OutOfPages { wanted: n, available });
        }
        for _ in 0..n {
            let id = match self.free.pop() {
                Some(id) => id,
                None => self.evict_oldest(),
            };
            let page = &mut self.pages[id.index()];
            assert!(page.references == 0 && matches!(page.state, State::Free), "{id:?} is in use");
            page.state = State::Private;
            page.references = 1;
            out.push(id);
        }
        assert_eq!(self.available(), available - n);
        Ok(())
    }

    /// Adds one holder to a page that is already held. To hold a chain once more, retain every one
    /// of its pages.
    ///
    /// Do not use this for private pages. If two tables shared one and it turned out a duplicate,
    /// one table would go on with a page whose chain the other has already moved.
    pub fn retain(&mut self, id: PageId) {
        let page = &self.pages[id.index()];
        assert!(page.references > 0, "{id:?} is retained by one who does not hold it");
        assert!(!matches!(page.state, State::Private), "{id:?} is private and has one holder");
        self.acquire(id);
    }

    /// Removes one holder. Release the pages of a chain tail first, as [`KvCache::release_chain`]
    /// does.
    pub fn release(&mut self, id: PageId) {
        let page = &mut self.pages[id.index()];
        assert!(page.references > 0, "{id:?} is released by one who does not hold it");
        page.references -= 1;
        if page.references > 0 {
            return;
        }
        match &page.state {
            State::Free => unreachable!("a free page has no references"),
            State::Private | State::Withdrawn => {
                page.state = State::Free;
                self.free.push(id);
            }
            State::Published(place) => {
                assert_eq!(place.referenced_children, 0, "{id:?} is released before the pages after it");
                if let Some(parent) = place.parent {
                    self.held_parent_mut(parent).referenced_children -= 1;
                }
                self.unreferenced.push_newest(id.0);
            }
        }
    }

    /// Releases every page of a table, tail first.
    pub fn release_chain(&mut self, pages: &[PageId]) {
        for &page in pages.iter().rev() {
            self.release(page);
        }
    }

    /// Adds one holder to a page that is published or held. The page before it must be held.
    pub(crate) fn acquire(&mut self, id: PageId) {
        let page = &mut self.pages[id.index()];
        page.references += 1;
        if page.references > 1 {
            return;
        }
        let Some(place) = page.place() else { panic!("{id:?} is free") };
        if let Some(parent) = place.parent {
            self.held_parent_mut(parent).referenced_children += 1;
        }
        self.unreferenced.remove(id.0);
    }

    /// Frees the page that has been unreferenced for longest, removes it from every list, and
    /// returns it.
    fn evict_oldest(&mut self) -> PageId {
        let Some(oldest) = self.unreferenced.oldest() else { unreachable!("availability was checked") };
        let id = PageId(oldest);
        self.offload(id);
        self.unreferenced.remove(oldest);
        let page = &mut self.pages[id.index()];
        assert_eq!(page.references, 0, "{id:?} is held and must not be evicted");
        let State::Published(place) = std::mem::replace(&mut page.state, State::Free) else {
            unreachable!("unreferenced pages in the list are published");
        };
        assert_eq!(place.children, 0, "{id:?} must not be evicted before the pages after it");
        page.generation += 1;
        self.index.remove(place.link.bucket_hash(), id.0);
        if let Some(parent) = place.parent {
            self.parent_mut(parent).children -= 1;
        }
        self.published -= 1;
        self.counters.evictions += 1;
        id
    }
}
