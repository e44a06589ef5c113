//! Every format against double precision, and the invariant of the module: rows do not see each other.

use candle_core::{Device, Tensor};
use proptest::prelude::*;

use super::*;
use crate::cpu::isa::{Isa, Level};
use crate::cpu::vector;

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn matrix(values: &[f32], rows: usize) -> Tensor {
    Tensor::from_slice(values, (rows, values.len() / rows), &Device::Cpu).unwrap()
}

/// Every way this machine can compute.
fn backends() -> Vec<Cpu> {
    let mut all = Vec::new();
    for isa in Isa::all() {
        all.push(Cpu::with_isa(2, isa).unwrap().with_bf16_kernel(Bf16Kernel::Widened));
        if isa.level() >= Level::Avx512Bf16 {
            all.push(Cpu::with_isa(2, isa).unwrap().with_bf16_kernel(Bf16Kernel::Dot));
        }
    }
    all
}

/// How far a product of `inputs` terms, each at most 1, may be from the truth.
fn tolerance(format: WeightFormat, inputs: usize) -> f64 {
    let terms = inputs as f64;
    match format {
        WeightFormat::F32 => 1e-7 * terms + 1e-6,
        // Two roundings to 8 bits a term.
        WeightFormat::Bf16 => terms.sqrt() * 2f64.powi(-8) * 4.0,
        // Two roundings to 1/254 of the largest value a term.
        WeightFormat::Q8_0 => terms.sqrt() / 127.0 * 4.0,
    }
}

fn product(cpu: &Cpu, linear: &Linear, x: &[f32], output: Output, old: f32) -> Vec<f32> {
    let mut rows = Rows::default();
    rows.pack(cpu, x, linear.inputs(), linear.format());
    let mut out = vec![old; rows.count() * linear.outputs()];
    linear.forward(cpu, &rows, output, &mut out);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Checks that all backends agree to the bit, and that each row is the same alone.
fn check_independence(linear: &Linear, x: &[f32], output: Output) -> Result<Vec<f32>, TestCaseError> {
    let mut first: Option<Vec<f32>> = None;
    for cpu in backends() {
        let out = product(&cpu, linear, x, output, 0.5);
        for (x, out) in x.chunks(linear.inputs()).zip(out.chunks(linear.outputs())) {
            prop_assert_eq!(bits(&product(&cpu, linear, x, output, 0.5)), bits(out));
        }
        let first = first.get_or_insert_with(|| out.clone());
        prop_assert!(bits(first) == bits(&out), "{} differs for {}", cpu.isa().name(), linear.format());
    }
    Ok(first.unwrap())
}

proptest! {
    #[test]
    fn products_are_right_and_rows_do_not_see_each_other(
        rows in 1usize..40, inputs in 1usize..150, outputs in 1usize..100, seed in 0u64..1000, bias in any::<bool>(),
    ) {
        let (x, w, b) = (numbers(rows * inputs, seed), numbers(outputs * inputs, seed + 1), numbers(outputs, seed + 2));
        let biases = [Tensor::from_slice(&b, outputs, &Device::Cpu).unwrap()];
        for format in WeightFormat::ALL {
            let linear = Linear::pack(&[matrix(&w, outputs)], bias.then_some(&biases), format).unwrap();
            let out = check_independence(&linear, &x, Output::Add)?;
            for row in 0..rows {
                for column in 0..outputs {
                    let terms = (0..inputs).map(|k| f64::from(x[row * inputs + k]) * f64::from(w[column * inputs + k]));
                    let truth = terms.sum::<f64>() + 0.5 + if bias { f64::from(b[column]) } else { 0.0 };
                    let error = (f64::from(out[row * outputs + column]) - truth).abs();
                    prop_assert!(error < tolerance(format, inputs), "{format}: {error}");
                }
            }
        }
    }

    #[test]
    fn gated_products_are_those_of_two_matrices(
        rows in 1usize..20, inputs in 1usize..70, outputs in 1usize..70, seed in 0u64..1000,
    ) {
        let x = numbers(rows * inputs, seed);
        let (gate, up) = (numbers(outputs * inputs, seed + 1), numbers(outputs * inputs, seed + 2));
        for format in WeightFormat::ALL {
            let gated = Linear::pack_gated(matrix(&gate, outputs), matrix(&up, outputs), None, format).unwrap();
            let out = check_independence(&gated, &x, Output::Replace)?;
            let cpu = Cpu::new(1).unwrap();
            let alone = |w: &[f32]| {
                let linear = Linear::pack(&[matrix(w, outputs)], None, format).unwrap();
                product(&cpu, &linear, &x, Output::Replace, 0.0)
            };
            for ((out, gate), up) in out.iter().zip(alone(&gate)).zip(alone(&up)) {
                prop_assert_eq!(*out, sink::silu(gate) * up);
            }
        }
    }

    #[test]
    fn columns_are_those_of_the_whole_product_activated_up_to_the_one_named(
        rows in 1usize..20, inputs in 1usize..70, outputs in 1usize..130, seed in 0u64..1000, activated in 0usize..140,
        ends in prop::array::uniform2(0usize..=130),
    ) {
        let columns = ends[0].min(ends[1]).min(outputs)..ends[0].max(ends[1]).min(outputs);
        let (x, w) = (numbers(rows * inputs, seed), numbers(outputs * inputs, seed + 1));
        for format in WeightFormat::ALL {
            let linear = Linear::pack(&[matrix(&w, outputs)], None, format).unwrap();
            for cpu in backends() {
                let whole = product(&cpu, &linear, &x, Output::Replace, 0.0);
                let mut packed = Rows::default();
                packed.pack(&cpu, &x, inputs, format);
                let mut out = vec![0.0; rows * outputs];
                linear.forward_columns(&cpu, &packed, columns.clone(), activated, &mut out);
                for (out, whole) in out.chunks(outputs).zip(whole.chunks(outputs)) {
                    for column in columns.clone() {
                        let expected = whole[column];
                        let expected = if column < activated { vector::silu(expected) } else { expected };
                        prop_assert_eq!(out[column].to_bits(), expected.to_bits());
                    }
                }
            }
        }
    }

    #[test]
    fn scores_are_the_logits_and_their_normaliser(
        rows in 1usize..20, inputs in 1usize..40, outputs in 1usize..200, seed in 0u64..1000, wanted in 1u32..7,
    ) {
        let (x, w) = (numbers(rows * inputs, seed), numbers(outputs * inputs, seed + 1));
        for format in WeightFormat::ALL {
            let linear = Linear::pack(&[matrix(&w, outputs)], None, format).unwrap();
            let mut first: Option<Vec<u64>> = None;
            for cpu in backends() {
                let logits = product(&cpu, &linear, &x, Output::Replace, 0.0);
                let mut packed = Rows::default();
                packed.pack(&cpu, &x, inputs, format);
                let mut all = Vec::new();
                for normalized in [false, true] {
                    let mut scores = Scores::default();
                    scores.begin(normalized);
                    let tokens = || (0..outputs as u32).filter(|token| token % 7 < wanted);
                    tokens().for_each(|token| scores.want(token));
                    linear.score(&cpu, &packed, &mut scores);
                    for (row, logits) in logits.chunks(outputs).enumerate() {
                        for token in tokens() {
                            prop_assert_eq!(scores.logit(row, token).to_bits(), logits[token as usize].to_bits());
                        }
                        let truth = logits.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();
                        match scores.normalizer(cpu.isa(), row) {
                            None => prop_assert!(!normalized),
                            Some(normalizer) => {
                                prop_assert!((normalizer - truth).abs() < 2e-6, "{normalizer} for {truth}");
                                all.push(normalizer.to_bits());
                            }
                        }
                    }
                }
                prop_assert!(first.get_or_insert(all.clone()) == &all, "{} differs", cpu.isa().name());
            }
        }
    }
}

/// Every height that a kernel is written out for, and widths of input that fill none of its steps.
#[test]
fn every_height_of_a_tile_gives_the_same_bits_with_every_instruction_set() {
    for format in WeightFormat::ALL {
        for inputs in [1, 3, 4, 31, 32, 34, 67, 97] {
            let linear = Linear::pack(&[matrix(&numbers(70 * inputs, 3), 70)], None, format).unwrap();
            for rows in 1..=2 * MAX_HEIGHT {
                let x = numbers(rows * inputs, rows as u64);
                check_independence(&linear, &x, Output::Replace).unwrap();
            }
        }
    }
}

/// Blocks that are zero, below the normal range, near the largest number, and of one value that
/// outweighs the others.
#[test]
fn extreme_values_give_the_same_bits_with_every_instruction_set() {
    for scale in [0.0, 1e-44, 1e-39, 1e-30, 1e30, 3e38] {
        let mut x: Vec<f32> = numbers(5 * 100, 11).into_iter().map(|x| x * scale).collect();
        x[7] = 1e-3;
        x[150] = -0.0;
        for format in WeightFormat::ALL {
            let linear = Linear::pack(&[matrix(&numbers(40 * 100, 12), 40)], None, format).unwrap();
            check_independence(&linear, &x, Output::Replace).unwrap();
        }
    }
}

#[test]
fn what_is_not_finite_is_not_lost() {
    for format in WeightFormat::ALL {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for cpu in backends() {
                let mut x = numbers(3 * 64, 7);
                x[64 + 40] = bad;
                let linear = Linear::pack(&[matrix(&numbers(50 * 64, 8), 50)], None, format).unwrap();
                let mut rows = Rows::default();
                rows.pack(&cpu, &x, 64, format);
                let mut scores = Scores::default();
                scores.begin(true);
                linear.score(&cpu, &rows, &mut scores);
                let finite = [0, 1, 2].map(|row| scores.normalizer(cpu.isa(), row).unwrap().is_finite());
                assert_eq!(finite, [true, false, true], "{format} {bad} {}", cpu.isa().name());
            }
        }
    }
}

#[test]
fn weights_take_the_bytes_they_should() {
    let weight = matrix(&numbers(64 * 64, 1), 64);
    let bytes =
        WeightFormat::ALL.map(|f| Linear::pack(std::slice::from_ref(&weight), None, f).unwrap().bytes());
    assert_eq!(bytes, [64 * 64 * 4, 64 * 64 * 2, 64 * 64 + 64 * 64 / 32 * 4]);
}
