//! One page in host memory: whose it is, what it was computed from, and the contents once they have arrived.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use crate::namespace::Namespace;

/// Estimated overhead of a page in a tier, in bytes: the tier's own entry, the key, this struct.
const OVERHEAD: usize = 384;

/// The key under which a page is filed: the link of its chain. It says where to look and proves
/// nothing.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct HostKey(pub(crate) [u8; 32]);

impl fmt::Debug for HostKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostKey({:02x}{:02x}{:02x}{:02x}..)", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

/// A page in host memory.
pub struct HostPage {
    ns: Namespace,
    /// Words from position 0 to the end of the page: all that the contents depend on besides the namespace.
    words: Box<[u32]>,
    page_bytes: usize,
    contents: OnceLock<Box<dyn HostContents>>,
}

/// Contents of a page, in memory that belongs to the page store that moved them.
pub trait HostContents: Send + Sync {
    /// The contents, once they are known to have arrived in full. `None` until then, and for ever
    /// if the copy failed.
    fn bytes(&self) -> Option<&[u8]>;
}

impl HostContents for Box<[u8]> {
    fn bytes(&self) -> Option<&[u8]> {
        Some(self)
    }
}

impl HostPage {
    /// A page whose contents, `page_bytes` bytes, have yet to arrive.
    pub(crate) fn new(ns: Namespace, words: Box<[u32]>, page_bytes: usize) -> Arc<Self> {
        Arc::new(Self { ns, words, page_bytes, contents: OnceLock::new() })
    }

    /// Bytes charged for the page.
    pub fn bytes(&self) -> usize {
        self.page_bytes + size_of_val(&*self.words) + OVERHEAD
    }

    /// Bytes charged for a page of `page_bytes` bytes of contents after `words` words.
    pub fn bytes_of(page_bytes: usize, words: usize) -> usize {
        page_bytes.saturating_add(words.saturating_mul(4)).saturating_add(OVERHEAD)
    }

    /// The namespace that the page belongs to.
    pub fn namespace(&self) -> &Namespace {
        &self.ns
    }

    /// Whether the contents have arrived.
    pub fn is_filled(&self) -> bool {
        self.contents().is_some()
    }

    /// Whether the page was given contents. They may still be on their way, or lost.
    pub(crate) fn has_contents(&self) -> bool {
        self.contents.get().is_some()
    }

    /// Words from position 0 to the end of the page.
    pub(crate) fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether the page is the end of exactly this context.
    pub(crate) fn is_of(&self, ns: &Namespace, words: &[u32]) -> bool {
        self.ns == *ns && *self.words == *words
    }

    pub(crate) fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// The contents, once they have arrived.
    pub fn contents(&self) -> Option<&[u8]> {
        self.contents.get()?.bytes()
    }

    /// Gives the page contents, which may still be on their way. The first contents given stay.
    pub fn keep(&self, contents: Box<dyn HostContents>) {
        // A faster thread put the same contents there.
        let _ = self.contents.set(contents);
    }

    /// Fills the page. The first contents stay. Where filling fails, the page stays empty.
    pub(crate) fn fill<E>(&self, fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<(), E> {
        if !self.is_filled() {
            let mut contents = vec![0; self.page_bytes].into_boxed_slice();
            fill(&mut contents)?;
            self.keep(Box::new(contents));
        }
        Ok(())
    }
}

impl fmt::Debug for HostPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostPage")
            .field("ns", &self.ns)
            .field("words", &self.words.len())
            .field("filled", &self.is_filled())
            .finish()
    }
}
