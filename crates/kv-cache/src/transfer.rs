//! Moving the contents of pages: what is to be moved, and the trait of whoever holds the memory.
//!
//! Place in the flow: the cache orders transfers as plain data, the scheduler puts them into the next plan, and whoever
//! carries out the plan does them first, in order, before any row is computed: a page that is copied out is about to be
//! written again.
//!
//! A page store whose memory is copied while the host looks on implements [`PageContents`] and has [`Transfer::carry_out`] move the pages. One that
//! copies beside its other work looks into the transfers itself and gives a host page [`HostContents`](crate::HostContents), which say
//! when they have arrived.
//!
//! A transfer that is never carried out, because its step failed before, does no harm: a page that did not arrive in
//! the host tier is never believed, and one that did not come back is ordered again.

use std::sync::Arc;

use thiserror::Error;

use crate::{host::HostPage, page::PageId};

/// The memory of the pages, as far as moving their contents goes. The model's page store implements it.
pub trait PageContents {
    /// Bytes of the contents of one page.
    fn page_bytes(&self) -> usize;

    /// Copies a context page out. `to` has [`PageContents::page_bytes`] bytes.
    ///
    /// # Errors
    ///
    /// When the memory failed; what `to` holds is not believed then.
    fn export(&self, page: PageId, to: &mut [u8]) -> Result<(), TransferError>;

    /// Copies what was exported from some page into this one: afterwards it is that page in every bit that is ever
    /// read. `from` has [`PageContents::page_bytes`] bytes.
    ///
    /// # Errors
    ///
    /// When the memory failed.
    fn import(&mut self, from: &[u8], page: PageId) -> Result<(), TransferError>;
}

/// One page to be moved.
#[derive(Clone, Debug)]
pub enum Transfer {
    /// Out of the device.
    Export {
        /// From where.
        page: PageId,
        /// Where to; filled by this.
        to: Arc<HostPage>,
    },
    /// Back to the device.
    Import {
        /// From where; filled.
        from: Arc<HostPage>,
        /// Where to.
        page: PageId,
    },
}

/// A transfer that was not carried out: a bug of whoever ordered it, or memory that failed.
#[derive(Clone, Eq, PartialEq, Debug, Error)]
pub enum TransferError {
    /// The page store's pages have another size.
    #[error("a page has {actual} bytes, the host tier was told {expected}")]
    Size {
        /// Of the page store.
        actual: usize,
        /// Of the host page.
        expected: usize,
    },
    /// There is nothing to bring back.
    #[error("a page is to come back that never arrived")]
    Empty,
    /// The memory that the pages lie in.
    #[error("moving a page: {0}")]
    Memory(String),
}

impl Transfer {
    /// The page of the device.
    pub fn page(&self) -> PageId {
        let (Self::Export { page, .. } | Self::Import { page, .. }) = self;
        *page
    }

    /// From where to where, if the page leaves.
    pub fn leaving(&self) -> Option<(PageId, &Arc<HostPage>)> {
        match self {
            Self::Export { page, to } => Some((*page, to)),
            Self::Import { .. } => None,
        }
    }

    /// To where from where, if the page comes back.
    pub fn returning(&self) -> Option<(PageId, &Arc<HostPage>)> {
        match self {
            Self::Export { .. } => None,
            Self::Import { from, page } => Some((*page, from)),
        }
    }

    /// Whether the host page is as large as the store's.
    ///
    /// # Errors
    ///
    /// When it is not.
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
