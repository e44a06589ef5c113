//! The crate's invariants, checked at once over all tables: for tests and simulations.

use crate::cache::KvCache;
use crate::page::{PageId, Place, State};

impl KvCache {
    /// Panics if the tables contradict each other. Linear in the number of pages and sessions.
    pub fn check_invariants(&self) {
        for page in (0..self.pages.len() as u32).map(PageId) {
            self.check_page(page);
        }
        self.check_counters_of_parents();
        self.check_lists();
        self.sessions.check_invariants();
    }

    fn check_page(&self, id: PageId) {
        let page = &self.pages[id.index()];
        let unreferenced = self.unreferenced.contains(id.0);
        match &page.state {
            State::Free => assert!(page.references == 0 && !unreferenced, "{id:?} is free and in use"),
            State::Private => assert!(page.references == 1 && !unreferenced, "{id:?} is leaked or shared"),
            State::Withdrawn => assert!(page.references > 0 && !unreferenced, "{id:?} is leaked"),
            State::Published(place) => {
                assert_eq!(page.references == 0, unreferenced, "{id:?} is in the wrong list");
                self.check_place(id, place);
            }
        }
    }

    fn check_place(&self, id: PageId, place: &Place) {
        let link_before = match place.parent {
            None => {
                assert_eq!(place.depth, 0);
                self.hash.root(&place.ns)
            }
            Some(parent) => {
                let page = &self.pages[parent.page.index()];
                assert_eq!(page.generation, parent.generation, "{id:?} has lost its parent");
                assert!(
                    self.pages[id.index()].references == 0 || page.references > 0,
                    "{id:?} is held without the page before it"
                );
                let parent = self.place(parent.page);
                assert_eq!((parent.ns, parent.depth + 1), (place.ns, place.depth));
                parent.link
            }
        };
        let words = self.words.of(id);
        assert!(self.hash.next(&link_before, words) == place.link, "{id:?} is filed under the wrong link");
        let parent = place.parent.map(|parent| parent.page);
        let nominated = self.index.candidates(place.link.bucket_hash()).map(PageId);
        let equals: Vec<PageId> =
            nominated.filter(|&other| self.is_child(other, &place.ns, parent, words)).collect();
        assert_eq!(equals, [id], "one content must have one page");
    }

    fn check_counters_of_parents(&self) {
        let mut counted = vec![(0, 0); self.pages.len()];
        for page in &self.pages {
            if let Some(parent) = page.place().and_then(|place| place.parent) {
                let (children, referenced) = &mut counted[parent.page.index()];
                *children += 1;
                *referenced += u32::from(page.references > 0);
            }
        }
        for (page, counted) in self.pages.iter().zip(counted) {
            let counters = page.place().map_or((0, 0), |place| (place.children, place.referenced_children));
            assert_eq!(counters, counted, "a parent has miscounted its children");
        }
    }

    fn check_lists(&self) {
        let mut children_seen = vec![0; self.pages.len()];
        for page in self.unreferenced.iter().map(PageId) {
            let place = self.place(page);
            assert_eq!(children_seen[page.index()], place.children, "{page:?} is older than a page after it");
            if let Some(parent) = place.parent {
                children_seen[parent.page.index()] += 1;
            }
        }
        let mut is_free = vec![false; self.pages.len()];
        for page in &self.free {
            assert!(!std::mem::replace(&mut is_free[page.index()], true), "{page:?} is free twice");
        }
        for (page, is_free) in self.pages.iter().zip(is_free) {
            assert_eq!(matches!(page.state, State::Free), is_free, "the free list is wrong");
        }
        let published = self.pages.iter().filter(|page| page.place().is_some()).count();
        assert_eq!(published, self.published);
    }
}
