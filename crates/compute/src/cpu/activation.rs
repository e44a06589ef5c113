//! Activations of feed-forward layers, each with a fixed order of operations.
//!
//! Invariant: a value depends on its input alone, bit for bit, whatever the instruction set. NaN stays
//! NaN.

use crate::cpu::isa::{Isa, per_isa};
use crate::cpu::vector::{exp, larger, sigmoid, silu};

/// What stands between the two products of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Rectifier, `max(x, 0)`.
    Relu,
    /// `x Phi(x)`, with the error function (Hendrycks and Gimpel 2016).
    Gelu,
    /// The same with a hyperbolic tangent.
    GeluTanh,
    /// `x / (1 + e^-x)`.
    Silu,
}

impl Activation {
    /// By its name in transformers.
    pub fn of(name: &str) -> Option<Self> {
        match name {
            "relu" => Some(Self::Relu),
            "gelu" => Some(Self::Gelu),
            "gelu_new" => Some(Self::GeluTanh),
            "silu" | "swish" => Some(Self::Silu),
            _ => None,
        }
    }

    /// Applies it to every value.
    pub fn apply(self, isa: Isa, x: &mut [f32]) {
        match self {
            Self::Relu => relu_all(isa, x),
            Self::Gelu => gelu_all(isa, x),
            Self::GeluTanh => gelu_tanh_all(isa, x),
            Self::Silu => silu_all(isa, x),
        }
    }
}

/// Makes a function of all values out of one of a value.
macro_rules! for_all {
    ($all:ident, $body:ident, $one:expr) => {
        per_isa! {
            fn $all(x: &mut [f32]) = $body
        }

        #[inline(always)]
        fn $body<const R: usize>(x: &mut [f32]) {
            for value in x {
                *value = $one(*value);
            }
        }
    };
}

for_all!(relu_all, relu_body, relu);
for_all!(gelu_all, gelu_body, gelu);
for_all!(gelu_tanh_all, gelu_tanh_body, gelu_tanh);
for_all!(silu_all, silu_body, silu);

#[inline(always)]
fn relu(x: f32) -> f32 {
    // In this order a NaN stays one.
    larger(0.0, x)
}

/// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`: the bracket over two is a sigmoid of twice the
/// argument.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const TWICE_ROOT: f32 = 1.595_769;
    let cubic = (x * x).mul_add(0.044_715 * x, x);
    x * sigmoid(TWICE_ROOT * cubic)
}

/// `x (1 + erf(x / sqrt(2))) / 2`.
#[inline(always)]
fn gelu(x: f32) -> f32 {
    let tail = 0.5 * erfc_of_positive(x.abs() * std::f32::consts::FRAC_1_SQRT_2);
    // The smaller part is computed, and the larger one is what is left of one.
    x * if x < 0.0 { tail } else { 1.0 - tail }
}

/// `1 - erf(x)` for x >= 0, to 2e-7 (Abramowitz and Stegun 1964, 7.1.26).
#[inline(always)]
fn erfc_of_positive(x: f32) -> f32 {
    let t = 1.0 / 0.327_591_1f32.mul_add(x, 1.0);
    let p = 1.061_405_4f32.mul_add(t, -1.453_152);
    let p = p.mul_add(t, 1.421_413_7);
    let p = p.mul_add(t, -0.284_496_74);
    let p = p.mul_add(t, 0.254_829_6);
    p * t * exp(-x * x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// erf by its series, which converges everywhere; in double precision good to 1e-9 up to 4.
    fn erf(x: f64) -> f64 {
        let mut term = x;
        let mut sum = x;
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn activations_are_those_of_double_precision_with_every_instruction_set() {
        let inputs: Vec<f32> = (-500..=500).map(|i| i as f32 / 100.0 + 0.000_37).collect();
        type Truth = fn(f64) -> f64;
        let truths: [(Activation, Truth); 4] = [
            (Activation::Relu, |x| x.max(0.0)),
            (Activation::Gelu, |x| x * (1.0 + erf(x / 2f64.sqrt())) / 2.0),
            (Activation::GeluTanh, |x| {
                x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()) / 2.0
            }),
            (Activation::Silu, |x| x / (1.0 + (-x).exp())),
        ];
        for (activation, truth) in truths {
            let mut of_isa = Vec::new();
            for isa in Isa::all() {
                let mut found = inputs.clone();
                activation.apply(isa, &mut found);
                for (x, y) in inputs.iter().zip(&found) {
                    let off = (f64::from(*y) - truth(f64::from(*x))).abs();
                    assert!(off < 2e-6, "{activation:?} of {x} is {y}, off by {off}");
                }
                of_isa.push(found.iter().map(|y| y.to_bits()).collect::<Vec<_>>());
            }
            assert!(of_isa.windows(2).all(|pair| pair[0] == pair[1]), "{activation:?}");
        }
    }

    #[test]
    fn what_is_not_a_number_stays_none_and_large_values_stay() {
        for activation in [Activation::Relu, Activation::Gelu, Activation::GeluTanh, Activation::Silu] {
            let mut x = [f32::NAN, 100.0, -100.0, 0.0];
            activation.apply(Isa::detect(), &mut x);
            assert!(
                x[0].is_nan() && x[1] == 100.0 && x[2].abs() < 1e-30 && x[3] == 0.0,
                "{activation:?} {x:?}"
            );
        }
    }
}
