//! A number of a key or a value as it lies in a page: in single precision, or rounded to bfloat16.
//!
//! Rounding happens once, when a row is written; every reader widens, which is exact. So all readers
//! attend to the same row, at any time.

use bytemuck::{Pod, Zeroable};

use super::isa::{Isa, per_isa};
use super::tile::Kernels;
use super::turn::SQUARE;

/// Values that are turned around together.
pub type Square<T> = [[T; SQUARE]; SQUARE];

/// A number of a key or a value.
pub trait Stored: Pod + Send + Sync + std::fmt::Debug + Kernels {
    /// In single precision: exact.
    fn widen(self) -> f32;

    /// The same values, rounded where they must be.
    fn put(isa: Isa, from: &[f32], to: &mut [Self]);

    /// As [`Stored::put`], for a square that need not be copied; otherwise the copy is in `spare`.
    fn put_square<'a>(isa: Isa, square: &'a Square<f32>, spare: &'a mut Square<Self>) -> &'a Square<Self>;
}

impl Stored for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn put(_: Isa, from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    #[inline(always)]
    fn put_square<'a>(_: Isa, square: &'a Square<f32>, _: &'a mut Square<f32>) -> &'a Square<f32> {
        square
    }
}

/// A bfloat16: the upper half of a number in single precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub(crate) struct Bf16(u16);

impl Bf16 {
    /// The nearest one, ties to even.
    #[inline(always)]
    pub(crate) fn nearest(x: f32) -> Self {
        Self((nearest(x) >> 16) as u16)
    }
}

impl Stored for Bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    #[inline(always)]
    fn put(isa: Isa, from: &[f32], to: &mut [Self]) {
        round_all(isa, from, to);
    }

    #[inline(always)]
    fn put_square<'a>(isa: Isa, square: &'a Square<f32>, spare: &'a mut Square<Self>) -> &'a Square<Self> {
        round_all(isa, square.as_flattened(), spare.as_flattened_mut());
        spare
    }
}

/// Bits of the nearest bfloat16 in the upper half of a word, ties to even; the lower half is zero. NaN
/// stays NaN.
#[inline(always)]
pub(crate) fn nearest(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000;
    let quiet = (bits | 0x0040_0000) & 0xFFFF_0000;
    if bits & 0x7FFF_FFFF > 0x7F80_0000 { quiet } else { nearest }
}

per_isa! {
    fn round_all(from: &[f32], to: &mut [Bf16]) = round_all_body
}

#[inline(always)]
fn round_all_body<const R: usize>(from: &[f32], to: &mut [Bf16]) {
    assert_eq!(from.len(), to.len(), "a place for every value");
    for (to, from) in to.iter_mut().zip(from) {
        *to = Bf16::nearest(*from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The nearer of the two neighbours, by distances in double precision; in the middle, the one with
    /// an even last bit.
    fn naive(x: f32) -> u16 {
        let below = (x.to_bits() >> 16) as u16;
        let of = |upper: u16| f64::from(f32::from_bits(u32::from(upper) << 16));
        // Beyond the largest number lies infinity, at the place where the next number would be.
        let above = below + 1;
        let top = if of(above).is_infinite() { f64::from(x.signum()) * 2f64.powi(128) } else { of(above) };
        let (down, up) = ((f64::from(x) - of(below)).abs(), (top - f64::from(x)).abs());
        if down < up || (down == up && below.is_multiple_of(2)) { below } else { above }
    }

    #[test]
    fn every_instruction_set_rounds_to_the_nearest_ties_to_even() {
        let mut all: Vec<f32> =
            (0..200_000_u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9))).collect();
        // Ties, their neighbours, what is below the normal range, and what rounds to infinity.
        for upper in [0x3f80_u32, 0x3f81, 0xbf80, 0xc2ff, 0x0000, 0x0001, 0x007f, 0x7f7f, 0xff7f] {
            all.extend([0x7fff, 0x8000, 0x8001].map(|lower| f32::from_bits(upper << 16 | lower)));
        }
        all.retain(|x| x.is_finite());
        for isa in Isa::all() {
            let mut rounded = vec![Bf16::default(); all.len()];
            Bf16::put(isa, &all, &mut rounded);
            for (x, rounded) in all.iter().zip(&rounded) {
                assert_eq!(rounded.0, naive(*x), "{x:e} with {}", isa.name());
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none_and_widening_is_exact() {
        for isa in Isa::all() {
            let odd = [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::INFINITY, f32::NEG_INFINITY];
            let mut rounded = [Bf16::default(); 5];
            Bf16::put(isa, &odd, &mut rounded);
            assert!(rounded[..3].iter().all(|x| x.widen().is_nan()));
            assert_eq!(rounded[3..].iter().map(|x| x.widen()).collect::<Vec<_>>(), odd[3..]);
        }
        for upper in (0..=u16::MAX).filter(|&upper| Bf16(upper).widen().is_finite()) {
            assert_eq!(Bf16::nearest(Bf16(upper).widen()), Bf16(upper));
        }
    }
}
