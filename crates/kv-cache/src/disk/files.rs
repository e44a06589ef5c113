//! Slots in two files: `index` has a header and an entry per slot, `pages` the contents and words of each.
//!
//! ```text
//! index   header, 4096 bytes │ entry 0 │ entry 1 │ ..             read once at the start
//! pages   slot 0: contents, words, padding to 4096 │ slot 1 │ ..
//! ```
//!
//! A slot is written contents first, entry last. A crash may leave an old entry over new contents,
//! or a part of either. Both fail a checksum and count as an empty slot. Nothing here looks at what
//! else is in the files.
//!
//! Invariant: what [`SlotFiles::read`] returns was written by [`SlotFiles::write`] for the same
//! namespace, key and words.

use std::io;

use super::{
    entry::{ENTRY_BYTES, Entry, array_at, checksum, u32_at, u64_at, words_to_bytes},
    storage::Storage,
};
use crate::host::{HostKey, HostPage};

/// Size of the header of the index file, in bytes.
const HEADER_BYTES: usize = 4096;
/// Slots begin at multiples of this many bytes, as the blocks of file systems do.
const ALIGN: u64 = 4096;
const MAGIC: [u8; 16] = *b"beamline kv disk";
/// Version of the format of both files.
const VERSION: u32 = 1;
/// The checksum at the end of the header covers this many bytes.
const CHECKED: usize = 96;
/// The index file is read in pieces of this many bytes.
const SCAN_BYTES: usize = 1 << 16;

/// The sizes that determine how large a slot is.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct SlotLayout {
    /// Bytes of the contents of a page.
    pub page_bytes: usize,
    /// The largest number of words a context may have.
    pub most_words: usize,
}

impl SlotLayout {
    /// Bytes of one slot in the pages file.
    pub fn slot_bytes(&self) -> u64 {
        let data = (self.page_bytes as u64).saturating_add((self.most_words as u64).saturating_mul(4));
        data.max(1).checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX)
    }

    /// How many slots fit into `bytes` of disk, their entries included.
    pub fn slots_in(&self, bytes: u64) -> u32 {
        let slots =
            bytes.saturating_sub(HEADER_BYTES as u64) / self.slot_bytes().saturating_add(ENTRY_BYTES as u64);
        // A list needs one more slot than it has entries.
        u32::try_from(slots).unwrap_or(u32::MAX).min(u32::MAX - 2)
    }
}

/// What the files held when they were opened.
#[derive(Clone, Eq, PartialEq, Debug)]
pub enum Opened {
    /// The files were empty.
    Fresh,
    /// The files held slots of this pool.
    Kept,
    /// The files held something unusable, which was discarded; says why.
    Replaced(&'static str),
}

/// Why a slot yields no page.
#[derive(Debug)]
pub enum ReadError {
    /// The slot does not hold what was written there, or was never written.
    Damaged,
    /// The slot holds another page with the same key.
    Another,
    /// The operating system reported an error.
    Io(io::Error),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // The file was truncated.
            io::ErrorKind::UnexpectedEof => Self::Damaged,
            _ => Self::Io(error),
        }
    }
}

/// The slots of one pool. They can be read and written at the same time.
#[derive(Debug)]
pub struct SlotFiles<S> {
    index: S,
    pages: S,
    layout: SlotLayout,
    secret: [u8; 32],
}

impl<S: Storage> SlotFiles<S> {
    /// Opens the files of a pool. `identity` covers everything that page contents depend on besides
    /// namespaces and words. Files with another identity or other sizes are emptied. `secret` is
    /// the directory's key for checksums.
    ///
    /// # Errors
    ///
    /// When the operating system reports an error.
    pub fn open(
        index: S,
        pages: S,
        layout: SlotLayout,
        secret: &[u8; 32],
        identity: &[u8],
    ) -> io::Result<(Self, Opened)> {
        let mut hasher = blake3::Hasher::new_keyed(secret);
        hasher.update(b"pool").update(identity);
        let files = Self { index, pages, layout, secret: *hasher.finalize().as_bytes() };
        let expected = files.header();
        let mut found = [0; HEADER_BYTES];
        let opened = match files.index.read_at(0, &mut found) {
            Ok(()) if found == expected => return Ok((files, Opened::Kept)),
            Ok(()) => Opened::Replaced(difference(&found, &expected)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => match files.index.is_empty()? {
                true => Opened::Fresh,
                false => Opened::Replaced("the index was cut"),
            },
            Err(error) => return Err(error),
        };
        files.index.set_len(0)?;
        files.pages.set_len(0)?;
        files.index.write_at(0, &expected)?;
        Ok((files, opened))
    }

    /// The sizes of the slots.
    pub fn layout(&self) -> SlotLayout {
        self.layout
    }

    /// Cuts off everything beyond the first `slots` slots.
    ///
    /// # Errors
    ///
    /// When the operating system reports an error.
    pub fn keep_first(&self, slots: u32) -> io::Result<()> {
        for (file, len) in [(&self.index, self.entry_at(slots)), (&self.pages, self.slot_at(slots))] {
            if file.len()? > len {
                file.set_len(len)?;
            }
        }
        Ok(())
    }

    /// Lists the entries of the first `slots` slots, as far as they are intact.
    ///
    /// # Errors
    ///
    /// When the operating system reports an error.
    pub(crate) fn entries(&self, slots: u32) -> io::Result<Vec<(u32, Entry)>> {
        let end = self.index.len()?.min(self.entry_at(slots));
        let mut entries = Vec::new();
        let (mut at, mut slot) = (HEADER_BYTES as u64, 0);
        let mut piece = vec![0; SCAN_BYTES];
        while at + ENTRY_BYTES as u64 <= end {
            let whole = (end - at) as usize / ENTRY_BYTES * ENTRY_BYTES;
            let piece = &mut piece[..whole.min(SCAN_BYTES)];
            self.index.read_at(at, piece)?;
            for bytes in piece.as_chunks::<ENTRY_BYTES>().0 {
                entries.extend(Entry::decode(bytes, slot, &self.secret).map(|entry| (slot, entry)));
                slot += 1;
            }
            at += piece.len() as u64;
        }
        Ok(entries)
    }

    /// Writes a page whose contents have arrived, over what the slot held.
    ///
    /// # Errors
    ///
    /// When the operating system reports an error, or the page does not belong to this pool.
    pub fn write(&self, slot: u32, turn: u64, at: u64, key: HostKey, page: &HostPage) -> io::Result<()> {
        let SlotLayout { page_bytes, most_words } = self.layout;
        let (words, contents) = (page.words(), page.contents().unwrap_or_default());
        if contents.len() != page_bytes || words.len() > most_words {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let Ok(count) = u32::try_from(words.len()) else { return Err(io::ErrorKind::InvalidInput.into()) };
        let data = checksum(&self.secret, contents, words);
        let entry = Entry { turn, written_at: at, ns: *page.namespace(), key, words: count, data };
        let start = self.slot_at(slot);
        self.pages.write_at(start, contents)?;
        let mut bytes = vec![0; words.len() * 4];
        words_to_bytes(words, &mut bytes);
        self.pages.write_at(start + page_bytes as u64, &bytes)?;
        self.index.write_at(self.entry_at(slot), &entry.encode(slot, &self.secret))
    }

    /// Reads the contents of `page` from a slot that was written with it.
    ///
    /// # Errors
    ///
    /// When the slot holds anything else, or the operating system reports an error.
    pub fn read(&self, slot: u32, key: HostKey, page: &HostPage) -> Result<Box<[u8]>, ReadError> {
        let mut bytes = [0; ENTRY_BYTES];
        self.index.read_at(self.entry_at(slot), &mut bytes)?;
        let entry = Entry::decode(&bytes, slot, &self.secret).ok_or(ReadError::Damaged)?;
        if entry.key != key {
            return Err(ReadError::Damaged);
        }
        if entry.ns != *page.namespace() || entry.words as usize != page.words().len() {
            return Err(ReadError::Another);
        }
        let start = self.slot_at(slot);
        let mut contents = vec![0; self.layout.page_bytes].into_boxed_slice();
        self.pages.read_at(start, &mut contents)?;
        let mut words = vec![0; page.words().len() * 4];
        self.pages.read_at(start + contents.len() as u64, &mut words)?;
        let words: Vec<u32> = words.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        if checksum(&self.secret, &contents, &words) != entry.data {
            return Err(ReadError::Damaged);
        }
        if words != page.words() {
            return Err(ReadError::Another);
        }
        Ok(contents)
    }

    /// Overwrites a slot with zeros. The entry goes first, so that the slot can no longer be found.
    ///
    /// # Errors
    ///
    /// When the operating system reports an error.
    pub fn erase(&self, slot: u32) -> io::Result<()> {
        let entry = self.entry_at(slot);
        if entry < self.index.len()? {
            self.index.write_at(entry, &[0; ENTRY_BYTES])?;
        }
        let (mut at, end) = (self.slot_at(slot), self.slot_at(slot + 1).min(self.pages.len()?));
        let zeros = [0; ALIGN as usize];
        while at < end {
            let count = (end - at).min(ALIGN);
            self.pages.write_at(at, &zeros[..count as usize])?;
            at += count;
        }
        Ok(())
    }

    /// Makes every slot unfindable.
    ///
    /// # Errors
    ///
    /// When the operating system reports an error.
    pub fn discard(&self) -> io::Result<()> {
        self.index.set_len(HEADER_BYTES as u64)?;
        self.pages.set_len(0)
    }

    fn header(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..16].copy_from_slice(&MAGIC);
        bytes[16..20].copy_from_slice(&VERSION.to_le_bytes());
        bytes[24..32].copy_from_slice(&(self.layout.page_bytes as u64).to_le_bytes());
        bytes[32..40].copy_from_slice(&(self.layout.most_words as u64).to_le_bytes());
        let checksum = blake3::keyed_hash(&self.secret, &bytes[..CHECKED]);
        bytes[CHECKED..CHECKED + 32].copy_from_slice(checksum.as_bytes());
        bytes
    }

    fn entry_at(&self, slot: u32) -> u64 {
        HEADER_BYTES as u64 + u64::from(slot) * ENTRY_BYTES as u64
    }

    fn slot_at(&self, slot: u32) -> u64 {
        u64::from(slot) * self.layout.slot_bytes()
    }
}

/// Why a header is not the expected one.
fn difference(found: &[u8], expected: &[u8]) -> &'static str {
    if array_at::<16>(found, 0) != MAGIC {
        "the index is not one of beamline's"
    } else if u32_at(found, 16) != VERSION {
        "it is of another version of the format"
    } else if [24, 32].iter().any(|&at| u64_at(found, at) != u64_at(expected, at)) {
        "pages or contexts have another size now"
    } else {
        "it belongs to another model, key or build, or is damaged"
    }
}
