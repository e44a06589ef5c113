//! A bit vector that counts its set bits in any interval in constant time.
//!
//! Before every block of 512 bits the directory holds the number of set bits so far, which costs 6
//! % on top of the bits. A count looks at two directory entries and at most two blocks.

use std::ops::Range;

use crate::narrow;

const WORD_BITS: u32 = u64::BITS;
/// Words per block: 64 bytes, one cache line.
const BLOCK_WORDS: usize = 8;

/// An immutable bit vector with a rank directory.
#[derive(Clone, Debug)]
pub(crate) struct RankBits {
    /// The bits, 64 per word; bits past `len` are zero.
    words: Vec<u64>,
    /// Number of set bits before each block, then the number of all set bits.
    ranks: Vec<u32>,
    len: u32,
}

impl RankBits {
    fn from_words(words: Vec<u64>, len: u32) -> Self {
        let mut ranks = Vec::with_capacity(words.len().div_ceil(BLOCK_WORDS) + 1);
        let mut rank = 0;
        ranks.push(rank);
        for block in words.chunks(BLOCK_WORDS) {
            rank += ones(block);
            ranks.push(rank);
        }
        Self { words, ranks, len }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// The bits in words of 64; bits past the last position are zero.
    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Number of set bits before each block of 512 bits, then the number of all set bits.
    pub(crate) fn ranks(&self) -> &[u32] {
        &self.ranks
    }

    /// Number of set bits.
    pub(crate) fn ones(&self) -> u32 {
        self.ranks.last().copied().unwrap_or(0)
    }

    #[inline]
    pub(crate) fn contains(&self, i: u32) -> bool {
        self.words[(i / WORD_BITS) as usize] >> (i % WORD_BITS) & 1 == 1
    }

    /// Number of set bits before `i`, which is at most `len`.
    #[inline]
    fn rank(&self, i: u32) -> u32 {
        let word = (i / WORD_BITS) as usize;
        let block = word / BLOCK_WORDS;
        let mut rank = self.ranks[block] + ones(&self.words[block * BLOCK_WORDS..word]);
        if !i.is_multiple_of(WORD_BITS) {
            rank += (self.words[word] & below(i)).count_ones();
        }
        rank
    }

    /// Number of set bits in `range`, which ends at `len` or before.
    #[inline]
    pub(crate) fn count(&self, range: Range<u32>) -> u32 {
        self.rank(range.end) - self.rank(range.start)
    }

    /// Whether `range`, which is not empty and ends at `len` or before, holds a set bit.
    #[inline]
    pub(crate) fn any(&self, range: Range<u32>) -> bool {
        let (first, last) = ((range.start / WORD_BITS) as usize, ((range.end - 1) / WORD_BITS) as usize);
        let head = self.words[first] & !below(range.start);
        if first == last {
            // Most nodes of a deep level own a few leaves: one word answers.
            let after_end = if range.end.is_multiple_of(WORD_BITS) { 0 } else { !below(range.end) };
            return head & !after_end != 0;
        }
        head != 0 || self.count(range) > 0
    }

    /// A copy without the bits `removed`.
    pub(crate) fn without(&self, removed: &[u32]) -> Self {
        let mut bits = BitsBuilder { words: self.words.clone(), len: self.len };
        removed.iter().for_each(|&i| bits.clear(i));
        bits.finish()
    }

    /// The set bits, ascending.
    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        (0..self.len).filter(|&i| self.contains(i))
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.words.capacity() * size_of::<u64>() + self.ranks.capacity() * size_of::<u32>()
    }
}

/// A bit vector under construction.
#[derive(Debug)]
pub(crate) struct BitsBuilder {
    words: Vec<u64>,
    len: u32,
}

impl BitsBuilder {
    pub(crate) fn zeros(len: u32) -> Self {
        Self { words: vec![0; len.div_ceil(WORD_BITS) as usize], len }
    }

    pub(crate) fn ones(len: u32) -> Self {
        let mut bits = Self { words: vec![u64::MAX; len.div_ceil(WORD_BITS) as usize], len };
        if let Some(last) = bits.words.last_mut()
            && !len.is_multiple_of(WORD_BITS)
        {
            *last = below(len);
        }
        bits
    }

    #[inline]
    pub(crate) fn set(&mut self, i: u32) {
        debug_assert!(i < self.len);
        self.words[(i / WORD_BITS) as usize] |= 1 << (i % WORD_BITS);
    }

    #[inline]
    pub(crate) fn clear(&mut self, i: u32) {
        self.words[(i / WORD_BITS) as usize] &= !(1 << (i % WORD_BITS));
    }

    pub(crate) fn finish(self) -> RankBits {
        RankBits::from_words(self.words, self.len)
    }
}

/// The bits of a word that stand for positions before `i`.
#[inline]
fn below(i: u32) -> u64 {
    (1 << (i % WORD_BITS)) - 1
}

#[inline]
fn ones(words: &[u64]) -> u32 {
    // There are at most u32::MAX bits, because positions are u32.
    narrow(words.iter().map(|word| word.count_ones() as usize).sum())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_like_a_set(len in 1_u32..3000, seed in proptest::collection::vec(any::<u32>(), 0..80), dense: bool) {
            let chosen: BTreeSet<u32> = seed.iter().map(|n| n % len).collect();
            let bits = if dense {
                let removed: Vec<u32> = chosen.iter().copied().collect();
                BitsBuilder::ones(len).finish().without(&removed)
            } else {
                let mut bits = BitsBuilder::zeros(len);
                chosen.iter().for_each(|&i| bits.set(i));
                bits.finish()
            };
            let expected: BTreeSet<u32> = (0..len).filter(|i| chosen.contains(i) != dense).collect();
            prop_assert_eq!(bits.ones() as usize, expected.len());
            prop_assert!(bits.iter().eq(expected.iter().copied()));
            for pair in seed.windows(2) {
                let (start, end) = (pair[0] % len, pair[1] % (len + 1));
                if start < end {
                    let count = expected.range(start..end).count();
                    prop_assert_eq!(bits.count(start..end) as usize, count);
                    prop_assert_eq!(bits.any(start..end), count > 0);
                }
            }
        }
    }

    #[test]
    fn ends_of_words_and_blocks() {
        for len in [1, 63, 64, 65, 511, 512, 513, 1024] {
            let full = BitsBuilder::ones(len).finish();
            assert_eq!((full.ones(), full.count(0..len), full.count(len..len)), (len, len, 0));
            let only_last = full.without(&(0..len - 1).collect::<Vec<_>>());
            assert!(only_last.any(0..len) && only_last.any(len - 1..len));
            assert!(len == 1 || !only_last.any(0..len - 1));
        }
    }
}
