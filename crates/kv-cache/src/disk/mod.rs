//! The disk tier: pages in files, so that they outlive the process.
//!
//! ```text
//!  put ──► arriving ──► queue ──► writer ──► slot          get what is in memory, or was read and is held
//!          contents are  bounded   a thread    a fixed place    fetch ──► reader ──► verified ──► host page
//!          on their way                        in two files               a thread
//! ```
//!
//! | module | one idea |
//! | --- | --- |
//! | [`entry`] | the bytes that say what a slot holds, and the checksums over them |
//! | [`files`] | writing, reading, erasing and listing slots of two files |
//! | [`slots`] | which slot holds what, and which goes next: a pure state machine |
//! | [`tier`] | the tier: memory in front, the disk behind it |
//! | [`threads`] | the threads that read and write |
//!
//! Invariants:
//!
//! - **Nothing on disk is trusted.** A page is used only when the checksums over its entry, its
//!   words and its contents are right, and when its namespace and every one of its words equal
//!   those of the context that asks. The checksums are keyed: a slot of another pool, another place
//!   or another server's directory fails like a torn one.
//! - **Only a request that asked for a page waits for the disk.** The engine's thread looks at
//!   tables in memory. Pages to be written wait in a bounded queue. When the disk is slower, the
//!   oldest is dropped and counted.
//! - **A crash costs what was in flight.** Slots are overwritten without a journal and without
//!   flushing: a slot that was half written fails its checksum.
//! - **A failed disk is left alone.** After the first error nothing is read or written any more,
//!   and requests compute their pages.
//!
//! What this must not know: what the contents mean, where the files are.

mod entry;
mod files;
mod slots;
mod storage;
mod threads;
mod tier;

#[cfg(test)]
mod tests;

pub use files::{Opened, ReadError, SlotFiles, SlotLayout};
pub use storage::Storage;
pub use threads::DiskThreads;
pub use tier::{DiskConfig, DiskTier, DiskUsage};

use std::{io, sync::Arc, time::Duration};

use crate::host::{HostKey, HostPage};

/// Called when a disk job is done. The call may come from any thread and must not block.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// A job for the disk.
#[derive(Debug)]
pub enum Job {
    /// Write a page whose contents have arrived into a slot.
    Write {
        /// Number of the slot.
        slot: u32,
        /// Number of this write; larger than that of every earlier write.
        turn: u64,
        /// Time of the write, in seconds since 1970.
        at: u64,
        /// Key of the page.
        key: HostKey,
        /// The page to write.
        page: Arc<HostPage>,
    },
    /// Read a slot that should hold this page.
    Read {
        /// Number of the slot.
        slot: u32,
        /// Key of the page.
        key: HostKey,
        /// The page that the slot must hold. It has no contents yet.
        page: Arc<HostPage>,
    },
    /// Overwrite a slot with zeros.
    Erase {
        /// Number of the slot.
        slot: u32,
    },
    /// Make every slot unfindable, now and after a restart.
    Discard,
}

/// The result of a job, successful or not.
#[derive(Debug)]
pub enum Done {
    /// Result of a [`Job::Write`].
    Written {
        /// Number of the slot.
        slot: u32,
        /// Key of the page.
        key: HostKey,
        /// Whether the page was written.
        result: io::Result<()>,
    },
    /// Result of a [`Job::Read`].
    Read {
        /// Number of the slot.
        slot: u32,
        /// Key of the page.
        key: HostKey,
        /// The page that was asked for.
        page: Arc<HostPage>,
        /// The verified contents.
        result: Result<Box<[u8]>, ReadError>,
        /// How long the read took, without the wait for a thread.
        took: Duration,
    },
    /// Result of a [`Job::Erase`].
    Erased {
        /// Number of the slot.
        slot: u32,
        /// Whether the slot was overwritten.
        result: io::Result<()>,
    },
}

/// Carries out jobs: with threads in a server, with a table in simulations.
pub trait DiskIo: Send {
    /// Accepts a job, which is carried out later. Writes, erasures and discards are carried out in
    /// order. Never blocks.
    fn start(&mut self, job: Job);

    /// The next result, if a job was done since the last call.
    fn done(&mut self) -> Option<Done>;

    /// The current time, in seconds since 1970.
    fn now(&self) -> u64;

    /// The number of reads that are carried out at the same time.
    fn readers(&self) -> usize;

    /// Waits until a job is done, for at most `most`.
    fn wait(&mut self, most: Duration);

    /// Sets the function to call when a job is done.
    fn set_waker(&mut self, waker: Waker);
}
