//! Making pages findable, and making a namespace unfindable.

use crate::cache::KvCache;
use crate::namespace::Namespace;
use crate::page::{Page, PageId, PageRef, Place, State};

/// The result of publishing a page.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
#[must_use = "a duplicate must replace the page in the caller's table"]
pub enum Publish {
    /// Others can find the page now.
    Published,
    /// Another page already holds the same content. The caller's reference has moved to it, and the
    /// caller's own page is released. The caller must write the given page into its table, and
    /// neither use nor release its own page any more.
    Duplicate(PageId),
    /// The namespace was forgotten while this chain was in use. The page stays the caller's own and
    /// unfindable; the caller need not do anything.
    Withdrawn,
}

impl KvCache {
    /// Makes a page findable whose KV has been computed in full.
    ///
    /// `pages` is the request's page table and `index` the page in it. `words` describe the context
    /// from position 0 to at least the end of the page. Publish the pages of a table in order, with
    /// duplicates replaced. Publishing a page of a matched prefix again is allowed and changes
    /// nothing.
    pub fn publish(&mut self, ns: &Namespace, pages: &[PageId], index: usize, words: &[u32]) -> Publish {
        let id = pages[index];
        let page = &self.pages[id.index()];
        assert!(page.references > 0, "{id:?} is published by one who does not hold it");
        let previous = index.checked_sub(1).map(|before| pages[before]);
        let page_words = self.page_words(words, index);
        match &page.state {
            State::Free => unreachable!("a free page has no references"),
            State::Withdrawn => return Publish::Withdrawn,
            State::Published(_) => {
                assert!(
                    self.is_child(id, ns, previous, page_words),
                    "{id:?} is published with another content"
                );
                return Publish::Published;
            }
            State::Private => assert_eq!(page.references, 1, "{id:?} is private and has one holder"),
        }
        if let Some(previous) = previous {
            if matches!(self.pages[previous.index()].state, State::Withdrawn) {
                self.pages[id.index()].state = State::Withdrawn;
                return Publish::Withdrawn;
            }
            self.assert_follows(ns, previous, index, words);
        }
        self.publish_private(ns, id, previous, page_words)
    }

    /// Forgets every page of a namespace, as when its model is unloaded. Unreferenced pages are
    /// freed now. Referenced ones can never be found again and become free when they are released.
    /// The sessions and the pages in the host tier go too. Returns how many pages were freed. Looks
    /// at every page and session: not for the steady path.
    ///
    /// Requests that are still computing in the namespace may publish pages that were private until
    /// now. So forget the namespace again after the last of them.
    pub fn forget_namespace(&mut self, ns: &Namespace) -> usize {
        let free_before = self.free.len();
        for id in (0..self.pages.len() as u32).map(PageId) {
            let page = &mut self.pages[id.index()];
            let Some(place) = page.place().filter(|place| place.ns == *ns) else { continue };
            self.index.remove(place.link.bucket_hash(), id.0);
            self.published -= 1;
            page.generation += 1;
            // Whole chains go, so the counters of the parents go with the parents.
            if page.references > 0 {
                page.state = State::Withdrawn;
            } else {
                page.state = State::Free;
                self.unreferenced.remove(id.0);
                self.free.push(id);
            }
        }
        if let Some(host) = &mut self.host {
            host.memory.tier.retain(&|other| other != ns);
        }
        let pages = &self.pages;
        self.sessions.retain(|tail| pages[tail.page.index()].generation == tail.generation);
        self.free.len() - free_before
    }

    fn publish_private(
        &mut self,
        ns: &Namespace,
        id: PageId,
        previous: Option<PageId>,
        page_words: &[u32],
    ) -> Publish {
        let (link_before, depth) = match previous.map(|previous| self.place(previous)) {
            Some(place) => (place.link, place.depth + 1),
            None => (self.hash.root(ns), 0),
        };
        let link = self.hash.next(&link_before, page_words);
        let mut collisions = 0;
        let existing = self.find_child(ns, previous, &link, page_words, &mut collisions);
        self.counters.hash_collisions += collisions;
        if let Some(existing) = existing {
            self.acquire(existing);
            self.release(id);
            self.counters.duplicates += 1;
            return Publish::Duplicate(existing);
        }

        let parent = previous.map(|page| PageRef { page, generation: self.pages[page.index()].generation });
        if let Some(parent) = parent {
            let parent = self.held_parent_mut(parent);
            parent.children += 1;
            parent.referenced_children += 1;
            parent.newest_child = Some(id);
        }
        let place = Place {
            ns: *ns,
            link,
            parent,
            depth,
            children: 0,
            referenced_children: 0,
            newest_child: None,
            copied: false,
        };
        self.pages[id.index()].state = State::Published(place);
        self.words.set(id, page_words);
        self.index.insert(link.bucket_hash(), id.0);
        self.published += 1;
        self.counters.publications += 1;
        self.save_later(PageRef { page: id, generation: self.pages[id.index()].generation });
        Publish::Published
    }

    /// Asserts that the page before page `index` is what the context says it is.
    fn assert_follows(&self, ns: &Namespace, previous: PageId, index: usize, words: &[u32]) {
        let Page { references, .. } = self.pages[previous.index()];
        assert!(references > 0, "a chain is held whole: {previous:?} is not held");
        let place = self.place(previous);
        assert_eq!(place.ns, *ns, "a chain stays in its namespace");
        assert_eq!(place.depth as usize, index - 1, "{previous:?} is not page {} of a chain", index - 1);
        assert!(
            self.words.of(previous) == self.page_words(words, index - 1),
            "{previous:?} holds other words"
        );
    }
}
