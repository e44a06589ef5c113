//! The best items are those of a full sort: whatever the filter, the number asked for, the users of the
//! call, ties.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::isa::Isa;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_model::families::hstu::retrieval::{ItemTable, Scored, TopItems, UserNotFinite};

use proptest::prelude::*;

/// Few different values, so that many items score the same.
fn coarse(count: usize, seed: u64, levels: u64) -> Vec<f32> {
    let mut state = seed | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % levels) as f32 - (levels / 2) as f32
        })
        .collect()
}

fn naive(rows: &[f32], width: usize, user: &[f32], first: usize) -> Vec<(usize, f64)> {
    let score = |row: &[f32]| {
        let length = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt().max(1e-6);
        row.iter().zip(user).map(|(x, u)| f64::from(*x) / length * f64::from(*u)).sum::<f64>()
    };
    rows.chunks_exact(width).map(score).enumerate().skip(first).collect()
}

fn bits(found: &[Scored]) -> Vec<(u32, u32)> {
    found.iter().map(|scored| (scored.item, scored.score.to_bits())).collect()
}

fn found(answers: Vec<Result<Vec<Scored>, UserNotFinite>>) -> Vec<Vec<Scored>> {
    answers.into_iter().map(Result::unwrap).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn the_best_are_those_of_a_full_sort(
        items in prop_oneof![1usize..80, 4000usize..9000],
        width in 1usize..20,
        users in 1usize..6,
        counts in prop::collection::vec(0usize..60, 6),
        modulus in 1u32..5,
        seed in any::<u64>(),
        levels in prop_oneof![Just(3u64), Just(1u64 << 20)],
        first in 0usize..2,
        format in 0usize..3,
        threads in 1usize..4,
    ) {
        let cpu = Cpu::new(threads).unwrap();
        let rows = coarse(items * width, seed, levels);
        let vectors = coarse(users * width, seed ^ 0xabcd, 1 << 20);
        let vectors: Vec<f32> = vectors.iter().map(|x| x / (1u32 << 20) as f32).collect();
        let table = ItemTable::new(&cpu, &rows, width, 1e-6, first, WeightFormat::ALL[format]).unwrap();
        let every = |_: u32| true;
        let some = |item: u32| item.is_multiple_of(modulus);
        let ask_all: Vec<TopItems<'_>> = vec![TopItems { count: items, allowed: &every }; users];
        let all = found(table.top(&cpu, &vectors, &ask_all));
        for (user, all) in all.iter().enumerate() {
            prop_assert_eq!(all.len(), items.saturating_sub(first));
            let sorted = all.windows(2).all(|pair| {
                pair[0].score > pair[1].score || (pair[0].score == pair[1].score && pair[0].item < pair[1].item)
            });
            prop_assert!(sorted);
            if format == 0 {
                let naive = naive(&rows, width, &vectors[user * width..][..width], first);
                for scored in all {
                    let truth = naive[scored.item as usize - first];
                    prop_assert_eq!(truth.0, scored.item as usize);
                    prop_assert!((truth.1 - f64::from(scored.score)).abs() < 2e-6);
                }
            }
        }
        // Fewer, filtered, one user at a time, with every instruction set: a part of the same list, the
        // same bits.
        let asked: Vec<TopItems<'_>> =
            (0..users).map(|user| TopItems { count: counts[user], allowed: &some }).collect();
        let some_of_all = found(table.top(&cpu, &vectors, &asked));
        for isa in Isa::all() {
            let cpu = Cpu::with_isa(threads, isa).unwrap();
            for user in 0..users {
                let expected: Vec<Scored> =
                    all[user].iter().copied().filter(|s| some(s.item)).take(counts[user]).collect();
                prop_assert_eq!(bits(&some_of_all[user]), bits(&expected));
                let alone = found(table.top(&cpu, &vectors[user * width..][..width], &asked[user..=user]));
                prop_assert_eq!(bits(&alone[0]), bits(&expected));
            }
        }
    }
}

#[test]
fn a_vector_that_is_not_finite_fails_alone() {
    let cpu = Cpu::new(1).unwrap();
    let table = ItemTable::new(&cpu, &[0.0, 1.0, 0.0, 0.0], 2, 1e-6, 0, WeightFormat::F32).unwrap();
    let asked = [TopItems { count: 2, allowed: &|_| true }; 4];
    let users = [1.0, 1.0, f32::NAN, 0.0, 1.0, 1.0, 3e38, 3e38];
    let answers = table.top(&cpu, &users, &asked);
    // An item of no length scores nothing, and is not divided by zero.
    let expected = [(0, 1.0f32.to_bits()), (1, 0)];
    assert_eq!(answers.iter().map(|answer| answer.is_ok()).collect::<Vec<_>>(), [true, false, true, false]);
    for user in [0, 2] {
        assert_eq!(bits(answers[user].as_ref().unwrap()), expected);
    }
}
