//! Pages on their way between device and host memory, beside the computing.
//!
//! Place in the flow: the executor hands over the transfers of a plan, lays its rows out, and says which
//! pages the step writes and reads. This code asks the device's second queue for the copies and orders
//! the two queues where they meet. The host waits for nothing.
//!
//! ```text
//! transfer   | out: page 7, page 9 | back: layer 0 of pages 4, 5 | layer 1 | layer 2 | ..
//! computing  | the step before    ..      | layer 0 ..  | layer 1 ..  | layer 2 ..
//! ```
//!
//! Invariants:
//!
//! - A copy begins after the last step that used its page, and after no later one.
//! - A page is written by a step only when copies out of it, or into it, are over.
//! - A layer's attention waits for that layer of the pages it reads, and for nothing else that is on its way.
//! - A host page stays empty until its copy has succeeded. If the copy fails, it stays empty.
//!
//! What this must not know: layouts, models.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use beamline_kv_cache::{HostContents, HostPage, PageId, Transfer, TransferError};

use super::device::{Device, DeviceError, Direction, HostCopy, Mark, Queue};
use super::pages::DevicePages;
use super::pinned::{PinnedPage, PinnedPages};

/// Pages on their way.
#[derive(Debug)]
pub struct PageTransfers {
    device: Arc<dyn Device>,
    pinned: Arc<PinnedPages>,
    /// For each page, the end of the last step that used it.
    used: Vec<Option<Mark>>,
    /// The end of all steps before one that failed: which pages those used is not known.
    before_failure: Option<Mark>,
    /// A step began and has not ended.
    in_step: bool,
    /// For each page that is on its way, or was lately, the end of the last copy.
    moving: HashMap<u32, Mark>,
    /// What comes back, in order.
    returning: VecDeque<Returning>,
}

/// Pages that come back together.
#[derive(Debug)]
struct Returning {
    pages: HashSet<u32>,
    /// The end of each layer.
    layers: Vec<Mark>,
    /// Held until they have been read.
    _hosts: Vec<Arc<HostPage>>,
}

impl PageTransfers {
    /// Without any page on its way, for the number and size of `pages`.
    pub fn new(device: &Arc<dyn Device>, pages: &DevicePages) -> Self {
        Self {
            device: Arc::clone(device),
            pinned: PinnedPages::new(device, pages.page_bytes()),
            used: vec![None; pages.pages()],
            before_failure: None,
            in_step: false,
            moving: HashMap::new(),
            returning: VecDeque::new(),
        }
    }

    /// Begins a step: asks for its transfers, in order.
    ///
    /// # Errors
    ///
    /// When a transfer makes no sense, or the device fails.
    pub fn begin(&mut self, pages: &DevicePages, transfers: &[Transfer]) -> Result<(), TransferError> {
        if self.in_step {
            self.before_failure = Some(self.device.mark(Queue::Compute)?);
        }
        self.in_step = true;
        self.forget_what_is_over()?;
        let mut last_use = self.before_failure;
        for transfer in transfers {
            transfer.check(pages.page_bytes())?;
            let page = transfer.page();
            let used = self.used.get(page.0 as usize);
            let used = used.ok_or_else(|| TransferError::Memory(format!("{page:?} is not there")))?;
            last_use = latest(last_use.into_iter().chain(*used));
        }
        if let Some(last_use) = last_use.filter(|_| !transfers.is_empty()) {
            self.device.order(last_use, Queue::Transfer)?;
        }
        // In the order of the plan: a page leaves before another comes into its place.
        for alike in transfers.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
            let leaving: Vec<(PageId, &Arc<HostPage>)> = alike.iter().filter_map(Transfer::leaving).collect();
            let returning: Vec<(PageId, &Arc<HostPage>)> =
                alike.iter().filter_map(Transfer::returning).collect();
            self.send(pages, &leaving)?;
            self.bring_back(pages, &returning)?;
        }
        Ok(())
    }

    /// The step writes these pages: afterwards it may.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub fn before_writes(&self, written: impl Iterator<Item = u32>) -> Result<(), DeviceError> {
        if self.moving.is_empty() {
            return Ok(());
        }
        match latest(written.filter_map(|page| self.moving.get(&page).copied())) {
            Some(last) => self.device.order(last, Queue::Compute),
            None => Ok(()),
        }
    }

    /// What each layer of a step must wait for that reads these pages; nothing if none of them is on its way.
    pub fn arrivals(&self, read: &[u32]) -> &[Mark] {
        // What comes back later comes after all layers of what came back earlier.
        let last = self
            .returning
            .iter()
            .rev()
            .find(|returning| read.iter().any(|page| returning.pages.contains(page)));
        last.map_or(&[], |returning| &returning.layers)
    }

    /// The step was asked for in full, up to here, and used these pages.
    pub fn end(&mut self, end: Mark, used: &[u32]) {
        for &page in used {
            if let Some(used) = self.used.get_mut(page as usize) {
                *used = Some(end);
            }
        }
        self.in_step = false;
    }

    fn forget_what_is_over(&mut self) -> Result<(), DeviceError> {
        while let Some(first) = self.returning.front() {
            let is_over = first.layers.last().map_or(Ok(true), |mark| self.device.is_over(*mark))?;
            if !is_over {
                break;
            }
            self.returning.pop_front();
        }
        let mut failed = None;
        self.moving.retain(|_, mark| match self.device.is_over(*mark) {
            Ok(is_over) => !is_over,
            Err(error) => {
                failed = Some(error);
                true
            }
        });
        failed.map_or(Ok(()), Err)
    }

    /// Copies pages out.
    fn send(&mut self, pages: &DevicePages, leaving: &[(PageId, &Arc<HostPage>)]) -> Result<(), DeviceError> {
        let mut places = Vec::with_capacity(leaving.len());
        for (page, host) in leaving.iter().filter(|(_, host)| !host.is_filled()) {
            // Where no more memory can be locked, the page is not kept.
            let Ok(place) = self.pinned.take() else { break };
            let copies: Vec<HostCopy> = copies(pages, *page, place.address()).collect();
            // SAFETY: the place is as large as a page, and is not read before the copy is over.
            unsafe { self.device.start_copies(Direction::ToHost, &copies) }?;
            places.push((page, host, place));
        }
        if places.is_empty() {
            return Ok(());
        }
        let end = self.device.mark(Queue::Transfer)?;
        for (page, host, place) in places {
            self.moving.insert(page.0, end);
            let state = AtomicU8::new(ON_ITS_WAY);
            host.keep(Box::new(Arriving { device: Arc::clone(&self.device), place, end, state }));
        }
        Ok(())
    }

    /// Copies pages back, layer by layer.
    fn bring_back(
        &mut self,
        pages: &DevicePages,
        returning: &[(PageId, &Arc<HostPage>)],
    ) -> Result<(), TransferError> {
        let mut all = Vec::with_capacity(returning.len());
        for (page, host) in returning {
            let contents = host.contents().ok_or(TransferError::Empty)?;
            all.push(copies(pages, *page, contents.as_ptr() as u64).collect::<Vec<_>>());
        }
        if all.is_empty() {
            return Ok(());
        }
        let mut layers = Vec::with_capacity(pages.layers());
        for layer in 0..pages.layers() {
            let parts = DevicePages::parts_of(layer);
            let copies: Vec<HostCopy> = all.iter().flat_map(|page| &page[parts.clone()]).copied().collect();
            // SAFETY: the host pages are held until the copies are over. A page of the device is as
            // large as theirs, and no step reads or writes it before `before_writes` and `arrivals` have
            // ordered it.
            unsafe { self.device.start_copies(Direction::ToDevice, &copies) }?;
            layers.push(self.device.mark(Queue::Transfer)?);
        }
        if let Some(&end) = layers.last() {
            self.moving.extend(returning.iter().map(|(page, _)| (page.0, end)));
        }
        self.returning.push_back(Returning {
            pages: returning.iter().map(|(page, _)| page.0).collect(),
            layers,
            _hosts: returning.iter().map(|(_, host)| Arc::clone(host)).collect(),
        });
        Ok(())
    }
}

impl Drop for PageTransfers {
    fn drop(&mut self) {
        // The memory of the pages is released in the other queue, which knows nothing of the copies.
        let _ = self.device.wait();
    }
}

/// The copies between the parts of a page and its contents at a host address.
fn copies(pages: &DevicePages, page: PageId, mut host: u64) -> impl Iterator<Item = HostCopy> {
    pages.parts(page).into_iter().map(move |(device, bytes)| {
        let copy = HostCopy { device, host, bytes };
        host += bytes as u64;
        copy
    })
}

/// The last of some marks of one queue.
fn latest(marks: impl Iterator<Item = Mark>) -> Option<Mark> {
    marks.max_by_key(|mark| mark.number)
}

const ON_ITS_WAY: u8 = 0;
const ARRIVED: u8 = 1;
const FAILED: u8 = 2;

/// Contents that may still be on their way.
#[derive(Debug)]
struct Arriving {
    device: Arc<dyn Device>,
    place: PinnedPage,
    /// The end of the copy.
    end: Mark,
    state: AtomicU8,
}

impl HostContents for Arriving {
    fn bytes(&self) -> Option<&[u8]> {
        if self.state.load(Ordering::Acquire) == ON_ITS_WAY {
            let state = match self.device.is_over(self.end) {
                Ok(false) => return None,
                Ok(true) => ARRIVED,
                Err(_) => FAILED,
            };
            self.state.store(state, Ordering::Release);
        }
        // SAFETY: the copy is over, and no other writes this place while it is held.
        (self.state.load(Ordering::Acquire) == ARRIVED).then(|| unsafe { self.place.bytes() })
    }
}
