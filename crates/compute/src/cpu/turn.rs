//! Turning a square of values around: rows become columns.
//!
//! Only values move, so every instruction set gives the same.

use super::isa::{Isa, Level};

/// Rows and columns of a square: a vector register of the widest instruction set.
pub(super) const SQUARE: usize = 16;

/// Makes rows columns.
pub(super) fn turn(isa: Isa, square: &mut [[f32; SQUARE]; SQUARE]) {
    #[cfg(target_arch = "x86_64")]
    if isa.level() >= Level::Avx512 {
        // SAFETY: an `Isa` of this level exists only if the machine was found to have its features.
        return unsafe { wide::turn(square) };
    }
    let _ = isa;
    for row in 0..SQUARE {
        for column in 0..row {
            let (above, below) = square.split_at_mut(row);
            std::mem::swap(&mut above[column][row], &mut below[0][column]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod wide {
    //! Spelled out: left to itself, the compiler takes the values one by one.

    use std::arch::x86_64::{
        __m512, _mm512_castpd_ps, _mm512_castps_pd, _mm512_loadu_ps, _mm512_shuffle_f32x4, _mm512_storeu_ps,
        _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
    };

    use super::SQUARE;

    /// Squares of 4 by 4 are turned within each quarter of the registers, then quarters change places.
    #[target_feature(enable = "avx512f")]
    pub(super) fn turn(square: &mut [[f32; SQUARE]; SQUARE]) {
        // SAFETY: 16 values are read from 16 values; no alignment is asked for.
        let mut rows: [__m512; SQUARE] =
            std::array::from_fn(|row| unsafe { _mm512_loadu_ps(square[row].as_ptr()) });
        for four in rows.as_chunks_mut::<4>().0 {
            let [a, b, c, d] = *four;
            let pairs = [
                [_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d)],
                [_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d)],
            ];
            for (half, [ab, cd]) in pairs.into_iter().enumerate() {
                let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                four[2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
                four[2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            }
        }
        for within in 0..4 {
            let [a, b, c, d] = [0, 1, 2, 3].map(|four| rows[4 * four + within]);
            // Quarters 0 and 2, and quarters 1 and 3, of two registers each.
            let even = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d)];
            let odd = [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d)];
            let turned = [
                _mm512_shuffle_f32x4::<0x88>(even[0], even[1]),
                _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]),
                _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]),
                _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]),
            ];
            for (quarter, turned) in turned.into_iter().enumerate() {
                // SAFETY: 16 values are written to 16 values; no alignment is asked for.
                unsafe { _mm512_storeu_ps(square[4 * quarter + within].as_mut_ptr(), turned) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_square_is_turned_with_every_instruction_set() {
        for isa in Isa::all() {
            let mut square =
                std::array::from_fn(|row| std::array::from_fn(|column| (16 * row + column) as f32));
            turn(isa, &mut square);
            for (row, values) in square.iter().enumerate() {
                assert_eq!(*values, std::array::from_fn(|column| (16 * column + row) as f32));
            }
        }
    }
}
