//! Every instruction set computes the chain that the contract names, at every height and width.

use super::*;
use crate::cpu::Bf16;

fn numbers(count: usize, seed: u32) -> Vec<f32> {
    (0..count as u32).map(|i| ((i ^ seed).wrapping_mul(0x9e37_79b9) >> 8) as f32 / 1e7 - 0.8).collect()
}

/// Every instruction set, against nested loops over the widened panel.
fn check<T: Stored>() {
    for height in 1..=2 * MOST_ROWS + 1 {
        for columns in [16, 32, 48, 64, 80, 144] {
            for (inner, gap) in [(1, 0), (7, 3), (32, 0), (50, 1), (64, 16)] {
                let rows = Strided { values: &numbers(height * (inner + gap), 1), stride: inner + gap };
                let mut values = vec![T::zeroed(); inner * (columns + gap)];
                T::put(Isa::detect(), &numbers(values.len(), 2), &mut values);
                let panel = Strided { values: &values, stride: columns + gap };
                let before = numbers(height * (columns + gap), 3);
                let mut expected = before.clone();
                for row in 0..height {
                    for column in 0..columns {
                        let sum = &mut expected[row * (columns + gap) + column];
                        for k in 0..inner {
                            let weight = panel.values[k * panel.stride + column].widen();
                            *sum = rows.values[row * rows.stride + k].mul_add(weight, *sum);
                        }
                    }
                }
                for isa in Isa::all() {
                    let mut sums = before.clone();
                    Product { rows, panel, height, inner, columns }.add_to(isa, &mut sums, columns + gap);
                    let equal = sums.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(
                        equal,
                        "{height} x {inner} x {columns} of {} with {}",
                        std::any::type_name::<T>(),
                        isa.name()
                    );
                }
            }
        }
    }
}

#[test]
fn every_element_is_one_chain_whatever_the_height_the_width_and_the_instruction_set() {
    check::<f32>();
}

#[test]
fn a_panel_in_bfloat16_gives_the_same_chains_as_one_that_was_widened_before() {
    check::<Bf16>();
}

#[test]
fn the_last_row_need_not_be_whole_and_nothing_adds_nothing() {
    let (rows, panel) = (numbers(2 * 5 + 3, 1), numbers(2 * 40 + 16, 2));
    let product = Product {
        rows: Strided { values: &rows, stride: 5 },
        panel: Strided { values: &panel, stride: 40 },
        height: 3,
        inner: 3,
        columns: 16,
    };
    for isa in Isa::all() {
        let mut sums = vec![0.5; 2 * 20 + 16];
        product.add_to(isa, &mut sums, 20);
        assert!(sums[16..20].iter().all(|&between| between == 0.5));
        let before = sums.clone();
        Product { height: 0, ..product }.add_to(isa, &mut sums, 20);
        Product { inner: 0, ..product }.add_to(isa, &mut sums, 20);
        assert_eq!(sums, before);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (rows, panel) = (numbers(64, 1), numbers(64 * 16, 2));
    let product = Product {
        rows: Strided { values: &rows, stride: 16 },
        panel: Strided { values: &panel, stride: 16 },
        height: 4,
        inner: 16,
        columns: 16,
    };
    let refused = |product: Product<'_>, sums: usize| {
        std::panic::catch_unwind(|| product.add_to(Isa::detect(), &mut vec![0.0; sums], 16)).is_err()
    };
    assert!(!refused(product, 64));
    assert!(refused(product, 63));
    assert!(refused(Product { height: 5, ..product }, 80));
    assert!(refused(Product { inner: 17, ..product }, 64));
    assert!(refused(Product { columns: 24, ..product }, 96));
    assert!(refused(Product { rows: Strided { values: &rows, stride: usize::MAX }, ..product }, 64));
    let one = Product { height: 1, inner: 64, ..product };
    assert!(!refused(one, 16));
    assert!(refused(Product { panel: Strided { values: &panel[1..], stride: 16 }, ..one }, 16));
}
