//! Element-wise functions and reductions, each with a fixed order of operations.

use super::isa::per_isa;

/// Partial sums of a reduction: element `i` goes to lane `i % LANES`, lanes are added pairwise at the end.
pub(crate) const LANES: usize = 16;

/// e^x for x <= 88, to about one unit in the last place; 0 below -87.
///
/// Range reduction by ln 2 and the Taylor polynomial of degree 7, whose remainder on the reduced range
/// (|r| <= ln 2 / 2) is 5e-9 relative. Own code instead of the platform's, because it vectorises and gives the
/// same bits on every machine.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x.max(-87.5).mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // From `x` itself, so that NaN stays NaN.
    let r = n.mul_add(-LN_2_HIGH, x);
    let r = n.mul_add(-LN_2_LOW, r);
    let p = (1.0f32 / 5040.0).mul_add(r, 1.0 / 720.0);
    let p = p.mul_add(r, 1.0 / 120.0);
    let p = p.mul_add(r, 1.0 / 24.0);
    let p = p.mul_add(r, 1.0 / 6.0);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r, 1.0);
    let p = p.mul_add(r, 1.0);
    let scale = f32::from_bits((shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23);
    if x < -87.0 { 0.0 } else { p * scale }
}

/// The larger of two numbers. Unlike `f32::max` it is one instruction; a NaN may be lost, so look for it elsewhere.
#[inline(always)]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Reduces lanes pairwise.
#[inline(always)]
pub(crate) fn fold_lanes(mut lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = combine(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn add_lanes(lanes: [f32; LANES]) -> f32 {
    fold_lanes(lanes, |a, b| a + b)
}

/// Inner product in the fixed order of this module.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_full, a_rest) = a.as_chunks::<LANES>();
    let (b_full, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_full.iter().zip(b_full) {
        for lane in 0..LANES {
            lanes[lane] = a[lane].mul_add(b[lane], lanes[lane]);
        }
    }
    for (lane, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[lane] = a.mul_add(*b, lanes[lane]);
    }
    add_lanes(lanes)
}

per_isa! {
    /// Root-mean-square norm of one row: `out = x / sqrt(mean(x^2) + eps) * weight`
    /// (Zhang and Sennrich 2019, as in Llama and Qwen).
    pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_norm_body
}

#[inline(always)]
fn rms_norm_body<const R: usize>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = rms_scale(x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
pub(crate) fn rms_scale(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

per_isa! {
    /// Writes `[ln(sum of e^x)]` of a row to `out`, in double precision from single-precision exponentials.
    /// Not finite if any element is not finite.
    pub(crate) fn log_sum_exp(row: &[f32], out: &mut f64) = log_sum_exp_body
}

#[inline(always)]
fn log_sum_exp_body<const R: usize>(row: &[f32], out: &mut f64) {
    let (full, rest) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    // A NaN would be lost in a maximum; zero times it is not lost in this sum.
    let mut poison = [0.0f32; LANES];
    for chunk in full {
        for lane in 0..LANES {
            lanes[lane] = larger(chunk[lane], lanes[lane]);
            poison[lane] = chunk[lane].mul_add(0.0, poison[lane]);
        }
    }
    let mut max = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut poison = add_lanes(poison);
    for x in rest {
        max = max.max(*x);
        poison = x.mul_add(0.0, poison);
    }
    let mut sums = [0.0f64; LANES];
    for chunk in full {
        for lane in 0..LANES {
            sums[lane] += f64::from(exp(chunk[lane] - max));
        }
    }
    let mut sum: f64 = sums.into_iter().sum();
    for x in rest {
        sum += f64::from(exp(x - max));
    }
    *out = f64::from(max) + sum.ln() + f64::from(poison);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;

    #[test]
    fn exp_is_within_two_units_of_the_true_value() {
        let mut worst = 0.0f64;
        for i in -86_000..88_000 {
            let x = i as f32 / 1000.0 + 0.000_37;
            let truth = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - truth) / truth).abs());
        }
        assert!(worst < 2.4e-7, "relative error {worst}");
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let row: Vec<f32> = (0..777).map(|i| ((i * 7919) % 1000) as f32 / 37.0 - 13.0).collect();
        let weight: Vec<f32> = row.iter().map(|x| x * 0.3 + 1.0).collect();
        let results: Vec<_> = Isa::all()
            .into_iter()
            .map(|isa| {
                let mut normed = vec![0.0; row.len()];
                rms_norm(isa, &row, &weight, 1e-6, &mut normed);
                let mut lse = 0.0;
                log_sum_exp(isa, &row, &mut lse);
                (normed.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), lse.to_bits())
            })
            .collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn log_sum_exp_is_stable_and_reports_poison() {
        let lse = |row: &[f32]| {
            let mut out = 0.0;
            log_sum_exp(Isa::detect(), row, &mut out);
            out
        };
        assert!((lse(&[1000.0; 40]) - (1000.0 + 40f64.ln())).abs() < 1e-6);
        assert!((lse(&[-1000.0, -1000.0]) - (-1000.0 + 2f64.ln())).abs() < 1e-6);
        for bad in [f32::NAN, f32::INFINITY] {
            for place in [0, 17, 39] {
                let mut row = [1.0; 40];
                row[place] = bad;
                assert!(!lse(&row).is_finite());
            }
        }
    }
}
