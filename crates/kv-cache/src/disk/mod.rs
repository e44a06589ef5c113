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
//! - **Nothing on disk is believed.** A page is used only when checksums over its entry, its words and its contents are
//!   right, and when its namespace and every one of its words are those of the context that asks. The checksums are
//!   keyed: a slot of another pool, another place or another server's directory is as wrong as a torn one.
//! - **Nobody waits for the disk but whoever asked for a page.** The engine's thread looks at tables in memory. What is to
//!   be written waits in a bounded queue, and the oldest of it is dropped and counted when the disk is slower.
//! - **A crash costs what was in flight.** Slots are overwritten without a journal and without flushing: what was half
//!   written fails its checksum.
//! - **A disk that fails is left alone.** After the first error nothing is read or written any more; requests compute.
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

/// Called when there is news of a disk. Comes from any thread, and must not block.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// Something to be done on a disk.
#[derive(Debug)]
pub enum Job {
    /// Write a page, whose contents have arrived, into a slot.
    Write {
        /// Where.
        slot: u32,
        /// Larger than that of any page that was written before.
        turn: u64,
        /// When, in seconds since 1970.
        at: u64,
        /// The page's key.
        key: HostKey,
        /// What.
        page: Arc<HostPage>,
    },
    /// Read a slot that should hold this page.
    Read {
        /// Where.
        slot: u32,
        /// The page's key.
        key: HostKey,
        /// What it must be; its contents are wanted.
        page: Arc<HostPage>,
    },
    /// Overwrite a slot with nothing.
    Erase {
        /// Where.
        slot: u32,
    },
    /// Make all of it unfindable, now and after a restart.
    Discard,
}

/// Something that was done, or failed.
#[derive(Debug)]
pub enum Done {
    /// [`Job::Write`].
    Written {
        /// Where.
        slot: u32,
        /// The page's key.
        key: HostKey,
        /// Whether it is there.
        result: io::Result<()>,
    },
    /// [`Job::Read`].
    Read {
        /// Where.
        slot: u32,
        /// The page's key.
        key: HostKey,
        /// What was wanted.
        page: Arc<HostPage>,
        /// Its contents, verified.
        result: Result<Box<[u8]>, ReadError>,
        /// How long reading it took, waiting for a thread not counted.
        took: Duration,
    },
    /// [`Job::Erase`].
    Erased {
        /// Where.
        slot: u32,
        /// Whether it is gone.
        result: io::Result<()>,
    },
}

/// Whoever carries out jobs: threads in a server, a table in simulations.
pub trait DiskIo: Send {
    /// Takes a job, which is carried out some time later. Writes, erasures and discards are carried out in order. Never
    /// blocks.
    fn start(&mut self, job: Job);

    /// Something that was done since, if anything was.
    fn done(&mut self) -> Option<Done>;

    /// Seconds since 1970.
    fn now(&self) -> u64;

    /// How many reads are carried out at the same time.
    fn readers(&self) -> usize;

    /// Waits until something is done, at most so long.
    fn wait(&mut self, most: Duration);

    /// Sets who is to be told when something is done.
    fn set_waker(&mut self, waker: Waker);
}
