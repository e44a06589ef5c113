//! Relative bias of keys, by their distance in positions and in time.

use crate::cpu::isa::per_isa;
use crate::cpu::pages::PAGE_SIZE;
use crate::cpu::time_buckets::TimeWeights;

/// Relative bias of one layer, the same for all heads.
#[derive(Clone, Debug)]
pub struct RelativeBias {
    /// Positions there are.
    count: usize,
    /// By `count - 1 - distance`, padded so that a whole page can be read from any place.
    positions: Vec<f32>,
    times: TimeWeights,
}

impl RelativeBias {
    /// From the weights of position differences, `2 * count - 1` of them with index `count - 1 +
    /// column - row` (of which a causal mask reaches the first `count`), and of time buckets.
    pub fn new(positions: &[f32], times: &[f32]) -> Self {
        let count = positions.len().div_ceil(2);
        let mut padded = positions[..count].to_vec();
        padded.resize(count + PAGE_SIZE, 0.0);
        Self { count, positions: padded, times: TimeWeights::new(times) }
    }

    /// Positions there are: rows must lie before it.
    pub fn positions(&self) -> usize {
        self.count
    }

    /// The bias of a row and a column at or before it, whose times differ by `difference`.
    pub fn of(&self, row: usize, column: usize, difference: i64) -> f32 {
        self.of_positions(row, column)[0] + self.times.of(difference)
    }

    /// By position alone, for keys from `column` on.
    #[inline(always)]
    pub(super) fn of_positions(&self, row: usize, column: usize) -> &[f32] {
        &self.positions[self.count - 1 - row + column..]
    }
}

/// Keys of a page, as the bias sees them.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    /// Position of the first.
    pub(super) first: usize,
    /// Times of those that exist.
    pub(super) times: &'a [i64],
}

/// Rows that look at a page, at positions `step` apart.
#[derive(Clone, Copy)]
pub(super) struct Viewers<'a> {
    /// Position of the first.
    pub(super) first: usize,
    pub(super) step: usize,
    /// Times of the predictions.
    pub(super) times: &'a [i64],
}

per_isa! {
    /// The bias of every row and key. Most pages lie so far back that all of their keys fall into
    /// one time bucket of a row, which two look-ups tell; otherwise every key is looked up.
    pub(super) fn fill(bias: &RelativeBias, rows: Viewers<'_>, keys: Keys<'_>, out: &mut [[f32; PAGE_SIZE]]) = fill_body
}

#[inline(always)]
fn fill_body<const R: usize>(
    bias: &RelativeBias,
    rows: Viewers<'_>,
    keys: Keys<'_>,
    out: &mut [[f32; PAGE_SIZE]],
) {
    let earliest = keys.times.iter().fold(i64::MAX, |earliest, &time| earliest.min(time));
    let latest = keys.times.iter().fold(i64::MIN, |latest, &time| latest.max(time));
    let narrow = narrow(keys.times, earliest, latest);
    for (row, (out, &time)) in out.iter_mut().zip(rows.times).enumerate() {
        let positions = &bias.of_positions(rows.first + row * rows.step, keys.first)[..PAGE_SIZE];
        let outside = time >= latest || time <= earliest;
        let ends = [time.abs_diff(earliest) as f32, time.abs_diff(latest) as f32];
        let shared = if outside { bias.times.shared(ends[0], ends[1]) } else { None };
        if let Some(weight) = shared {
            for key in 0..PAGE_SIZE {
                out[key] = positions[key] + weight;
            }
        } else if let Some(narrow) = narrow.as_ref().filter(|_| fits(time - earliest)) {
            let time = (time - earliest) as i32;
            for key in 0..PAGE_SIZE {
                out[key] = positions[key] + bias.times.of_magnitude((time - narrow[key]).abs() as f32);
            }
        } else {
            for ((out, position), key) in out.iter_mut().zip(positions).zip(keys.times) {
                *out = position + bias.times.of(time - key);
            }
        }
    }
}

/// Times after the earliest as 32-bit integers, where they fit: they convert to the same floats, and
/// faster.
#[inline(always)]
fn narrow(times: &[i64], earliest: i64, latest: i64) -> Option<[i32; PAGE_SIZE]> {
    if !fits(latest - earliest) {
        return None;
    }
    let mut narrow = [0i32; PAGE_SIZE];
    for (narrow, &time) in narrow.iter_mut().zip(times) {
        *narrow = (time - earliest) as i32;
    }
    Some(narrow)
}

#[inline(always)]
fn fits(difference: i64) -> bool {
    i32::try_from(difference).is_ok_and(|d| d > i32::MIN / 2 && d < i32::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;

    #[test]
    fn a_page_is_filled_as_one_by_one_with_every_instruction_set() {
        let numbers = |count: usize| (0..count).map(|i| ((i * 7919) % 1009) as f32 / 500.0 - 1.0).collect();
        let (positions, times): (Vec<f32>, Vec<f32>) = (numbers(2 * 200 - 1), numbers(129));
        let bias = RelativeBias::new(&positions, &times);
        // Seconds apart, days apart, out of order, and farther apart than 32 bits reach.
        let spacings: [fn(i64) -> i64; 4] =
            [|i| 20 * i, |i| i * 40 + i / 9 * 70_000, |i| (i * 7919) % 100_003, |i| i << 31];
        for spacing in spacings {
            let all: Vec<i64> = (0..200).map(spacing).collect();
            for (first_row, step, first_key, count) in [(40, 1, 32, 8), (100, 1, 32, 32), (150, 0, 128, 20)] {
                let row_times: Vec<i64> = (0..9).map(|row| all[first_row + row * step + 1]).collect();
                let keys = Keys { first: first_key, times: &all[first_key..first_key + count] };
                for isa in Isa::all() {
                    let mut out = [[f32::NAN; PAGE_SIZE]; 9];
                    let rows = Viewers { first: first_row, step, times: &row_times };
                    fill(isa, &bias, rows, keys, &mut out);
                    for (row, out) in out.iter().enumerate() {
                        for (key, &out) in out[..count].iter().enumerate() {
                            let position = first_row + row * step;
                            let column = first_key + key;
                            let expected = bias.positions[bias.count - 1 + column - position]
                                + bias.times.of(row_times[row] - all[column]);
                            assert_eq!(out.to_bits(), expected.to_bits(), "{row} {key} with {}", isa.name());
                        }
                    }
                }
            }
        }
    }
}
