//! What HSTU computes of two rows of a sequence: whether one sees the other, and the relative bias
//! between them.
//!
//! ```text
//! bias  position weight[N - 1 + column - row]
//!       + time weight[bucket(time of what the row predicts - time of the column)]
//! ```

use candle_core::{Result, Tensor};

use crate::families::hstu::config::{MaskConfig, RelativeBiasConfig, StackConfig};

/// What every layer of a sequence reads.
pub(super) struct Pairs {
    /// Who sees whom, `[rows, rows]` of 0 and 1.
    pub(super) mask: Tensor,
    /// Which weights belong to each pair, `[rows * rows]`: by distance and by time.
    pub(super) bias: Option<[Tensor; 2]>,
}

impl Pairs {
    /// Of rows `[rows, model_dim]` whose first `context` are no candidates. `times` has one more
    /// than there are rows: the last is that of the query.
    pub(super) fn new(config: &StackConfig, rows: &Tensor, context: usize, times: &[i64]) -> Result<Self> {
        let count = rows.dim(0)?;
        let pairs = (0..count).flat_map(|row| (0..count).map(move |column| (row, column)));
        let of = |of: &dyn Fn(usize, usize) -> u32| {
            Tensor::from_iter(pairs.clone().map(|(row, column)| of(row, column)), rows.device())
        };
        let mask = of(&|row, column| u32::from(sees(config.mask, context, row, column)))?;
        let bias = match config.relative_bias {
            None => None,
            Some(bias) => Some([
                // A row sees none behind it, whatever weight is named for them.
                of(&|row, column| (bias.positions - 1 - row.saturating_sub(column)) as u32)?,
                // What a row predicts has the time of the next event, or of the query.
                of(&|row, column| bucket(times[row + 1] - times[column], bias))?,
            ]),
        };
        Ok(Self { mask: mask.reshape((count, count))?.to_dtype(rows.dtype())?, bias })
    }
}

/// Whether a row sees another of `context | candidates`: `_get_valid_attn_mask` of
/// generative-recommenders. Contextual rows have the id 0 and see all of the context; candidates
/// share the id behind it, and see no other candidate.
fn sees(mask: MaskConfig, context: usize, row: usize, column: usize) -> bool {
    let id = |row: usize| match mask.contextual_len {
        0 => row.min(context),
        contextual => (row.min(context) + 1).saturating_sub(contextual),
    };
    if row == column {
        return true;
    }
    let (own, other, end) = (id(row), id(column), id(context));
    let near = mask.max_attention_len == 0
        || own.saturating_sub(other) <= mask.max_attention_len
        || (mask.min_full_attention_len > 0 && own + mask.min_full_attention_len >= end);
    let contextual = mask.contextual_len > 0 && own == 0;
    column < context && ((own > other && near) || contextual)
}

/// `clamp(trunc(ln(max(|d|, 1)) / divisor), 0, highest)` of a difference of times. In single
/// precision, as trained.
fn bucket(difference: i64, bias: RelativeBiasConfig) -> u32 {
    let magnitude = (difference.unsigned_abs() as f32).max(1.0);
    ((magnitude.ln() / bias.time_divisor as f32) as usize).min(bias.time_buckets) as u32
}

#[cfg(test)]
mod tests {
    use beamline_compute::cpu::time_buckets;

    use super::*;

    #[test]
    fn buckets_are_those_of_the_table() {
        let bias = RelativeBiasConfig { positions: 1, time_buckets: 128, time_divisor: 0.301 };
        // Further on, logarithms in single precision step at neighbours.
        let near = time_buckets::THRESHOLDS[..53].iter().flat_map(|at| [at - 1, *at, at + 1, -at]);
        for difference in (0..100_000).chain(near) {
            assert_eq!(bucket(difference, bias) as usize, time_buckets::bucket(difference), "{difference}");
        }
    }

    #[test]
    fn masks_are_the_worked_example() {
        let mask = MaskConfig { contextual_len: 2, max_attention_len: 0, min_full_attention_len: 0 };
        let row = |row| (0..8).map(|column| if sees(mask, 5, row, column) { '1' } else { '0' }).collect();
        let rows: Vec<String> = (0..8).map(row).collect();
        let expected = "11111000 11111000 11100000 11110000 11111000 11111100 11111010 11111001";
        assert_eq!(rows.join(" "), expected);
    }
}
