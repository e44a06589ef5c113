//! Buckets of time differences: the logarithmic ones of the HSTU research family, and the square-root
//! ones of the production family.
//!
//! The logarithmic bucket is `clamp(trunc(ln(max(|d|, 1)) / 0.301), 0, 128)` in single precision. Two
//! implementations of the single-precision logarithm disagree by one bucket at isolated differences, so
//! the reference's own steps are written down here as a table of thresholds: the bucket is the number of
//! thresholds that are not above `|d|`.
//!
//! The fast form reads the exponent and the two highest mantissa bits of `|d|` as a float. They name a
//! *cell*, a quarter of an octave: its ends are at most a factor of 1.25 apart, thresholds are a factor
//! of 1.35 apart, so a cell holds at most one threshold above its lower end. One comparison decides. (A
//! threshold is the smallest integer of its bucket, so comparing after rounding to single precision
//! decides the same.)
//!
//! What must not be here: weights of a bias, times of a request.

/// Buckets, the highest included: 0 to 128.
pub const TIME_BUCKETS: usize = 129;

/// The divisor in the bucket function that [`THRESHOLDS`] belong to.
pub const TIME_DIVISOR: f64 = 0.301;

/// `THRESHOLDS[b - 1]` is the smallest difference in bucket `b` or above. The first 79 are those of the
/// reference (PyTorch on the CPU); the others, beyond any difference in seconds, are from a correctly
/// rounded logarithm.
pub const THRESHOLDS: [i64; TIME_BUCKETS - 1] = [
    2,
    2,
    3,
    4,
    5,
    7,
    9,
    12,
    16,
    21,
    28,
    38,
    51,
    68,
    92,
    124,
    167,
    226,
    305,
    412,
    557,
    752,
    1_016,
    1_372,
    1_854,
    2_505,
    3_385,
    4_574,
    6_180,
    8_350,
    11_283,
    15_245,
    20_600,
    27_834,
    37_610,
    50_818,
    68_666,
    92_782,
    125_367,
    169_397,
    228_891,
    309_280,
    417_901,
    564_672,
    762_990,
    1_030_959,
    1_393_042,
    1_882_290,
    2_543_367,
    3_436_623,
    4_643_595,
    6_274_467,
    8_478_123,
    11_455_710,
    15_479_070,
    20_915_478,
    28_261_151,
    38_186_755,
    51_598_331,
    69_720_053,
    94_206_437,
    127_292_700,
    171_999_177,
    232_406_601,
    314_030_161,
    424_319_920,
    573_345_376,
    774_710_112,
    1_046_794_145,
    1_414_438_848,
    1_911_204_161,
    2_582_433_664,
    3_489_410_432,
    4_714_926_848,
    6_370_844_929,
    8_608_349_696,
    11_631_690_241,
    15_716_857_344,
    21_236_737_025,
    28_695_292_928,
    38_773_372_928,
    52_390_873_089,
    70_791_081_984,
    95_653_629_953,
    129_247_899_648,
    174_641_078_272,
    235_976_794_113,
    318_853_627_905,
    430_838_267_905,
    582_153_043_969,
    786_609_569_792,
    1_062_874_873_856,
    1_436_167_241_729,
    1_940_563_755_009,
    2_622_104_403_969,
    3_543_014_178_817,
    4_787_356_827_649,
    6_468_712_792_065,
    8_740_590_059_521,
    11_810_374_156_289,
    15_958_267_133_952,
    21_562_972_438_529,
    29_136_107_077_633,
    39_368_926_429_184,
    53_195_697_029_121,
    71_878_563_594_241,
    97_122_946_908_160,
    131_233_266_794_497,
    177_324_058_214_400,
    239_601_604_100_097,
    323_751_497_433_089,
    437_457_166_270_464,
    591_095_444_537_345,
    798_692_621_680_640,
    1_079_203_646_668_800,
    1_458_228_034_535_424,
    1_970_368_793_280_512,
    2_662_387_547_111_425,
    3_597_438_166_237_184,
    4_860_885_340_258_305,
    6_568_090_280_132_608,
    8_874_853_327_175_681,
    11_991_769_344_376_832,
    16_203_431_454_703_616,
    21_894_198_160_523_265,
    29_583_720_776_204_288,
    39_973_748_102_660_096,
    54_012_827_962_179_584,
];

/// Bucket of a difference, by definition.
pub fn bucket(difference: i64) -> usize {
    let magnitude = difference.unsigned_abs();
    THRESHOLDS.partition_point(|&threshold| threshold.unsigned_abs() <= magnitude)
}

/// Cells: 64 exponents, four for each.
const CELLS: usize = 256;
/// The cell of 1.0, before it is subtracted.
const FIRST: u32 = 127 << 2;

/// Weights by time difference: a weight per bucket, laid out for the fast form.
#[derive(Clone, Debug)]
pub struct TimeWeights {
    /// The threshold within each cell; infinite where there is none.
    thresholds: [f32; CELLS],
    /// Weight under the threshold of each cell, and from it on.
    weights: [f32; 2 * CELLS],
    /// The bucket under the threshold of each cell; from there on it is the next.
    buckets: [u8; CELLS],
}

impl TimeWeights {
    /// From the weights of the buckets from 0 on. Buckets beyond the weights take the last: a smaller
    /// table is a lower clamp.
    pub fn new(weights: &[f32]) -> Self {
        let weight = |bucket: usize| weights[bucket.min(weights.len() - 1)];
        let mut all =
            Self { thresholds: [f32::INFINITY; CELLS], weights: [0.0; 2 * CELLS], buckets: [0; CELLS] };
        for cell in 0..CELLS {
            let start = f32::from_bits((cell as u32 + FIRST) << 21);
            let base = THRESHOLDS.partition_point(|&threshold| threshold as f32 <= start);
            let next = THRESHOLDS.get(base).map_or(f32::INFINITY, |&threshold| threshold as f32);
            all.weights[2 * cell] = weight(base);
            all.weights[2 * cell + 1] = weight(base + 1);
            all.buckets[cell] = base as u8;
            // A threshold beyond the cell is never reached in it.
            all.thresholds[cell] = next;
        }
        all
    }

    /// The bytes that kernels elsewhere read: thresholds, weights, buckets, one behind the other
    /// (`TimeTable` in `kernels/`).
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = bytemuck::cast_slice(&self.thresholds).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(&self.weights));
        bytes.extend_from_slice(&self.buckets);
        bytes
    }

    /// The weight of a difference.
    #[inline(always)]
    pub fn of(&self, difference: i64) -> f32 {
        self.of_magnitude(difference.unsigned_abs() as f32)
    }

    /// The weight of a magnitude, rounded to single precision from an integer.
    #[inline(always)]
    pub(crate) fn of_magnitude(&self, magnitude: f32) -> f32 {
        self.weights[self.place(magnitude) as usize]
    }

    /// The weight that two magnitudes and all between them share, if they are in one bucket.
    #[inline(always)]
    pub(crate) fn shared(&self, one: f32, other: f32) -> Option<f32> {
        let (one, other) = (self.place(one), self.place(other));
        let bucket = |place: u32| self.buckets[place as usize / 2] + (place & 1) as u8;
        (bucket(one) == bucket(other)).then(|| self.weights[one as usize])
    }

    /// Where the weight of a magnitude is. In 32 bits throughout, so that many are looked up at once.
    #[inline(always)]
    fn place(&self, magnitude: f32) -> u32 {
        let magnitude = if magnitude > 1.0 { magnitude } else { 1.0 };
        let cell = (magnitude.to_bits() >> 21).wrapping_sub(FIRST) & (CELLS as u32 - 1);
        2 * cell + u32::from(magnitude >= self.thresholds[cell as usize])
    }
}

/// Bucket of the production family: `trunc(sqrt(max(d, 1e-6) / 60))`, at most `highest`. In single precision
/// throughout, as trained.
pub fn square_root_bucket(difference: i64, divisor: f32, highest: usize) -> usize {
    let seconds = (difference as f32).max(1e-6);
    ((seconds / divisor).sqrt() as usize).min(highest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fast(difference: i64) -> usize {
        let weights: Vec<f32> = (0..TIME_BUCKETS).map(|bucket| bucket as f32).collect();
        TimeWeights::new(&weights).of(difference) as usize
    }

    #[test]
    fn thresholds_ascend_and_are_the_first_of_their_float() {
        assert!(THRESHOLDS.is_sorted());
        for threshold in THRESHOLDS {
            assert!(
                ((threshold - 1) as f32) < threshold as f32,
                "{threshold} is the smallest integer of its float"
            );
        }
    }

    #[test]
    fn a_cell_holds_one_threshold_at_most() {
        for pair in THRESHOLDS.windows(2).filter(|pair| pair[0] != pair[1]) {
            let cell = |threshold: i64| (threshold as f32).to_bits() >> 21;
            let starts = (pair[0] as f32).to_bits() << 11 == 0;
            assert!(cell(pair[0]) < cell(pair[1]) || starts, "{pair:?}");
        }
    }

    #[test]
    fn the_fast_form_is_the_definition() {
        let around = THRESHOLDS.iter().flat_map(|&threshold| (-2..3).map(move |off| threshold + off));
        let powers = (0..63).flat_map(|power| [(1i64 << power) - 1, 1 << power, (1 << power) + 1]);
        let mut state = 1u64;
        let random = (0..200_000).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> (state >> 58)) as i64
        });
        let weights: Vec<f32> = (0..TIME_BUCKETS).map(|bucket| bucket as f32).collect();
        let table = TimeWeights::new(&weights);
        for difference in around.chain(powers).chain(random).chain(0..3000).chain([i64::MIN, i64::MAX]) {
            assert_eq!(table.of(difference) as usize, bucket(difference), "{difference}");
            assert_eq!(table.of(difference.wrapping_neg()) as usize, bucket(difference), "-{difference}");
        }
    }

    #[test]
    fn known_buckets() {
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(fast), [0, 0, 2, 3, 4, 5, 5, 6]);
        assert_eq!(fast(86_400), bucket(86_400));
        assert_eq!(fast(i64::from(i32::MAX)), 71);
        // A table of three buckets and the clamp is at the third.
        let short = TimeWeights::new(&[0.5, 1.5, 2.5]);
        assert_eq!([0, 2, 3, 1 << 40].map(|d| short.of(d)), [0.5, 2.5, 2.5, 2.5]);
    }

    #[test]
    fn square_root_buckets_start_where_the_reference_starts_them() {
        let bucket = |d| square_root_bucket(d, 60.0, 2048);
        for k in 1..=384i64 {
            assert_eq!([bucket(60 * k * k - 1), bucket(60 * k * k)], [k as usize - 1, k as usize], "{k}");
        }
        assert_eq!([bucket(-5), bucket(0), bucket(1_700_000_000)], [0, 0, 2048]);
    }
}
