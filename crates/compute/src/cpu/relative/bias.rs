//! The relative bias of T5's self-attention: a number for each head and distance, added to the logit
//! (Raffel et al. 2020, section 2.1).
//!
//! Distances share buckets: half of them are single positions, the others grow with the logarithm up to
//! the greatest distance. The arithmetic is that of transformers
//! (`T5Attention._relative_position_bucket`), with the logarithm in single precision, because its
//! rounding decides at the edges of buckets.
//!
//! Invariant: beyond [`Bias::reach`] all distances of a direction have the same bias.

/// How distances fall into buckets, and for how many heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buckets {
    /// Heads of the attention.
    pub heads: usize,
    /// Buckets of relative positions, at least 4.
    pub count: usize,
    /// Distance from which on all positions share a bucket.
    pub max_distance: usize,
    /// Most positions of a sequence: greater distances do not occur.
    pub positions: usize,
}

impl Buckets {
    /// Distances that are tabulated: the others are as the last of these, or do not occur.
    fn reach(self) -> usize {
        self.max_distance.min(self.positions)
    }

    /// Bytes of the table of one direction.
    pub fn table_bytes(self) -> usize {
        4 * self.heads * (2 * self.reach() + 1)
    }
}

/// Who sees whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// All rows each other: the encoder. Half of the buckets are those of later keys.
    Both,
    /// Each row the rows before it: the decoder.
    Causal,
}

/// The bucket of a key that lies `offset` positions behind its query (before it, if negative), of
/// `buckets` up to `max_distance`. Later keys of a causal stack, which no query sees, are in bucket 0.
pub fn bucket(offset: i64, direction: Direction, buckets: usize, max_distance: usize) -> usize {
    let (first, buckets, distance) = match direction {
        Direction::Both => {
            let half = buckets / 2;
            (if offset > 0 { half } else { 0 }, half, offset.unsigned_abs())
        }
        Direction::Causal => (0, buckets, (-offset).max(0).unsigned_abs()),
    };
    let exact = buckets / 2;
    if distance < exact as u64 {
        return first + distance as usize;
    }
    let widest = (max_distance as f64 / exact as f64).ln() as f32;
    let part = ln(distance as f32 / exact as f32) / widest * (buckets - exact) as f32;
    first + (exact + part as usize).min(buckets - 1)
}

/// The logarithm, rounded once: the same bits on every machine.
fn ln(x: f32) -> f32 {
    f64::from(x).ln() as f32
}

/// Biases of all heads by distance.
#[derive(Debug)]
pub struct Bias {
    /// `[head][offset]`, offsets from `-reach` to `reach`.
    table: Vec<f32>,
    reach: usize,
}

impl Bias {
    /// From the weights `[buckets, heads]` of the first block.
    pub fn new(of: Buckets, direction: Direction, weights: &[f32]) -> Self {
        let reach = of.reach();
        let offsets = -(reach as i64)..=reach as i64;
        let buckets: Vec<usize> =
            offsets.map(|offset| bucket(offset, direction, of.count, of.max_distance)).collect();
        let heads = of.heads;
        let of_head = |head| buckets.iter().map(move |bucket| weights[bucket * heads + head]);
        Self { table: (0..heads).flat_map(of_head).collect(), reach }
    }

    fn of_head(&self, head: usize) -> &[f32] {
        let width = 2 * self.reach + 1;
        &self.table[head * width..][..width]
    }

    /// Biases of consecutive keys, the first of which lies `first` positions behind the query.
    pub(super) fn fill(&self, head: usize, first: i64, out: &mut [f32]) {
        let (table, reach) = (self.of_head(head), self.reach as i64);
        let len = out.len() as i64;
        // Keys before the table, in it, and behind it.
        let before = (-reach - first).clamp(0, len);
        let within = (reach + 1 - first).clamp(before, len);
        let (left, rest) = out.split_at_mut(before as usize);
        let (middle, right) = rest.split_at_mut((within - before) as usize);
        left.fill(table[0]);
        if !middle.is_empty() {
            let start = (first + before + reach) as usize;
            middle.copy_from_slice(&table[start..][..middle.len()]);
        }
        right.fill(table[table.len() - 1]);
    }

    /// The bias of a key that is `distance` positions before the query.
    #[inline(always)]
    pub(super) fn before(&self, head: usize, distance: usize) -> f32 {
        self.of_head(head)[self.reach - distance.min(self.reach)]
    }

    /// Bytes of the table.
    pub fn bytes(&self) -> usize {
        4 * self.table.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_biases_is_that_of_its_buckets_near_and_far() {
        let of = Buckets { heads: 3, count: 32, max_distance: 128, positions: 1 << 14 };
        let weights: Vec<f32> = (0..of.count * of.heads).map(|i| i as f32).collect();
        for direction in [Direction::Both, Direction::Causal] {
            let bias = Bias::new(of, direction, &weights);
            assert_eq!(bias.bytes(), of.table_bytes());
            for first in [-400, -130, -128, -127, -3, 0, 5, 127, 128, 300] {
                for len in [1, 7, 300, 700] {
                    let mut row = vec![f32::NAN; len];
                    bias.fill(1, first, &mut row);
                    for (key, found) in row.iter().enumerate() {
                        let offset = first + key as i64;
                        let bucket = bucket(offset, direction, of.count, of.max_distance);
                        assert_eq!(*found, weights[bucket * of.heads + 1], "{direction:?} {offset}");
                        if offset <= 0 {
                            assert_eq!(bias.before(1, offset.unsigned_abs() as usize), *found);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn buckets_beyond_the_greatest_distance_are_the_last() {
        for (buckets, distance) in [(32, 128), (16, 48), (4, 3), (5, 1000), (64, 33)] {
            for far in [distance, distance + 1, 2 * distance, 100_000] {
                let last = |direction| bucket(-(far as i64), direction, buckets, distance);
                assert_eq!(last(Direction::Causal), buckets - 1);
                assert_eq!(last(Direction::Both), buckets / 2 - 1);
                assert_eq!(bucket(far as i64, Direction::Both, buckets, distance), buckets / 2 * 2 - 1);
            }
        }
    }
}
