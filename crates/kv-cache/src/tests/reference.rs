//! The naive cache that the real one is compared with: whole contents as keys, a vector for the
//! order of release.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::{HostKey, HostPage, Namespace, PageId, Publish, SessionKey};

/// Everything that went into a page: its namespace, and the words from position 0 to its end.
pub(super) type Content = (Namespace, Vec<u32>);

/// Pages as a list of facts, with no structure to get wrong.
pub(super) struct Reference {
    pages: usize,
    sessions_capacity: usize,
    words_per_page: usize,
    pub(super) published: HashMap<Content, PageId>,
    pub(super) contents: BTreeMap<PageId, Content>,
    pub(super) references: BTreeMap<PageId, u32>,
    /// Published pages without a holder, oldest release first.
    pub(super) unreferenced: Vec<PageId>,
    withdrawn: BTreeSet<PageId>,
    /// How often each page stopped being published.
    epochs: BTreeMap<PageId, u64>,
    /// Oldest first: user, tail, epoch of the tail.
    pub(super) sessions: Vec<(SessionKey, PageId, u64)>,
    pub(super) evictions: u64,
    /// Pages put into the host tier since the last check: which page, and its content.
    pub(super) offloaded: Vec<(PageId, Content)>,
    pub(super) host: Option<HostReference>,
}

/// The naive host tier: a list, the page used longest ago first.
pub(super) struct HostReference {
    pub(super) capacity: u64,
    pub(super) time_to_live: Option<u64>,
    pub(super) now: u64,
    pub(super) pages: Vec<HostEntry>,
    /// The key under which a content is filed.
    pub(super) key_of: Box<dyn Fn(&Content) -> HostKey>,
    pub(super) page_bytes: usize,
}

pub(super) struct HostEntry {
    pub(super) key: HostKey,
    pub(super) content: Content,
    pub(super) filled: bool,
    put_at: u64,
}

impl HostReference {
    pub(super) fn bytes(&self) -> u64 {
        self.pages.iter().map(|entry| HostPage::bytes_of(self.page_bytes, entry.content.1.len()) as u64).sum()
    }

    /// Puts a content. Returns whether it has to be copied.
    fn put(&mut self, content: &Content) -> bool {
        self.expire();
        let key = (self.key_of)(content);
        let before = self.pages.iter().position(|entry| entry.key == key).map(|at| self.pages.remove(at));
        let filled = before.is_some_and(|entry| entry.filled && entry.content == *content);
        self.pages.push(HostEntry { key, content: content.clone(), filled, put_at: self.now });
        while self.bytes() > self.capacity {
            self.pages.remove(0);
        }
        !filled
    }

    /// The pages that follow `matched` pages of a context, up to `limit` pages. They become the
    /// newest.
    pub(super) fn take_over(
        &mut self,
        ns: Namespace,
        words: &[u32],
        matched: usize,
        limit: usize,
        words_per_page: usize,
    ) -> usize {
        self.expire();
        let content = |index: usize| (ns, words[..(index + 1) * words_per_page].to_vec());
        let there =
            |index: &usize| self.pages.iter().any(|entry| entry.filled && entry.content == content(*index));
        let found = (matched..limit).take_while(there).count();
        for index in (matched..matched + found).rev() {
            let at = self.pages.iter().position(|entry| entry.content == content(index));
            let entry = self.pages.remove(at.expect("it was there"));
            self.pages.push(entry);
        }
        found
    }

    pub(super) fn fill(&mut self, content: &Content) {
        for entry in self.pages.iter_mut().filter(|entry| entry.content == *content) {
            entry.filled = true;
        }
    }

    pub(super) fn expire(&mut self) {
        let (now, time_to_live) = (self.now, self.time_to_live);
        self.pages.retain(|entry| time_to_live.is_none_or(|most| now - entry.put_at < most));
    }
}

impl Reference {
    pub(super) fn new(pages: usize, sessions_capacity: usize, words_per_page: usize) -> Self {
        Self {
            pages,
            sessions_capacity,
            words_per_page,
            published: HashMap::new(),
            contents: BTreeMap::new(),
            references: BTreeMap::new(),
            unreferenced: Vec::new(),
            withdrawn: BTreeSet::new(),
            epochs: BTreeMap::new(),
            sessions: Vec::new(),
            evictions: 0,
            offloaded: Vec::new(),
            host: None,
        }
    }

    pub(super) fn free(&self) -> usize {
        self.pages - self.references.len() - self.unreferenced.len()
    }

    pub(super) fn available(&self) -> usize {
        self.free() + self.unreferenced.len()
    }

    /// The pages of the longest cached prefix of at most `max_words` words.
    pub(super) fn longest(&self, ns: Namespace, words: &[u32], max_words: usize) -> Vec<PageId> {
        let ends = (self.words_per_page..=words.len().min(max_words)).step_by(self.words_per_page);
        ends.map_while(|end| self.published.get(&(ns, words[..end].to_vec())).copied()).collect()
    }

    pub(super) fn hold(&mut self, page: PageId) {
        *self.references.entry(page).or_default() += 1;
        self.unreferenced.retain(|&other| other != page);
    }

    pub(super) fn release(&mut self, page: PageId) {
        let references = self.references.get_mut(&page).expect("only held pages are released");
        *references -= 1;
        if *references == 0 {
            self.references.remove(&page);
            self.withdrawn.remove(&page);
            if self.contents.contains_key(&page) {
                self.unreferenced.push(page);
            }
        }
    }

    /// Accounts for pages the cache has handed out: free ones first, then the oldest unreferenced
    /// ones in order.
    pub(super) fn allocate(&mut self, handed_out: &[PageId]) {
        for &page in handed_out {
            assert!(!self.references.contains_key(&page), "{page:?} is held and was handed out");
            if self.free() > 0 {
                assert!(!self.contents.contains_key(&page), "{page:?} was evicted while pages were free");
            } else {
                assert_eq!(page, self.unreferenced.remove(0), "the oldest page must go first");
                self.offload(page);
                let (ns, words) = self.unpublish(page);
                let is_after = |other: &Content| other.0 == ns && other.1.starts_with(&words);
                assert!(
                    !self.published.keys().any(is_after),
                    "{page:?} was evicted before the pages after it"
                );
                self.evictions += 1;
            }
            self.references.insert(page, 1);
        }
    }

    /// Puts a page into the host tier.
    pub(super) fn offload(&mut self, page: PageId) {
        let Some(host) = &mut self.host else { return };
        let content = self.contents[&page].clone();
        if host.put(&content) {
            self.offloaded.push((page, content));
        }
    }

    /// The answer that publishing must give. Moves the references accordingly.
    pub(super) fn publish(
        &mut self,
        ns: Namespace,
        table: &[PageId],
        index: usize,
        words: &[u32],
    ) -> Publish {
        let page = table[index];
        let content = (ns, words[..(index + 1) * self.words_per_page].to_vec());
        let follows_withdrawn = index > 0 && self.withdrawn.contains(&table[index - 1]);
        if self.withdrawn.contains(&page) || follows_withdrawn {
            self.withdrawn.insert(page);
            return Publish::Withdrawn;
        }
        match self.published.get(&content) {
            Some(&existing) if existing == page => Publish::Published,
            Some(&existing) => {
                self.hold(existing);
                self.release(page);
                Publish::Duplicate(existing)
            }
            None => {
                self.published.insert(content.clone(), page);
                self.contents.insert(page, content);
                Publish::Published
            }
        }
    }

    pub(super) fn remember(&mut self, key: SessionKey, table: &[PageId]) {
        let Some(&tail) = table.iter().rev().find(|page| self.contents.contains_key(page)) else { return };
        self.sessions.retain(|session| session.0 != key);
        self.sessions.push((key, tail, self.epoch(tail)));
        if self.sessions.len() > self.sessions_capacity {
            self.sessions.remove(0);
        }
    }

    /// Returns how many pages become free.
    pub(super) fn forget(&mut self, ns: Namespace) -> usize {
        let free_before = self.free();
        let of_ns = |(page, content): (&PageId, &Content)| (content.0 == ns).then_some(*page);
        for page in self.contents.iter().filter_map(of_ns).collect::<Vec<_>>() {
            self.unpublish(page);
            self.unreferenced.retain(|&other| other != page);
            if self.references.contains_key(&page) {
                self.withdrawn.insert(page);
            }
        }
        if let Some(host) = &mut self.host {
            host.pages.retain(|entry| entry.content.0 != ns);
        }
        let epochs = &self.epochs;
        self.sessions.retain(|(_, tail, epoch)| epochs.get(tail).copied().unwrap_or(0) == *epoch);
        self.free() - free_before
    }

    /// Whether a held page is private: not published, and never was.
    pub(super) fn is_private(&self, page: PageId) -> bool {
        !self.contents.contains_key(&page) && !self.withdrawn.contains(&page)
    }

    fn unpublish(&mut self, page: PageId) -> Content {
        let content = self.contents.remove(&page).expect("the page is published");
        self.published.remove(&content);
        *self.epochs.entry(page).or_default() += 1;
        content
    }

    pub(super) fn epoch(&self, page: PageId) -> u64 {
        self.epochs.get(&page).copied().unwrap_or(0)
    }
}
