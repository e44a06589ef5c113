//! All randomness of a run comes from one seed.

/// The SplitMix64 random number generator.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed, 0x5eed))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0, 0)
    }

    /// A uniform number in `low..=high`.
    pub(crate) fn within(&mut self, low: usize, high: usize) -> usize {
        assert!(low <= high);
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    /// True in `rate` of a thousand cases.
    pub(crate) fn permille(&mut self, rate: u32) -> bool {
        self.next() % 1000 < u64::from(rate)
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.within(0, from.len() - 1)]
    }
}

/// One well-mixed number from two.
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.wrapping_mul(0xd6e8_feb8_6659_fd93).rotate_left(32);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
