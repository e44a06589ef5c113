//! Element-wise functions and reductions, each with a fixed order of operations.

use super::isa::per_isa;
use super::stored::Stored;

/// Partial sums of a reduction: element `i` goes to lane `i % LANES`, lanes are added pairwise at the end.
pub const LANES: usize = 16;

/// e^x for x <= 88, to about one unit in the last place; 0 below -87.
///
/// Range reduction by ln 2 and the Taylor polynomial of degree 7. Its remainder on the reduced range
/// (|r| <= ln 2 / 2) is 5e-9 relative. This code replaces the platform's, because it vectorises and
/// gives the same bits on every machine.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // In this order a NaN stays one.
    let shifted = larger(-87.5, x).mul_add(std::f32::consts::LOG2_E, ROUND);
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

/// The larger of two numbers. Unlike `f32::max` it is one instruction; a NaN may be lost, so look for it
/// elsewhere.
#[inline(always)]
pub fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Reduces lanes pairwise.
#[inline(always)]
pub fn fold_lanes(mut lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
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
pub fn dot<T: Stored>(a: &[f32], b: &[T]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_full, a_rest) = a.as_chunks::<LANES>();
    let (b_full, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_full.iter().zip(b_full) {
        for lane in 0..LANES {
            lanes[lane] = a[lane].mul_add(b[lane].widen(), lanes[lane]);
        }
    }
    for (lane, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[lane] = a.mul_add(b.widen(), lanes[lane]);
    }
    add_lanes(lanes)
}

per_isa! {
    /// Root-mean-square norm of one row: `out = x / sqrt(mean(x^2) + eps) * weight`
    /// (Zhang and Sennrich 2019, as in Llama and Qwen).
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_norm_body
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
    pub fn log_sum_exp(row: &[f32], out: &mut f64) = log_sum_exp_body
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

/// `1 / y` for y in [1, 2], to one unit in the last place: the best quadratic (relative error 1/99),
/// then two steps of Newton. A division is one slow instruction; these are six that overlap with others,
/// and the same bits everywhere.
#[inline(always)]
fn reciprocal_of_one_to_two(y: f32) -> f32 {
    let r = (32.0f32 / 99.0).mul_add(y, -144.0 / 99.0).mul_add(y, 210.0 / 99.0);
    let r = (-y).mul_add(r, 1.0).mul_add(r, r);
    (-y).mul_add(r, 1.0).mul_add(r, r)
}

/// e^x for x <= 0, to about one unit in the last place; for x < -86.5 as for -86.5. It takes fewer
/// instructions than [`exp`], because attention without softmax computes one for every pair of a query
/// and a key. No result is below the normal range, so the power of two is added to the exponent. The
/// polynomial of degree 6 has the least relative error on the reduced range (2e-9), given that it is 1
/// at 0.
#[inline(always)]
fn exp_of_negative(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    // In this order a NaN stays one.
    let x = larger(-86.5, x);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.384_360_7e-3f32.mul_add(r, 8.374_196e-3);
    let p = p.mul_add(r, 0.041_668_005);
    let p = p.mul_add(r, 0.166_664_3);
    let p = p.mul_add(r, 0.499_999_94);
    let p = p.mul_add(r, 1.0);
    let p = p.mul_add(r, 1.0);
    // The constant in `shifted` leaves nothing in the bits that are kept.
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// e^x for x <= 0, as [`exp_of_negative`], but exactly 0 from -86.5 down, -infinity included. Exactly 1 at 0.
#[inline(always)]
pub fn exp_or_zero(x: f32) -> f32 {
    let e = exp_of_negative(x);
    if x <= -86.5 { 0.0 } else { e }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    let e = exp_of_negative(-x.abs());
    let r = reciprocal_of_one_to_two(1.0 + e);
    if x < 0.0 { e * r } else { r }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// Mean and `1 / sqrt(variance + eps)` of a row, with the biased variance. The mean is subtracted before
/// squares are summed, so a row far from zero loses nothing.
#[inline(always)]
pub(crate) fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let count = x.len() as f32;
    let (full, rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for chunk in full {
        for lane in 0..LANES {
            sums[lane] += chunk[lane];
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum += x;
    }
    let mean = add_lanes(sums) / count;
    let mut squares = [0.0f32; LANES];
    for chunk in full {
        for lane in 0..LANES {
            let off = chunk[lane] - mean;
            squares[lane] = off.mul_add(off, squares[lane]);
        }
    }
    for (square, x) in squares.iter_mut().zip(rest) {
        *square = (x - mean).mul_add(x - mean, *square);
    }
    (mean, 1.0 / (add_lanes(squares) / count + eps).sqrt())
}

per_isa! {
    /// Layer norm of one row (Ba et al. 2016): `out = (x - mean) / sqrt(variance + eps)`, then
    /// `* weight + bias` if there are any.
    pub fn layer_norm(x: &[f32], affine: Option<(&[f32], &[f32])>, eps: f32, out: &mut [f32]) = layer_norm_body
}

#[inline(always)]
fn layer_norm_body<const R: usize>(x: &[f32], affine: Option<(&[f32], &[f32])>, eps: f32, out: &mut [f32]) {
    let (mean, scale) = moments(x, eps);
    match affine {
        None => {
            for (out, x) in out.iter_mut().zip(x) {
                *out = (x - mean) * scale;
            }
        }
        Some((weight, bias)) => {
            for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                *out = ((x - mean) * scale).mul_add(*weight, *bias);
            }
        }
    }
}

per_isa! {
    /// `x = silu(x)` for every value.
    pub(crate) fn silu_in_place(x: &mut [f32]) = silu_in_place_body
}

#[inline(always)]
fn silu_in_place_body<const R: usize>(x: &mut [f32]) {
    let (full, rest) = x.as_chunks_mut::<LANES>();
    for chunk in full {
        for value in chunk.iter_mut() {
            *value = silu(*value);
        }
    }
    for value in rest {
        *value = silu(*value);
    }
}

per_isa! {
    /// `x = x * sigmoid(layer_norm(x))` for one row: the SwishLayerNorm of the HSTU ranking model.
    pub fn swish_norm(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) = swish_norm_body
}

#[inline(always)]
fn swish_norm_body<const R: usize>(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let (mean, scale) = moments(x, eps);
    for ((x, weight), bias) in x.iter_mut().zip(weight).zip(bias) {
        *x *= sigmoid(((*x - mean) * scale).mul_add(*weight, *bias));
    }
}

per_isa! {
    /// `x = x * gate`, value by value.
    pub fn gate(x: &mut [f32], gate: &[f32]) = gate_body
}

#[inline(always)]
fn gate_body<const R: usize>(x: &mut [f32], gate: &[f32]) {
    for (x, gate) in x.iter_mut().zip(gate) {
        *x *= gate;
    }
}

per_isa! {
    /// Divides a row by its Euclidean length, or by `least` if that is larger.
    pub fn l2_normalize(x: &mut [f32], least: f32) = l2_normalize_body
}

#[inline(always)]
fn l2_normalize_body<const R: usize>(x: &mut [f32], least: f32) {
    let length = dot(x, x).sqrt();
    // A NaN stays one.
    let length = if length < least { least } else { length };
    for x in x {
        *x /= length;
    }
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
    fn exponentials_of_what_is_not_positive_are_within_two_units() {
        let mut worst = 0.0f64;
        for i in 0..86_000 {
            let x = i as f32 / -1000.0 - 0.000_37;
            let truth = f64::from(x).exp();
            worst = worst.max(((f64::from(exp_or_zero(x)) - truth) / truth).abs());
        }
        assert!(worst < 2.4e-7, "relative error {worst}");
        assert_eq!([0.0, -0.0].map(exp_or_zero), [1.0, 1.0]);
        assert_eq!([-86.5, -1000.0, f32::NEG_INFINITY].map(exp_or_zero), [0.0; 3]);
        assert!(exp_or_zero(f32::NAN).is_nan());
    }

    #[test]
    fn silu_is_within_a_few_units_of_the_true_value() {
        let mut worst = 0.0f64;
        for i in -86_000..120_000 {
            let x = i as f32 / 1000.0 + 0.000_37;
            let truth = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            worst = worst.max(((f64::from(silu(x)) - truth) / truth).abs());
        }
        assert!(worst < 5e-7, "relative error {worst}");
        assert_eq!(silu(0.0), 0.0);
        assert!((silu(-1000.0)).abs() < 1e-34);
        assert!(sigmoid(f32::NAN).is_nan() && sigmoid(-f32::NAN).is_nan());
        assert_eq!(silu(f32::INFINITY), f32::INFINITY);
        assert!(silu(f32::NAN).is_nan());
    }

    #[test]
    fn layer_norm_is_that_of_double_precision() {
        for width in [1, 5, 16, 50, 256] {
            let x: Vec<f32> = (0..width).map(|i| ((i * 7919) % 1000) as f32 / 370.0 + 3.0).collect();
            let weight: Vec<f32> = x.iter().map(|x| x * 0.3 - 1.0).collect();
            let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
            let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
            let mut out = vec![0.0; width];
            layer_norm(Isa::detect(), &x, Some((&weight, &x)), 1e-6, &mut out);
            for (index, out) in out.iter().enumerate() {
                let truth = (f64::from(x[index]) - mean) / (variance + 1e-6).sqrt()
                    * f64::from(weight[index])
                    + f64::from(x[index]);
                assert!((f64::from(*out) - truth).abs() < 1e-5, "{out} for {truth}");
            }
        }
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
                let mut more = row.clone();
                layer_norm(isa, &row, Some((&weight, &row)), 1e-6, &mut more);
                normed.extend_from_slice(&more);
                swish_norm(isa, &mut more, &weight, &row, 1e-5);
                silu_in_place(isa, &mut more);
                l2_normalize(isa, &mut more, 1e-6);
                normed.extend_from_slice(&more);
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
