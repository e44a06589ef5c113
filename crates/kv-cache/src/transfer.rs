//! Moving the contents of pages: the transfers, and the trait of the memory that the pages lie in.
//!
//! Place in the flow: the cache orders transfers as plain data, and the scheduler puts them into
//! the next plan. The executor of the plan does them first, in order, before any row is computed: a
//! page that is copied out is about to be written again.
//!
//! A page store whose copies are synchronous implements [`PageContents`] and calls
//! [`Transfer::carry_out`] to move the pages. A store that copies beside its other work handles the
//! transfers itself. It gives a host page [`HostContents`](crate::HostContents), which say when
//! they have arrived.
//!
//! A transfer that is never carried out, because its step failed before, does no harm. A page that
//! did not arrive in the host tier is never used, and one that did not come back is ordered again.

use std::sync::Arc;

use thiserror::Error;

use crate::{host::HostPage, page::PageId};

/// The memory of the pages, as far as moving their contents needs it. The model's page store
/// implements it.
pub trait PageContents {
    /// Bytes of the contents of one page.
    fn page_bytes(&self) -> usize;

    /// Copies a context page out. `to` has [`PageContents::page_bytes`] bytes.
    ///
    /// # Errors
    ///
    /// When the memory failed; the contents of `to` are not used then.
    fn export(&self, page: PageId, to: &mut [u8]) -> Result<(), TransferError>;

    /// Copies what was exported from some page into this one. Afterwards the two are equal in every
    /// bit that is ever read. `from` has [`PageContents::page_bytes`] bytes.
    ///
    /// # Errors
    ///
    /// When the memory failed.
    fn import(&mut self, from: &[u8], page: PageId) -> Result<(), TransferError>;
}

/// One page to be moved.
#[derive(Clone, Debug)]
pub enum Transfer {
    /// Copy a page out of the device.
    Export {
        /// The device page to copy.
        page: PageId,
        /// The host page that this fills.
        to: Arc<HostPage>,
    },
    /// Copy a page back to the device.
    Import {
        /// The host page, which must be filled.
        from: Arc<HostPage>,
        /// The device page to write.
        page: PageId,
    },
}

/// Why a transfer was not carried out: a bug of the caller that ordered it, or memory that failed.
#[derive(Clone, Eq, PartialEq, Debug, Error)]
pub enum TransferError {
    /// The page store's pages and the host page differ in size.
    #[error("a page has {actual} bytes, but the host tier expects {expected}")]
    Size {
        /// Bytes of a page in the page store.
        actual: usize,
        /// Bytes of the host page.
        expected: usize,
    },
    /// The host page to bring back is empty.
    #[error("cannot restore a page whose contents never arrived")]
    Empty,
    /// The memory that holds the pages failed.
    #[error("moving a page: {0}")]
    Memory(String),
}

impl Transfer {
    /// The device page that is copied or written.
    pub fn page(&self) -> PageId {
        let (Self::Export { page, .. } | Self::Import { page, .. }) = self;
        *page
    }

    /// Source and destination of an export; `None` for an import.
    pub fn leaving(&self) -> Option<(PageId, &Arc<HostPage>)> {
        match self {
            Self::Export { page, to } => Some((*page, to)),
            Self::Import { .. } => None,
        }
    }

    /// Destination and source of an import; `None` for an export.
    pub fn returning(&self) -> Option<(PageId, &Arc<HostPage>)> {
        match self {
            Self::Export { .. } => None,
            Self::Import { from, page } => Some((*page, from)),
        }
    }

    /// Checks that the host page is as large as the store's pages.
    ///
    /// # Errors
    ///
    /// When the sizes differ.
    pub fn check(&self, page_bytes: usize) -> Result<(), TransferError> {
        let (Self::Export { to: host, .. } | Self::Import { from: host, .. }) = self;
        match host.page_bytes() {
            expected if expected == page_bytes => Ok(()),
            expected => Err(TransferError::Size { actual: page_bytes, expected }),
        }
    }

    /// Moves the page, and waits for it.
    ///
    /// # Errors
    ///
    /// When sizes disagree, there is nothing to move, or the memory failed; the host page is then as it was.
    pub fn carry_out(&self, store: &mut impl PageContents) -> Result<(), TransferError> {
        self.check(store.page_bytes())?;
        match self {
            Self::Export { page, to } => to.fill(|contents| store.export(*page, contents)),
            Self::Import { from, page } => store.import(from.contents().ok_or(TransferError::Empty)?, *page),
        }
    }
}

/// Transfers are equal when they move the same page, not pages with the same contents.
impl PartialEq for Transfer {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Export { page: a, to: x }, Self::Export { page: b, to: y })
            | (Self::Import { page: a, from: x }, Self::Import { page: b, from: y }) => {
                a == b && Arc::ptr_eq(x, y)
            }
            _ => false,
        }
    }
}

impl Eq for Transfer {}
