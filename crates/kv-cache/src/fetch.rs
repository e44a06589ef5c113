//! Bringing pages back from where reading takes time, before the request that needs them is
//! admitted.
//!
//! [`KvCache::fetch`] follows a context where the match on the device ends, and starts reading the
//! pages that are on disk. Its caller may wait for them or not. [`KvCache::match_host`] finds the
//! pages that have arrived by the time the context is matched; the rest is computed.

use std::{sync::Arc, time::Duration};

use crate::{
    cache::KvCache,
    disk::Waker,
    host::HostPage,
    namespace::{Namespace, SessionKey},
    offload::key_of,
};

/// Pages of one context, some of which are being read. They are kept for as long as this is held.
#[derive(Debug)]
pub struct Fetch {
    pages: Vec<Arc<HostPage>>,
    _holds: Vec<Arc<()>>,
    /// How many of the pages are being read.
    coming: usize,
    takes: Duration,
    patience: Option<Duration>,
}

impl Fetch {
    /// Whether every page has arrived or failed.
    pub fn is_over(&self) -> bool {
        self.pages.iter().all(|page| page.has_contents())
    }

    /// How many pages still had to be read when the fetch began.
    pub fn coming(&self) -> usize {
        self.coming
    }

    /// How long the reads will take, estimated from earlier ones.
    pub fn takes(&self) -> Duration {
        self.takes
    }

    /// How long to wait for the pages; `None` if not configured.
    pub fn patience(&self) -> Option<Duration> {
        self.patience
    }
}

impl KvCache {
    /// Starts reading the pages that are on disk and that a match of this context would not find.
    /// `None` if there are none to read.
    pub fn fetch(
        &mut self,
        ns: &Namespace,
        session: Option<SessionKey>,
        words: &[u32],
        max_positions: usize,
    ) -> Option<Fetch> {
        self.host.as_ref()?.memory.tier.disk()?;
        let (matched, mut link) = self.end_of_prefix(ns, session, words, max_positions);
        let limit = (words.len() / self.words_per_position).min(max_positions) / self.page_size;
        let (words_per_page, mut pages, mut holds) = (self.words_per_page(), Vec::new(), Vec::new());
        let tier = &mut self.host.as_mut()?.memory.tier;
        for index in matched..limit {
            let end = (index + 1) * words_per_page;
            link = self.hash.next(&link, &words[end - words_per_page..end]);
            let page = tier.fetch(&key_of(&link), ns, &words[..end]);
            let Some(page) = page.filter(|page| page.is_of(ns, &words[..end])) else { break };
            if !page.has_contents() {
                holds.extend(tier.hold());
            }
            pages.push(page);
        }
        let coming = pages.iter().filter(|page| !page.has_contents()).count();
        let (takes, patience) = (tier.reading_takes(), tier.patience());
        (coming > 0).then_some(Fetch { pages, _holds: holds, coming, takes, patience })
    }

    /// Sets the function to call when something was read from disk, or written there.
    pub fn set_waker(&mut self, waker: Waker) {
        if let Some(host) = &mut self.host {
            host.memory.tier.set_waker(waker);
        }
    }
}
