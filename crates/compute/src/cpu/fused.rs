//! Fused multiply-adds for processors without them.
//!
//! `f32::mul_add` rounds once. Without an instruction for it, every value costs a call of the C library,
//! which the compiler cannot vectorise. Nearly all time goes into the products of a row and a row of
//! weights. They are computed in double precision instead, with the same bits. The product of two
//! single-precision numbers is exact there. The sum, rounded to double and then to single precision, is
//! wrong only if the first rounding hits the middle between two numbers, or if the result is below the
//! normal range. Either shows in the bits; such rows are computed again by [`multiply_add`].

/// Whether the compiler may use the instruction everywhere.
const IN_HARDWARE: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

/// `sums = x * weights + sums`, each rounded once.
#[inline(always)]
pub(crate) fn add_scaled<const W: usize>(x: f32, weights: &[f32; W], sums: &mut [f32; W]) {
    if IN_HARDWARE {
        for column in 0..W {
            sums[column] = x.mul_add(weights[column], sums[column]);
        }
    } else if let Some(rounded) = round_twice(x, weights, sums) {
        *sums = rounded;
    } else {
        for column in 0..W {
            sums[column] = multiply_add(x, weights[column], sums[column]);
        }
    }
}

/// Through double precision; none if a result may be wrong.
#[inline(always)]
fn round_twice<const W: usize>(x: f32, weights: &[f32; W], sums: &[f32; W]) -> Option<[f32; W]> {
    // Bits of double precision that single precision has no room for, and the middle between two numbers.
    const REST: u32 = 0x1FFF_FFFF;
    const MIDDLE: u32 = 0x1000_0000;
    let mut rounded = [0.0; W];
    let mut doubt = 0;
    for column in 0..W {
        let sum = f64::from(x) * f64::from(weights[column]) + f64::from(sums[column]);
        rounded[column] = sum as f32;
        let magnitude = rounded[column].to_bits() & 0x7FFF_FFFF;
        // Up to the least normal number, but not zero.
        let tiny = magnitude.wrapping_sub(1) >> 23 == 0;
        doubt |= u32::from(sum.to_bits() as u32 & REST == MIDDLE) | u32::from(tiny);
    }
    (doubt == 0).then_some(rounded)
}

/// `a * b + c`, rounded once: the sum is rounded to odd in double precision, after which a second
/// rounding is harmless (Boldo and Melquiond 2008).
#[inline(always)]
fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    // What the sum has lost, exactly (Knuth's two-sum).
    let part = sum - product;
    let lost = (product - (sum - part)) + (c - part);
    let bits = sum.to_bits();
    let toward_zero = (bits ^ lost.to_bits()) >> 63;
    // Of the two numbers around the exact sum, the odd one. A NaN has lost nothing.
    let is_even = u64::from(lost.abs() > 0.0) & !bits;
    f64::from_bits(bits.wrapping_add(is_even & 1).wrapping_sub(2 * (is_even & toward_zero & 1))) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Endless pseudo-random bits.
    fn bits() -> impl Iterator<Item = u32> {
        let mut state = 88_172_645_463_325_252_u64;
        std::iter::repeat_with(move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u32
        })
    }

    fn check(a: f32, b: f32, c: f32) {
        let expected = a.mul_add(b, c);
        let mut sums = [c; 4];
        match round_twice(a, &[b; 4], &sums) {
            Some(rounded) => sums = rounded,
            None => sums = sums.map(|c| multiply_add(a, b, c)),
        }
        for got in [multiply_add(a, b, c), sums[0]] {
            assert!(
                got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(),
                "{a:e} * {b:e} + {c:e} = {expected:e}, not {got:e}"
            );
        }
    }

    #[test]
    fn a_multiply_add_without_the_instruction_has_the_same_bits() {
        let mut bits = bits();
        let mut next = || bits.next().unwrap();
        for _ in 0..300_000 {
            let (a, b) = (f32::from_bits(next()), f32::from_bits(next()));
            // Any numbers; sums that nearly cancel; and short numbers, whose sums often lie in the
            // middle between two.
            check(a, b, f32::from_bits(next()));
            check(a, b, f32::from_bits(((a * b).to_bits() ^ 0x8000_0000).wrapping_add(next() % 64)));
            let short = |bits: u32, places: i32| (bits >> 20) as f32 * 2f32.powi(bits as i32 % 40 - places);
            check(short(next(), 0), short(next(), 0), -short(next(), 30));
            // Results below the normal range.
            check(short(next(), 70), short(next(), 70), short(next(), 130));
        }
    }

    #[test]
    fn special_values_keep_their_meaning() {
        let special =
            [0.0, -0.0, 1.0, f32::MIN_POSITIVE, 1e-45, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        for a in special {
            for b in special {
                special.into_iter().for_each(|c| check(a, b, c));
            }
        }
    }

    #[test]
    fn a_row_has_the_bits_of_its_columns() {
        let mut bits = bits();
        let mut numbers = || -> [f32; 32] {
            std::array::from_fn(|_| bits.next().unwrap().cast_signed() as f32 / 2f32.powi(31))
        };
        for _ in 0..1000 {
            let (x, weights, mut sums) = (numbers()[0], numbers(), numbers());
            let expected: [f32; 32] = std::array::from_fn(|column| x.mul_add(weights[column], sums[column]));
            add_scaled(x, &weights, &mut sums);
            assert_eq!(sums.map(f32::to_bits), expected.map(f32::to_bits));
        }
    }
}
