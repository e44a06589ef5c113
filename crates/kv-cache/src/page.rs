//! What is known about one page: its state, its references, and its place in a chain once it is
//! published.
//!
//! Invariants: a free page has no references, a private one has one, a withdrawn one has at least
//! one. Only a published page has a place, and a parent's counters count its published children.

use crate::chain::Link;
use crate::namespace::Namespace;

/// A page: its number in the cache, and in the model's array of page contents.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug, Ord, PartialOrd)]
pub struct PageId(pub u32);

impl PageId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// A page and its generation. The reference is stale once the page's generation has moved on.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub(crate) struct PageRef {
    pub(crate) page: PageId,
    pub(crate) generation: u64,
}

/// Bookkeeping of one page.
#[derive(Clone)]
pub(crate) struct Page {
    pub(crate) state: State,
    /// How many holders the page has.
    pub(crate) references: u32,
    /// How often the page has stopped being published. 64 bits do not wrap in the life of a machine.
    pub(crate) generation: u64,
}

/// Where a page is in its life.
#[derive(Clone)]
pub(crate) enum State {
    /// In the free list.
    Free,
    /// Held by the request that computes it; no other request can find it.
    Private,
    /// Was published, or follows such a page, when its namespace was forgotten. Never findable again.
    Withdrawn,
    /// Findable; evictable when unreferenced.
    Published(Place),
}

/// The place of a published page in the forest of chains.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) ns: Namespace,
    pub(crate) link: Link,
    /// The page before this one; `None` for page 0 of a context.
    pub(crate) parent: Option<PageRef>,
    /// Pages before this one.
    pub(crate) depth: u32,
    /// Published pages whose parent this is.
    pub(crate) children: u32,
    /// Those of the children that have references.
    pub(crate) referenced_children: u32,
    /// The child published last: a hint that saves hashing. The child may have been evicted since.
    pub(crate) newest_child: Option<PageId>,
    /// Whether the page was put into the host tier: a hint, since the tier may have dropped it.
    pub(crate) copied: bool,
}

impl Page {
    pub(crate) const FREE: Self = Self { state: State::Free, references: 0, generation: 0 };

    pub(crate) fn place(&self) -> Option<&Place> {
        match &self.state {
            State::Published(place) => Some(place),
            State::Free | State::Private | State::Withdrawn => None,
        }
    }

    pub(crate) fn place_mut(&mut self) -> Option<&mut Place> {
        match &mut self.state {
            State::Published(place) => Some(place),
            State::Free | State::Private | State::Withdrawn => None,
        }
    }
}
