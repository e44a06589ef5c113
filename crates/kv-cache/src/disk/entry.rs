//! The bytes that say what a slot holds, and the checksums over them.
//!
//! ```text
//! entry    0  magic      8  slot     12  words      16  turn       24  written at
//!         32  namespace             64  key                       96  checksum of contents and words
//!        128  zeros                224  checksum of the bytes before
//! ```
//!
//! Numbers are little-endian. Checksums are BLAKE3, keyed with the secret of the pool, so they also
//! say whose bytes these are. An entry never crosses a sector.

use crate::{host::HostKey, namespace::Namespace};

/// Size of an entry, in bytes.
pub(super) const ENTRY_BYTES: usize = 256;
/// Magic bytes of version 1 of the format.
const MAGIC: [u8; 8] = *b"blkvslt1";
const CHECKED: usize = ENTRY_BYTES - 32;
/// Words are hashed in pieces of this many, on the stack.
const PIECE: usize = 128;

/// What a slot holds, as its entry says.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub(crate) struct Entry {
    /// Number of the write; it grows with every write.
    pub(crate) turn: u64,
    /// Time of the write, in seconds since 1970.
    pub(crate) written_at: u64,
    pub(crate) ns: Namespace,
    pub(crate) key: HostKey,
    /// Number of words of the context up to the end of the page.
    pub(crate) words: u32,
    /// Checksum of contents and words.
    pub(crate) data: [u8; 32],
}

impl Entry {
    /// Encodes the entry for `slot`.
    pub(super) fn encode(&self, slot: u32, secret: &[u8; 32]) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&slot.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.words.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.turn.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.written_at.to_le_bytes());
        bytes[32..64].copy_from_slice(self.ns.as_bytes());
        bytes[64..96].copy_from_slice(&self.key.0);
        bytes[96..128].copy_from_slice(&self.data);
        let checksum = blake3::keyed_hash(secret, &bytes[..CHECKED]);
        bytes[CHECKED..].copy_from_slice(checksum.as_bytes());
        bytes
    }

    /// Decodes the entry of `slot`. `None` if the bytes are not an entry written for this slot.
    pub(super) fn decode(bytes: &[u8; ENTRY_BYTES], slot: u32, secret: &[u8; 32]) -> Option<Self> {
        // An empty slot is the common case and needs no checksum.
        if bytes[..8] != MAGIC || u32_at(bytes, 8) != slot {
            return None;
        }
        // `Hash` compares in constant time.
        if blake3::keyed_hash(secret, &bytes[..CHECKED]) != array_at(bytes, CHECKED) {
            return None;
        }
        Some(Self {
            turn: u64_at(bytes, 16),
            written_at: u64_at(bytes, 24),
            ns: Namespace::from_bytes(array_at(bytes, 32)),
            key: HostKey(array_at(bytes, 64)),
            words: u32_at(bytes, 12),
            data: array_at(bytes, 96),
        })
    }
}

/// Computes the checksum of contents and words.
pub(super) fn checksum(secret: &[u8; 32], contents: &[u8], words: &[u32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(secret);
    hasher.update(contents);
    for words in words.chunks(PIECE) {
        let mut piece = [0; PIECE * 4];
        let bytes = words_to_bytes(words, &mut piece);
        hasher.update(bytes);
    }
    *hasher.finalize().as_bytes()
}

/// Writes words to the beginning of `to` and returns that part.
pub(super) fn words_to_bytes<'a>(words: &[u32], to: &'a mut [u8]) -> &'a [u8] {
    for (bytes, word) in to.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
    &to[..words.len() * 4]
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

pub(super) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}
