//! [`KvCache`]: the tables, and how they are built. What it does is in [`lookup`](crate::lookup),
//! [`allocation`](crate::allocation), [`publication`](crate::publication), [`offload`](crate::offload).

use crate::chain::ChainHash;
use crate::config::{CacheConfig, ConfigError, table};
use crate::index::SlotIndex;
use crate::list::SlotList;
use crate::offload::Host;
use crate::page::{Page, PageId, PageRef, Place};
use crate::sessions::SessionTable;
use crate::stats::Counters;
use crate::words::WordStore;

/// The bookkeeping of one pool of pages. Owned by one thread; see the crate documentation for the
/// rules of use.
pub struct KvCache {
    pub(crate) page_size: usize,
    pub(crate) words_per_position: usize,
    pub(crate) pages: Vec<Page>,
    /// What the published pages hold.
    pub(crate) words: WordStore,
    pub(crate) hash: ChainHash,
    /// The prefix index: published pages by their link.
    pub(crate) index: SlotIndex,
    /// How many pages are published.
    pub(crate) published: usize,
    /// Pages that hold nothing; the last one freed is the first one used again.
    pub(crate) free: Vec<PageId>,
    /// Published pages without references, oldest release first; children before their parent.
    pub(crate) unreferenced: SlotList,
    pub(crate) sessions: SessionTable,
    pub(crate) counters: Counters,
    /// The host tier, which receives evicted pages; `None` when there is none.
    pub(crate) host: Option<Host>,
}

impl KvCache {
    /// Builds an empty cache: all the memory it will ever need.
    pub fn new(config: CacheConfig) -> Result<Self, ConfigError> {
        let hash = ChainHash::Keyed(config.hash_key);
        Self::with_hash(config, hash)
    }

    /// The seam at which tests substitute a hash that collides.
    pub(crate) fn with_hash(config: CacheConfig, hash: ChainHash) -> Result<Self, ConfigError> {
        config.check()?;
        let mut free = table(config.pages as usize, PageId(0), "pages")?;
        for (page, entry) in (0..config.pages).rev().zip(&mut free) {
            *entry = PageId(page);
        }
        Ok(Self {
            page_size: config.page_size as usize,
            words_per_position: config.words_per_position as usize,
            pages: table(config.pages as usize, Page::FREE, "pages")?,
            words: WordStore::new(&config)?,
            hash,
            index: SlotIndex::new(config.pages, "prefix index")?,
            published: 0,
            free,
            unreferenced: SlotList::new(config.pages, "pages")?,
            sessions: SessionTable::new(config.sessions)?,
            counters: Counters::default(),
            host: None,
        })
    }

    pub(crate) fn words_per_page(&self) -> usize {
        self.page_size * self.words_per_position
    }

    /// The words of page `index` of the context `words`.
    pub(crate) fn page_words<'a>(&self, words: &'a [u32], index: usize) -> &'a [u32] {
        let start = index * self.words_per_page();
        &words[start..start + self.words_per_page()]
    }

    /// The place of a published page.
    pub(crate) fn place(&self, page: PageId) -> &Place {
        let Some(place) = self.pages[page.index()].place() else { panic!("{page:?} is not published") };
        place
    }

    /// The place of the page a parent link leads to. Parents outlive their children, so the link
    /// cannot be stale.
    pub(crate) fn parent_mut(&mut self, parent: PageRef) -> &mut Place {
        let page = &mut self.pages[parent.page.index()];
        assert_eq!(page.generation, parent.generation, "{parent:?} was recycled before its children");
        let Some(place) = page.place_mut() else {
            unreachable!("a page that is not published has no children")
        };
        place
    }

    /// The same for a page whose child gains its first reference or loses its last: chains are held
    /// whole.
    pub(crate) fn held_parent_mut(&mut self, parent: PageRef) -> &mut Place {
        let references = self.pages[parent.page.index()].references;
        assert!(references > 0, "a page is held without the page before it, {:?}", parent.page);
        self.parent_mut(parent)
    }
}
