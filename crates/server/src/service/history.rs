//! How much of a long history is kept.
//!
//! A history that is longer than the context is cut at the old end *in coarse steps*. The first
//! item that is kept stays the same over many visits, so the cached context of the last visit is
//! still the beginning of the next one. Cutting one item per visit would shift every token and lose
//! the cache each time.

use crate::settings::HistoryCut;

/// The number of tokens of a prompt, by the number of its items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptLayout {
    /// Tokens of a prompt with one item.
    pub first_item: usize,
    /// Tokens that every further item adds.
    pub per_item: usize,
    /// Most items on which the model was trained, if the convention says so.
    pub trained_on: Option<usize>,
}

impl PromptLayout {
    /// Most items that fit into a context of `limit` tokens.
    pub fn max_items(&self, limit: usize) -> usize {
        let fit = match limit.checked_sub(self.first_item) {
            None => 0,
            Some(left) => 1 + left / self.per_item.max(1),
        };
        self.trained_on.map_or(fit, |most| fit.min(most))
    }
}

/// Number of the oldest of `items` items that are dropped when at most `fit` may stay.
pub(super) fn dropped(items: usize, fit: usize, cut: HistoryCut) -> usize {
    dropped_by(items, fit, step(fit, cut))
}

/// The same when `step` items are dropped at a time: as few steps as are needed.
pub fn dropped_by(items: usize, fit: usize, step: usize) -> usize {
    items.saturating_sub(fit).div_ceil(step) * step
}

/// Number of items that a coarse cut drops at a time. `bench/results/history-cuts.json` compares
/// other steps.
pub fn coarse_step(fit: usize) -> usize {
    (fit / 4).max(1)
}

/// Number of items that a cut drops at a time.
pub(super) fn step(fit: usize, cut: HistoryCut) -> usize {
    match cut {
        HistoryCut::Coarse => coarse_step(fit),
        HistoryCut::Exact => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_that_fit() {
        let layout = PromptLayout { first_item: 10, per_item: 4, trained_on: None };
        assert_eq!([0, 9, 10, 13, 14, 18].map(|limit| layout.max_items(limit)), [0, 0, 1, 1, 2, 3]);
        let layout = PromptLayout { trained_on: Some(2), ..layout };
        assert_eq!([9, 10, 1000].map(|limit| layout.max_items(limit)), [0, 1, 2]);
    }

    #[test]
    fn what_fits_is_kept_whole() {
        for fit in 0..50 {
            for items in 0..=fit {
                assert_eq!(dropped(items, fit, HistoryCut::Coarse), 0);
            }
        }
    }

    #[test]
    fn what_is_kept_fits_and_is_most_of_what_fits() {
        for fit in 0..50 {
            for items in fit + 1..4 * fit + 10 {
                let kept = items - dropped(items, fit, HistoryCut::Coarse);
                assert!(kept <= fit);
                assert!(kept + (fit / 4).max(1) > fit, "{items} items, {fit} fit, {kept} kept");
                assert_eq!(items - dropped(items, fit, HistoryCut::Exact), fit);
            }
        }
    }

    #[test]
    fn the_first_item_stays_for_a_whole_step_of_visits() {
        for fit in [4, 7, 16, 100, 333] {
            let step = fit / 4;
            let firsts: Vec<usize> =
                (fit + 1..fit + 1 + 20 * step).map(|items| dropped(items, fit, HistoryCut::Coarse)).collect();
            for visits in firsts.chunks(step) {
                assert!(visits.iter().all(|first| first == &visits[0]), "{fit}: {visits:?}");
            }
            assert!(firsts.windows(2).all(|pair| pair[1] == pair[0] || pair[1] == pair[0] + step));
        }
    }
}
