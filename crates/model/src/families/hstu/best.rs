//! The best items so far, for each user, found by several threads at once.
//!
//! Place in the flow: the item table scores blocks of items and offers them here. One comparison, with
//! the score of the worst kept item, refuses almost all of them; only an item that passes takes a lock.
//!
//! Invariant: the items kept at the end do not depend on the order of the offers. Better is the higher
//! score, then the smaller item.
//!
//! What must not be here: where scores come from.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::sync::atomic::{self, AtomicU32};
use std::sync::{Mutex, PoisonError};

use super::retrieval::{Scored, TopItems};

/// Scores that are compared together.
pub(super) const CHUNK: usize = 32;

/// The best items of each user.
pub(super) struct Best<'a> {
    users: Vec<User<'a>>,
}

struct User<'a> {
    asked: &'a TopItems<'a>,
    /// Bits of the least score that an item must have. It only rises, so an old value lets through too
    /// many items and never too few.
    least: AtomicU32,
    kept: Mutex<BinaryHeap<Worst>>,
}

/// Ordered so that the worst is the largest.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Worst(Scored);

impl Eq for Worst {}

impl PartialOrd for Worst {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Worst {
    fn cmp(&self, other: &Self) -> Ordering {
        other.0.score.total_cmp(&self.0.score).then(self.0.item.cmp(&other.0.item))
    }
}

impl<'a> Best<'a> {
    /// A set without items, for what each user asks.
    pub(super) fn new(asked: &'a [TopItems<'a>]) -> Self {
        let user = |asked: &'a TopItems<'a>| {
            let least = if asked.count == 0 { f32::INFINITY } else { f32::NEG_INFINITY };
            User { asked, least: AtomicU32::new(least.to_bits()), kept: Mutex::default() }
        };
        Self { users: asked.iter().map(user).collect() }
    }

    /// Offers a user the items from `first` on with these scores, less `margin`.
    pub(super) fn offer(&self, user: usize, first: usize, scores: &[f32], margin: f32) {
        let user = &self.users[user];
        for (index, chunk) in scores.chunks(CHUNK).enumerate() {
            let least = user.least();
            // Most chunks hold nothing good enough; this comparison is vectorised.
            if chunk.iter().fold(false, |any, &score| any | (score - margin >= least)) {
                for (place, &score) in chunk.iter().enumerate() {
                    user.offer((first + index * CHUNK + place) as u32, score - margin);
                }
            }
        }
    }

    /// Offers a user an item.
    pub(super) fn offer_one(&self, user: usize, item: usize, score: f32) {
        self.users[user].offer(item as u32, score);
    }

    /// The score of the worst item that is kept for a user. It is negative infinity while fewer items
    /// are kept than were asked for, and infinity if none were asked for.
    pub(super) fn worst(&self, user: usize) -> f32 {
        self.users[user].least()
    }

    /// What was found for each user, best first.
    pub(super) fn into_sorted(self) -> impl Iterator<Item = Vec<Scored>> {
        self.users.into_iter().map(|user| {
            let kept = user.kept.into_inner().unwrap_or_else(PoisonError::into_inner);
            kept.into_sorted_vec().into_iter().map(|Worst(scored)| scored).collect()
        })
    }
}

impl User<'_> {
    fn least(&self) -> f32 {
        f32::from_bits(self.least.load(atomic::Ordering::Relaxed))
    }

    fn offer(&self, item: u32, score: f32) {
        // Zero is one number, not two.
        let score = score + 0.0;
        if score < self.least() || score.is_nan() || !(self.asked.allowed)(item) {
            return;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(Worst(Scored { item, score }));
        if kept.len() > self.asked.count {
            kept.pop();
        }
        if let (Some(worst), true) = (kept.peek(), kept.len() == self.asked.count) {
            self.least.store(worst.0.score.to_bits(), atomic::Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_kept_is_the_head_of_all_in_order(
            scores in prop::collection::vec(-4i8..4, 0..300), count in 0usize..20, threads in 1usize..4, forbidden in 2u32..9,
        ) {
            // Few different scores, so that many are equal.
            let scores: Vec<f32> = scores.into_iter().map(f32::from).collect();
            let allowed = |item: u32| !item.is_multiple_of(forbidden);
            let asked = [TopItems { count, allowed: &allowed }, TopItems { count: 3, allowed: &|_| true }];
            let best = Best::new(&asked);
            std::thread::scope(|scope| {
                let (best, chunks) = (&best, scores.len().div_ceil(threads).max(1));
                for (index, scores) in scores.chunks(chunks).enumerate() {
                    scope.spawn(move || {
                        best.offer(0, 100 + index * chunks, scores, 0.5);
                        for (place, score) in scores.iter().enumerate() {
                            best.offer_one(1, index * chunks + place, -score);
                        }
                    });
                }
            });
            let expected = |count: usize, first: usize, score: &dyn Fn(f32) -> f32, allowed: &dyn Fn(u32) -> bool| {
                let items = scores.iter().enumerate().map(|(i, s)| ((first + i) as u32, score(*s)));
                let mut all: Vec<_> = items.filter(|(item, _)| allowed(*item)).collect();
                all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                all.truncate(count);
                all
            };
            let expected = [
                expected(count, 100, &|score| score - 0.5, &allowed),
                expected(3, 0, &|score| -score + 0.0, &|_| true),
            ];
            for (user, expected) in expected.iter().enumerate() {
                let full = expected.len() == asked[user].count;
                let worst = expected.last().map_or(f32::INFINITY, |worst| worst.1);
                prop_assert_eq!(best.worst(user), if full { worst } else { f32::NEG_INFINITY });
            }
            for (found, expected) in best.into_sorted().zip(expected) {
                prop_assert_eq!(found.iter().map(|found| (found.item, found.score)).collect::<Vec<_>>(), expected);
            }
        }
    }
}
