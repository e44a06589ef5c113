//! The words of every published page, in one flat array: what a hit is verified against.
//!
//! It knows nothing of page states. The caller that reads a page's words knows that the page is
//! published.

use crate::config::{CacheConfig, ConfigError, table};
use crate::page::PageId;

/// Words of all pages, `words_per_page` each.
pub(crate) struct WordStore {
    words: Vec<u32>,
    words_per_page: usize,
}

impl WordStore {
    /// Allocates the words of all pages. The configuration must have been checked.
    pub(crate) fn new(config: &CacheConfig) -> Result<Self, ConfigError> {
        let words_per_page = config.words_per_page();
        let words = table(config.pages as usize * words_per_page, 0, "words of the pages")?;
        Ok(Self { words, words_per_page })
    }

    pub(crate) fn of(&self, page: PageId) -> &[u32] {
        let start = page.index() * self.words_per_page;
        &self.words[start..start + self.words_per_page]
    }

    pub(crate) fn set(&mut self, page: PageId, words: &[u32]) {
        let start = page.index() * self.words_per_page;
        self.words[start..start + self.words_per_page].copy_from_slice(words);
    }
}
