//! The sizes of a cache, fixed at start-up, and how they are checked.
//!
//! Invariant: sizes that pass here can be multiplied and indexed with everywhere else without overflow.

use thiserror::Error;

/// Most pages or sessions a cache may have. Slot numbers are `u32`, and lists need one more slot
/// than entries.
const MAX_SLOTS: u32 = u32::MAX - 1;

/// Sizes and secret of a [`KvCache`](crate::KvCache).
#[derive(Clone)]
pub struct CacheConfig {
    /// How many pages exist. The model's page store has room for exactly these.
    pub pages: u32,
    /// Context positions per page; 32 unless measured otherwise.
    pub page_size: u32,
    /// `u32` words that describe one context position: 1 for token ids, more for models whose K/V
    /// also depend on actions and times.
    pub words_per_position: u32,
    /// How many users' newest chains are remembered; 0 turns sessions off.
    pub sessions: u32,
    /// Secret key of the chain hash: without it, collisions cannot be crafted. Draw it at random at
    /// start-up.
    pub hash_key: [u8; 32],
}

/// Why a [`CacheConfig`] was refused.
#[derive(Clone, Eq, PartialEq, Debug, Error)]
pub enum ConfigError {
    /// A size that must be at least one is zero.
    #[error("{0} must not be zero")]
    Zero(&'static str),
    /// A size, or a product of sizes, is beyond what can be addressed.
    #[error("{0} is too large")]
    TooLarge(&'static str),
    /// The tables do not fit in memory.
    #[error("not enough memory for {0}")]
    OutOfMemory(&'static str),
}

impl CacheConfig {
    /// Words that describe one page. Call on a checked configuration.
    pub(crate) fn words_per_page(&self) -> usize {
        self.page_size as usize * self.words_per_position as usize
    }

    /// Refuses sizes with which the tables cannot be built.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let at_least_one = [
            (self.pages, "pages"),
            (self.page_size, "page_size"),
            (self.words_per_position, "words_per_position"),
        ];
        for (value, name) in at_least_one {
            if value == 0 {
                return Err(ConfigError::Zero(name));
            }
        }
        for (value, name) in [(self.pages, "pages"), (self.sessions, "sessions")] {
            if value > MAX_SLOTS {
                return Err(ConfigError::TooLarge(name));
            }
        }
        (self.page_size as usize)
            .checked_mul(self.words_per_position as usize)
            .and_then(|words| words.checked_mul(self.pages as usize))
            .and_then(|words| words.checked_mul(size_of::<u32>()))
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .map(|_| ())
            .ok_or(ConfigError::TooLarge("pages x page_size x words_per_position"))
    }
}

/// A table of `len` equal entries, or a typed error where `vec!` would abort the process.
pub(crate) fn table<T: Clone>(len: usize, value: T, name: &'static str) -> Result<Vec<T>, ConfigError> {
    let mut table = Vec::new();
    table.try_reserve_exact(len).map_err(|_| ConfigError::OutOfMemory(name))?;
    table.resize(len, value);
    Ok(table)
}
