//! Seeded random numbers, so that two runs ask the same questions at the same times.

/// SplitMix64 (Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1].
    pub(super) fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Uniform below `limit`.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.next()) * limit as u128) >> 64) as usize
    }

    /// An index below `limit` with the skew of the prompts that the peers get: most often small.
    pub(super) fn skewed(&mut self, limit: usize) -> usize {
        let unit = 1.0 - self.unit();
        ((limit as f64 * unit * unit) as usize).min(limit.saturating_sub(1))
    }

    /// A gap of a Poisson process of `rate` events a second, in seconds.
    pub(super) fn gap(&mut self, rate: f64) -> f64 {
        -self.unit().ln() / rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_the_mean_of_the_rate() {
        let mut random = Random::new(1);
        let mean = (0..100_000).map(|_| random.gap(50.0)).sum::<f64>() / 100_000.0;
        assert!((mean - 0.02).abs() < 0.0005, "{mean}");
    }

    #[test]
    fn skewed_indices_stay_inside() {
        let mut random = Random::new(2);
        let all: Vec<usize> = (0..10_000).map(|_| random.skewed(7)).collect();
        assert!(all.iter().all(|&index| index < 7));
        assert!(all.iter().filter(|&&index| index == 0).count() > 2000);
    }
}
