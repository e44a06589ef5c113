//! Bookkeeping of the paged KV cache: which page holds what, who uses it, and what goes when room is needed.
//!
//! A *page* is the KV of `page_size` consecutive context positions, over all layers. Its floats live with the
//! model, in an array indexed by [`PageId`]; this crate never sees them. It answers four questions:
//!
//! | question | who answers |
//! | --- | --- |
//! | which pages already hold the beginning of this context? | prefix index, found by keyed hashes |
//! | which pages may the rest be written to? | free list, then eviction of the least recently used |
//! | what did this user's last visit leave behind? | sessions: user -> tail of the newest chain |
//! | what was evicted and need not be computed again? | host tier: a second memory, see [`Transfer`] |
//! | what outlives the process? | [`disk`] tier: files behind that memory |
//!
//! ```text
//!              match_prefix                    allocate             compute, then publish
//!  context ───────────────────► pages 0..k ──────────────► pages k..n ──────────────────► findable by others
//!                                    │                                                          │
//!                                    └──────────────── release_chain ◄────── remember ◄─────────┘
//!
//!  a page:   Free ──allocate──► Private ──publish──► Published ──evict──► Free
//!              ▲                   │                     │ forget_namespace while referenced
//!              └────── release ────┴──── Withdrawn ◄─────┘
//! ```
//!
//! ```
//! use beamline_kv_cache::{CacheConfig, KvCache, Namespace, Publish, SessionKey};
//!
//! let mut cache = KvCache::new(CacheConfig {
//!     pages: 64,
//!     page_size: 2,
//!     words_per_position: 1,
//!     sessions: 8,
//!     hash_key: [0; 32], // a random secret
//! })?;
//! let ns = Namespace::new(b"sha256 of the checkpoint", b"tenant");
//! let user = SessionKey::new(&ns, "u1");
//! let context = [7, 8, 9, 10, 11]; // two whole pages, and a part of a third
//!
//! // The last row must be computed to get an answer from, so it is not asked for.
//! let mut table = Vec::new();
//! let covered = cache.match_prefix(&ns, Some(user), &context, context.len() - 1, &mut table);
//! assert_eq!(covered, 0);
//! cache.allocate(3 - table.len(), &mut table)?;
//! for index in covered / 2..2 {
//!     // ... the model computes page `table[index]` ...
//!     if let Publish::Duplicate(existing) = cache.publish(&ns, &table, index, &context) {
//!         table[index] = existing;
//!     }
//! }
//! cache.remember(user, &ns, &table);
//! cache.release_chain(&table);
//! assert_eq!(cache.peek_prefix(&ns, Some(user), &context, 4), 4);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Invariants
//!
//! * **Nothing is shared by accident.** A hash only nominates a page. Before it is returned, its
//!   namespace, its parent and every one of its words are compared with the request's.
//! * **One content, one page.** Two published pages never have the same parent, namespace and
//!   words.
//! * **Chains are held whole.** A holder of a published page also holds every page before it. Hence
//!   references are taken head first and given back tail first ([`KvCache::release_chain`] does),
//!   and an unreferenced page has unreferenced descendants only.
//! * **A private page has one holder.** Only a page that is published, or was, is shared.
//! * **Tail first.** Because chains are held whole, the list of unreferenced pages in order of
//!   release always has children before their parent. Its oldest page is a leaf, eviction takes
//!   O(1), and `free + unreferenced` is exactly what [`KvCache::allocate`] can deliver.
//! * **A recycled page is never mistaken for its former self.** A page's generation moves on when
//!   it stops being published; sessions and parent links name page and generation.
//!
//! # Limits
//!
//! [`KvCache::new`] allocates everything. The steady path does not allocate beyond the caller's own
//! output vectors and, with a host tier, one host page per eviction. Breaking a rule of use
//! (releasing a page that is not held, publishing out of order) is a bug of the caller and panics;
//! no request content can cause it.
//!
//! This crate must not know: contents of pages, tensors, devices, models, async. Clocks, threads
//! and files are in two places only, behind traits: [`MokaTier`] is a [`HostTier`],
//! [`disk::DiskThreads`] a [`disk::DiskIo`].

#![forbid(unsafe_code)]

mod allocation;
mod cache;
mod chain;
mod config;
pub mod disk;
mod fetch;
mod host;
mod index;
mod invariants;
mod list;
mod lookup;
mod namespace;
mod offload;
mod page;
mod publication;
mod reuse;
mod sessions;
mod stats;
mod transfer;
mod words;

#[cfg(test)]
mod tests;

pub use allocation::OutOfPages;
pub use cache::KvCache;
pub use config::{CacheConfig, ConfigError};
pub use fetch::Fetch;
pub use host::{HostContents, HostKey, HostMemory, HostPage, HostTier, HostUsage, LruTier, MokaTier};
pub use namespace::{Namespace, SessionKey};
pub use page::PageId;
pub use publication::Publish;
pub use reuse::ReuseClass;
pub use stats::{CacheStats, LookupCounts};
pub use transfer::{PageContents, Transfer, TransferError};
