//! Tests of the disk tier: slot files damaged at every byte, random slot operations, the tier by
//! example.

mod files;
mod slots;
mod threads;
mod tier;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{Opened, SlotFiles, SlotLayout, Storage};
use crate::{
    Namespace,
    host::{HostKey, HostPage},
};

pub(super) const LAYOUT: SlotLayout = SlotLayout { page_bytes: 24, most_words: 6 };
pub(super) const SECRET: [u8; 32] = [9; 32];
pub(super) const NOW: u64 = 1_000_000;

/// A file in memory that can be made to refuse everything.
#[derive(Clone, Default)]
pub(super) struct Memory {
    pub(super) bytes: Arc<Mutex<Vec<u8>>>,
    pub(super) broken: Arc<AtomicBool>,
}

impl Memory {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self { bytes: Arc::new(Mutex::new(bytes.to_vec())), ..Self::default() }
    }

    pub(super) fn copy(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    fn check(&self) -> io::Result<()> {
        if self.broken.load(Ordering::Relaxed) { Err(io::Error::other("no disk")) } else { Ok(()) }
    }
}

impl Storage for Memory {
    fn len(&self) -> io::Result<u64> {
        self.check()?;
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        self.check()?;
        let bytes = self.bytes.lock().unwrap();
        let from = bytes.get(at as usize..at as usize + to.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        to.copy_from_slice(from);
        Ok(())
    }

    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.check()?;
        let mut bytes = self.bytes.lock().unwrap();
        let (at, end) = (at as usize, at as usize + from.len());
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[at..end].copy_from_slice(from);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check()?;
        self.bytes.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }
}

/// The two files of a pool, which outlive the tier that opens them.
#[derive(Clone, Default)]
pub(super) struct Disk {
    pub(super) index: Memory,
    pub(super) pages: Memory,
}

impl Disk {
    pub(super) fn open(&self, identity: &[u8]) -> (SlotFiles<Memory>, Opened) {
        SlotFiles::open(self.index.clone(), self.pages.clone(), LAYOUT, &SECRET, identity).unwrap()
    }

    pub(super) fn files(&self) -> SlotFiles<Memory> {
        self.open(b"model").0
    }

    pub(super) fn break_down(&self) {
        self.index.broken.store(true, Ordering::Relaxed);
        self.pages.broken.store(true, Ordering::Relaxed);
    }
}

pub(super) fn ns(name: &str) -> Namespace {
    Namespace::new(b"model", name.as_bytes())
}

pub(super) fn key(number: u32) -> HostKey {
    let mut key = [0; 32];
    key[..4].copy_from_slice(&number.to_le_bytes());
    HostKey(key)
}

pub(super) fn words(number: u32) -> Vec<u32> {
    (0..4 + number % 3).map(|word| number * 100 + word).collect()
}

/// The contents of page `number`.
pub(super) fn contents(number: u32) -> Box<[u8]> {
    (0..24).map(|byte| (number * 31 + byte) as u8).collect()
}

pub(super) fn empty(ns: Namespace, number: u32) -> Arc<HostPage> {
    HostPage::new(ns, words(number).into(), LAYOUT.page_bytes)
}

pub(super) fn page(ns: Namespace, number: u32) -> Arc<HostPage> {
    let page = empty(ns, number);
    page.keep(Box::new(contents(number)));
    page
}

pub(super) fn with_pages(pages: u32) -> Disk {
    let (disk, ns) = (Disk::default(), ns("a"));
    let files = disk.files();
    for number in 0..pages {
        files.write(number, number.into(), NOW, key(number), &page(ns, number)).unwrap();
    }
    disk
}
