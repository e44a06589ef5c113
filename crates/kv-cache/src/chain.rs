//! The chain hash: one link per page, over the page's words and everything before them.
//!
//! ```text
//!   root   = BLAKE3(key = hash_key, namespace)
//!   link 0 = BLAKE3(key = root,     words of page 0)
//!   link i = BLAKE3(key = link i-1, words of page i)
//! ```
//!
//! The previous link is the *key* of the next. So 256 bits are kept, only a holder of `hash_key`
//! can tell where a context is filed, and a page of 32 token ids costs two compressions; hashing
//! the previous link as data would take three. Every page of a cache has the same number of words,
//! so no encoding is ambiguous.
//!
//! A link only says where to look. It is never taken as proof of identity: see [`lookup`](crate::lookup).

use crate::namespace::Namespace;

/// Pages of up to this many bytes are hashed in one piece, on the stack.
const PIECE: usize = 512;

/// Digest of a namespace and of all words up to the end of a page.
#[derive(Copy, Clone, Eq, PartialEq)]
pub(crate) struct Link([u8; 32]);

impl Link {
    /// All 32 bytes of the link.
    pub(crate) fn bytes(&self) -> [u8; 32] {
        self.0
    }

    /// The value by which the link is filed. Links are pseudo-random, so any eight bytes do.
    pub(crate) fn bucket_hash(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}

/// How links are computed.
pub(crate) enum ChainHash {
    /// The keyed hash described above, with the cache's secret.
    Keyed([u8; 32]),
    /// The same hash cut to `values` different values, so that everything collides. Tests use it to
    /// show that identity never rests on the hash.
    #[cfg(test)]
    Colliding { hash_key: [u8; 32], values: u8 },
}

impl ChainHash {
    /// The link before page 0.
    pub(crate) fn root(&self, ns: &Namespace) -> Link {
        match self {
            Self::Keyed(key) => Link(*blake3::keyed_hash(key, ns.as_bytes()).as_bytes()),
            #[cfg(test)]
            Self::Colliding { hash_key, values } => cut(Self::Keyed(*hash_key).root(ns), *values),
        }
    }

    /// The link of the page that holds `words` and follows the page of link `previous`.
    pub(crate) fn next(&self, previous: &Link, words: &[u32]) -> Link {
        match self {
            Self::Keyed(_) => Link(digest(&previous.0, words)),
            #[cfg(test)]
            Self::Colliding { values, .. } => cut(Link(digest(&previous.0, words)), *values),
        }
    }

    /// The bucket of a session. It is keyed, so that clients cannot choose user ids that share a
    /// bucket.
    pub(crate) fn bucket_of_session(&self, key: u128) -> u64 {
        match self {
            Self::Keyed(hash_key) => {
                Link(*blake3::keyed_hash(hash_key, &key.to_le_bytes()).as_bytes()).bucket_hash()
            }
            #[cfg(test)]
            Self::Colliding { .. } => 0,
        }
    }
}

fn digest(key: &[u8; 32], words: &[u32]) -> [u8; 32] {
    let mut piece = [0; PIECE];
    if words.len() * 4 <= PIECE {
        return *blake3::keyed_hash(key, to_bytes(words, &mut piece)).as_bytes();
    }
    let mut hasher = blake3::Hasher::new_keyed(key);
    for words in words.chunks(PIECE / 4) {
        hasher.update(to_bytes(words, &mut piece));
    }
    *hasher.finalize().as_bytes()
}

/// Little-endian bytes of `words`, at the beginning of `piece`.
fn to_bytes<'a>(words: &[u32], piece: &'a mut [u8; PIECE]) -> &'a [u8] {
    for (bytes, word) in piece.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
    &piece[..words.len() * 4]
}

#[cfg(test)]
fn cut(link: Link, values: u8) -> Link {
    let mut cut = [0; 32];
    cut[0] = link.0[0] % values;
    Link(cut)
}

#[cfg(test)]
mod tests {
    use super::{ChainHash, digest};
    use crate::namespace::Namespace;

    #[test]
    fn a_page_hashed_in_pieces_is_hashed_like_its_bytes() {
        for len in [0_u32, 1, 32, 127, 128, 129, 256, 1000] {
            let words: Vec<u32> = (0..len).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            assert_eq!(digest(&[7; 32], &words), *blake3::keyed_hash(&[7; 32], &bytes).as_bytes());
        }
    }

    #[test]
    fn every_input_moves_the_link() {
        let (hash, ns) = (ChainHash::Keyed([1; 32]), Namespace::new(b"model", b"tenant"));
        let link = |hash: &ChainHash, ns: &Namespace, first: &[u32], second: &[u32]| {
            hash.next(&hash.next(&hash.root(ns), first), second)
        };
        let original = link(&hash, &ns, &[1, 2], &[3, 4]);
        assert!(original == link(&hash, &ns, &[1, 2], &[3, 4]));
        let others = [
            link(&ChainHash::Keyed([2; 32]), &ns, &[1, 2], &[3, 4]),
            link(&hash, &Namespace::new(b"model", b"other"), &[1, 2], &[3, 4]),
            link(&hash, &ns, &[0, 2], &[3, 4]),
            link(&hash, &ns, &[1, 2], &[3, 5]),
            link(&hash, &ns, &[3, 4], &[1, 2]),
        ];
        assert!(others.iter().all(|other| *other != original));
    }
}
