//! Finding the longest cached prefix of a context.
//!
//! Three ways lead to pages, cheapest first. A *session* names the tail of the user's newest chain,
//! which is walked from there to its head. Where that ends, every page names the *child published
//! last*, which is the right one wherever contexts do not branch. Where it is not, the chain hash
//! is looked up in the *prefix index*.
//!
//! All three only nominate. A page is taken when namespace, parent and words are equal. By
//! induction over the parents this is equality of everything that went into the page's KV.

use crate::cache::KvCache;
use crate::chain::Link;
use crate::namespace::{Namespace, SessionKey};
use crate::page::{Page, PageId, PageRef, Place};

/// The longest prefix found so far.
#[derive(Copy, Clone, Default)]
struct Found {
    /// Last page of the prefix; `None` when there is none.
    tail: Option<PageId>,
    /// Pages in the prefix.
    pages: usize,
    /// How many of these pages the session led to.
    pages_by_session: usize,
    /// Pages that the hash nominated and the comparison refused.
    collisions: u64,
}

impl KvCache {
    /// The longest cached prefix of the context `words`, in whole pages and at most `max_positions`
    /// positions. Returns the positions covered.
    ///
    /// `max_positions` is what the model's [`ReuseClass`](crate::ReuseClass) allows. It is one less
    /// than the context where the last row must be computed to get an answer from it.
    ///
    /// The pages are appended to `out`, in order. Each gains a reference that the caller must
    /// release. `session` is the user whose newest chain is tried first; it makes the match cheaper
    /// and never changes its result.
    pub fn match_prefix(
        &mut self,
        ns: &Namespace,
        session: Option<SessionKey>,
        words: &[u32],
        max_positions: usize,
        out: &mut Vec<PageId>,
    ) -> usize {
        let wanted = self.positions(words).min(max_positions);
        let found = self.find(ns, session, words, wanted);
        let covered = found.pages * self.page_size;
        assert!(covered <= wanted);

        self.counters.lookups += 1;
        self.counters.hit_positions += covered as u64;
        self.counters.session_hit_positions += (found.pages_by_session * self.page_size) as u64;
        self.counters.missed_positions += (wanted - covered) as u64;
        self.counters.hash_collisions += found.collisions;

        let first = out.len();
        self.append_chain(found, out);
        for &page in &out[first..] {
            self.acquire(page);
        }
        covered
    }

    /// How many positions [`KvCache::match_prefix`] would cover. Takes no references and leaves no trace.
    pub fn peek_prefix(
        &self,
        ns: &Namespace,
        session: Option<SessionKey>,
        words: &[u32],
        max_positions: usize,
    ) -> usize {
        let wanted = self.positions(words).min(max_positions);
        self.find(ns, session, words, wanted).pages * self.page_size
    }

    /// How many pages [`KvCache::match_prefix`] would find, and the link before the page that
    /// follows them.
    pub(crate) fn end_of_prefix(
        &self,
        ns: &Namespace,
        session: Option<SessionKey>,
        words: &[u32],
        max_positions: usize,
    ) -> (usize, Link) {
        let found = self.find(ns, session, words, self.positions(words).min(max_positions));
        let link = found.tail.map_or_else(|| self.hash.root(ns), |tail| self.place(tail).link);
        (found.pages, link)
    }

    /// Remembers where the user's newest chain ends: at the last published page of the table
    /// `pages`. Call it while the table's references are still held. A table without published
    /// pages leaves the session as it is.
    pub fn remember(&mut self, key: SessionKey, ns: &Namespace, pages: &[PageId]) {
        let tail =
            pages.iter().enumerate().rev().find_map(|(index, &page)| {
                self.pages[page.index()].place().map(|place| (index, page, place))
            });
        let Some((index, page, place)) = tail else { return };
        assert_eq!(place.ns, *ns, "the chain belongs to another namespace");
        assert_eq!(place.depth as usize, index, "{page:?} is not page {index} of a chain");
        let Page { references, generation, .. } = self.pages[page.index()];
        assert!(references > 0, "a chain is remembered while it is held");
        let bucket_hash = self.hash.bucket_of_session(key.0);
        self.sessions.put(key, bucket_hash, PageRef { page, generation });
    }

    /// The published page with this content, if there is one. Counts pages that the hash nominated
    /// wrongly.
    pub(crate) fn find_child(
        &self,
        ns: &Namespace,
        parent: Option<PageId>,
        link: &Link,
        words: &[u32],
        collisions: &mut u64,
    ) -> Option<PageId> {
        let nominated = self.index.candidates(link.bucket_hash()).map(PageId);
        for page in nominated.filter(|&page| self.place(page).link == *link) {
            if self.is_child(page, ns, parent, words) {
                return Some(page);
            }
            *collisions += 1;
        }
        None
    }

    /// Whether a page is published with exactly this content and this history.
    pub(crate) fn is_child(
        &self,
        page: PageId,
        ns: &Namespace,
        parent: Option<PageId>,
        words: &[u32],
    ) -> bool {
        self.pages[page.index()].place().is_some_and(|place| {
            let its_parent = place.parent.map(|parent| parent.page);
            place.ns == *ns && its_parent == parent && self.words.of(page) == words
        })
    }

    fn positions(&self, words: &[u32]) -> usize {
        assert_eq!(words.len() % self.words_per_position, 0, "a position is described in part");
        words.len() / self.words_per_position
    }

    fn find(&self, ns: &Namespace, session: Option<SessionKey>, words: &[u32], positions: usize) -> Found {
        let limit = positions / self.page_size;
        let mut found = Found::default();
        if limit == 0 {
            return found;
        }
        if let Some(key) = session {
            self.follow_session(ns, key, words, limit, &mut found);
        }
        self.extend(ns, words, limit, &mut found);
        found
    }

    /// Walks the user's newest chain from its tail to its head. The prefix ends before the mismatch
    /// nearest to the head, so every page is compared and the page nearest to the head decides.
    fn follow_session(
        &self,
        ns: &Namespace,
        key: SessionKey,
        words: &[u32],
        limit: usize,
        found: &mut Found,
    ) {
        let Some(tail) = self.sessions.get(key, self.hash.bucket_of_session(key.0)) else { return };
        let mut cursor = self.current(tail).filter(|place| place.ns == *ns).map(|place| (tail.page, place));
        while let Some((page, place)) = cursor {
            let index = place.depth as usize;
            if index < limit {
                if self.words.of(page) != self.page_words(words, index) {
                    *found = Found::default();
                } else if found.tail.is_none() {
                    *found = Found {
                        tail: Some(page),
                        pages: index + 1,
                        pages_by_session: index + 1,
                        collisions: 0,
                    };
                }
            }
            cursor = place.parent.map(|parent| (parent.page, self.place(parent.page)));
        }
    }

    /// Extends the prefix page by page. Hashes only where the child published last does not match.
    fn extend(&self, ns: &Namespace, words: &[u32], limit: usize, found: &mut Found) {
        while found.pages < limit {
            let words = self.page_words(words, found.pages);
            let before = found.tail.map(|tail| self.place(tail));
            let newest = before.and_then(|before| before.newest_child);
            let page = newest.filter(|&newest| self.is_child(newest, ns, found.tail, words)).or_else(|| {
                let link_before = before.map_or_else(|| self.hash.root(ns), |before| before.link);
                let link = self.hash.next(&link_before, words);
                self.find_child(ns, found.tail, &link, words, &mut found.collisions)
            });
            let Some(page) = page else { return };
            found.tail = Some(page);
            found.pages += 1;
        }
    }

    /// The place of the page, unless it was recycled since.
    fn current(&self, page: PageRef) -> Option<&Place> {
        let now = &self.pages[page.page.index()];
        if now.generation == page.generation { now.place() } else { None }
    }

    /// Appends the pages of the prefix, head first.
    fn append_chain(&self, found: Found, out: &mut Vec<PageId>) {
        let first = out.len();
        out.resize(first + found.pages, PageId(0));
        let mut cursor = found.tail;
        for entry in out[first..].iter_mut().rev() {
            let Some(page) = cursor else { unreachable!("a chain is as long as its tail is deep") };
            *entry = page;
            cursor = self.place(page).parent.map(|parent| parent.page);
        }
        assert_eq!(cursor, None, "a chain is as long as its tail is deep");
    }
}
