//! From final states to what is asked of the research variant: the best items, or logits of tokens.
//!
//! Retrieval is exact: the inner product of the user's vector with every item's, each of unit length, and the best of those
//! that a filter allows. The items are packed once, at load, into blocks; a block's scores are looked through as soon
//! as they are there, so no more than a block of them exists per thread. Reading all items from memory is most of the work
//! for one user, so where few are asked for, a [`Sieve`] first says which panels of items can matter. Ties go to the smaller item. "Exact" is with respect
//! to the weight format: bf16 and q8_0 round the items and the user.
//!
//! What must not be here: how the states came about, what an item is called.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::config::Normalization;
use super::sieve::{self, Passed, Sieve};
use crate::cpu::Cpu;
use crate::cpu::linear::{Linear, Output, Rows, Scores, WeightFormat};
use crate::cpu::vector::{dot, l2_normalize, layer_norm};
use crate::error::ModelError;

/// Items whose scores are computed together.
pub(super) const BLOCK: usize = 1024;
/// Scores that are compared with the threshold together.
pub(super) const CHUNK: usize = 32;

/// Normalises final states in place, `[rows, width]`.
pub(super) fn normalize(cpu: &Cpu, normalization: Normalization, states: &mut [f32], width: usize) {
    let isa = cpu.isa();
    for row in states.chunks_exact_mut(width) {
        match normalization {
            Normalization::L2 { eps } => l2_normalize(isa, row, eps as f32),
            Normalization::LayerNorm { eps } => {
                let x = row.to_vec();
                layer_norm(isa, &x, None, eps as f32, row);
            }
            Normalization::None {} => {}
        }
    }
}

/// An item and its score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Row of the item table: its id.
    pub item: u32,
    /// Inner product.
    pub score: f32,
}

impl Scored {
    /// Better first: by score, then by the smaller item.
    fn rank(&self, other: &Self) -> Ordering {
        other.score.total_cmp(&self.score).then(self.item.cmp(&other.item))
    }
}

/// What one user asks for.
#[derive(Clone, Copy)]
pub struct TopItems<'a> {
    /// How many.
    pub count: usize,
    /// Whether an item may be returned. Asked for few items only, and of those that would be.
    pub allowed: &'a (dyn Fn(u32) -> bool + Sync),
}

/// A user's vector, or its length, is not finite: nothing can be said of any item. Other users of the call are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the user's vector is not finite")]
pub struct UserNotFinite;

/// Items to retrieve from.
#[derive(Debug)]
pub struct ItemTable {
    blocks: Vec<Linear>,
    /// None where the items are in the sieve's own format.
    sieve: Option<Sieve>,
    width: usize,
    first: usize,
    items: usize,
}

impl ItemTable {
    /// Normalises and packs rows `[items, width]`, dividing each by its length or by `least` if that is more. Items before
    /// `first` are never returned.
    ///
    /// # Errors
    ///
    /// When a block cannot be packed.
    pub fn new(
        cpu: &Cpu,
        rows: &[f32],
        width: usize,
        least: f64,
        first: usize,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let items = rows.len() / width;
        let block = |rows: &[f32]| -> Result<(Linear, Option<sieve::Block>), ModelError> {
            let mut rows = rows.to_vec();
            normalize(cpu, Normalization::L2 { eps: least }, &mut rows, width);
            let count = rows.len() / width;
            let sieve = match format {
                WeightFormat::F32 => Some(sieve::Block::new(&rows, width)?),
                WeightFormat::Bf16 | WeightFormat::Q8_0 => None,
            };
            let rows = Tensor::from_vec(rows, (count, width), &Device::Cpu)?;
            Ok((Linear::pack(&[rows], None, format)?, sieve))
        };
        let blocks: Vec<_> = cpu.run(|| {
            rows[first.min(items) * width..].par_chunks(BLOCK * width).map(block).collect::<Result<_, _>>()
        })?;
        let (blocks, sieve): (Vec<_>, Vec<_>) = blocks.into_iter().unzip();
        let sieve = sieve.into_iter().collect::<Option<_>>().map(|blocks| Sieve::new(blocks, width));
        Ok(Self { blocks, sieve, width, first, items })
    }

    /// Rows of the table.
    pub fn items(&self) -> usize {
        self.items
    }

    /// Bytes of the packed table.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(Linear::bytes).sum::<usize>() + self.sieve.as_ref().map_or(0, Sieve::bytes)
    }

    /// The best items for users `[users, width]`, best first; fewer than asked for when no more are allowed.
    pub fn top(
        &self,
        cpu: &Cpu,
        users: &[f32],
        asked: &[TopItems<'_>],
    ) -> Vec<Result<Vec<Scored>, UserNotFinite>> {
        assert_eq!(users.len(), asked.len() * self.width, "a vector for every user");
        let none = || Search::new(asked.len());
        let found = match self.blocks.first() {
            None => none(),
            Some(block) => {
                let mut rows = Rows::default();
                rows.pack(cpu, users, self.width, block.format());
                let sieve = self.sieve.as_ref().filter(|sieve| sieve.pays(asked));
                let passed = sieve.and_then(|sieve| sieve.pass(cpu, users, self.first, asked));
                // Blocks are the tasks; each is multiplied on one thread.
                let alone = cpu.alone();
                let look = |mut search: Search, (index, block): (usize, &Linear)| {
                    let first = self.first + index * BLOCK;
                    match &passed {
                        None => search.look(&alone, block, &rows, first, asked),
                        Some(passed) => search.look_at(&alone, block, &rows, first, asked, passed, index),
                    }
                    search
                };
                let blocks = self.blocks.par_iter().enumerate();
                // The best of a set do not depend on the order in which they were found.
                cpu.run(|| blocks.fold(none, look).reduce(none, |a, b| a.merge(b, asked)))
            }
        };
        let answer = |(user, best): (&[f32], BinaryHeap<Worst>)| {
            // With a finite length no inner product with a unit vector overflows.
            let finite = dot(user, user).is_finite();
            let sorted = best.into_sorted_vec().into_iter().map(|Worst(scored)| scored).collect();
            if finite { Ok(sorted) } else { Err(UserNotFinite) }
        };
        users.chunks_exact(self.width).zip(found.best).map(answer).collect()
    }
}

/// Ordered so that the worst is the largest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Worst(pub(super) Scored);

impl Eq for Worst {}

impl PartialOrd for Worst {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Worst {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.rank(&other.0)
    }
}

/// The best items so far, for each user.
#[derive(Default)]
pub(super) struct Search {
    pub(super) best: Vec<BinaryHeap<Worst>>,
    scores: Vec<f32>,
    /// Scores of some panels.
    panels: Scores,
}

impl Search {
    pub(super) fn new(users: usize) -> Self {
        Self { best: vec![BinaryHeap::new(); users], ..Self::default() }
    }

    /// Looks at all items of a block.
    fn look(&mut self, cpu: &Cpu, block: &Linear, rows: &Rows, first: usize, asked: &[TopItems<'_>]) {
        let outputs = block.outputs();
        let mut scores = std::mem::take(&mut self.scores);
        scores.resize(rows.count() * outputs, 0.0);
        block.forward(cpu, rows, Output::Replace, &mut scores);
        self.offer_all(&scores, outputs, first, asked);
        self.scores = scores;
    }

    /// Offers the scores of a block, `[users, outputs]`.
    pub(super) fn offer_all(&mut self, scores: &[f32], outputs: usize, first: usize, asked: &[TopItems<'_>]) {
        for ((scores, asked), best) in scores.chunks_exact(outputs).zip(asked).zip(&mut self.best) {
            for (index, chunk) in scores.chunks(CHUNK).enumerate() {
                let least = if best.len() < asked.count {
                    f32::NEG_INFINITY
                } else {
                    best.peek().map_or(f32::INFINITY, |worst| worst.0.score)
                };
                // Most chunks hold nothing good enough; this comparison is vectorised.
                if chunk.iter().fold(false, |any, &score| any | (score >= least)) {
                    for (place, &score) in chunk.iter().enumerate() {
                        let item = (first + index * CHUNK + place) as u32;
                        // Zero is one number, not two.
                        offer(best, Scored { item, score: score + 0.0 }, asked);
                    }
                }
            }
        }
    }

    /// Looks at the items of a block that passed the sieve.
    fn look_at(
        &mut self,
        cpu: &Cpu,
        block: &Linear,
        rows: &Rows,
        first: usize,
        asked: &[TopItems<'_>],
        passed: &Passed,
        index: usize,
    ) {
        let outputs = block.outputs();
        self.panels.begin(false);
        let found = passed.places(index, outputs).fold(false, |_, place| {
            self.panels.want(place as u32);
            true
        });
        if !found {
            return;
        }
        block.score(cpu, rows, &mut self.panels);
        for (user, (asked, best)) in asked.iter().zip(&mut self.best).enumerate() {
            for place in passed.places(index, outputs) {
                let score = self.panels.logit(user, place as u32) + 0.0;
                offer(best, Scored { item: (first + place) as u32, score }, asked);
            }
        }
    }

    pub(super) fn merge(mut self, other: Self, asked: &[TopItems<'_>]) -> Self {
        for ((best, other), asked) in self.best.iter_mut().zip(other.best).zip(asked) {
            for Worst(scored) in other {
                keep(best, scored, asked.count);
            }
        }
        self
    }
}

fn offer(best: &mut BinaryHeap<Worst>, scored: Scored, asked: &TopItems<'_>) {
    let better = best.len() < asked.count || best.peek().is_some_and(|worst| scored.rank(&worst.0).is_lt());
    if better && (asked.allowed)(scored.item) {
        keep(best, scored, asked.count);
    }
}

fn keep(best: &mut BinaryHeap<Worst>, scored: Scored, count: usize) {
    best.push(Worst(scored));
    if best.len() > count {
        best.pop();
    }
}

/// The head of a model that retrieves items.
#[derive(Debug)]
pub struct Retrieval {
    pub(super) normalization: Normalization,
    pub(super) items: ItemTable,
}

impl Retrieval {
    /// Turns final states `[users, width]` into user vectors, in place.
    pub fn users(&self, cpu: &Cpu, states: &mut [f32]) {
        normalize(cpu, self.normalization, states, self.items.width);
    }

    /// The items.
    pub fn items(&self) -> &ItemTable {
        &self.items
    }
}

/// The head of a model that decodes tokens.
#[derive(Debug)]
pub struct TokenHead {
    pub(super) normalization: Normalization,
    /// The factor of the logits is in its weights.
    pub(super) head: Linear,
}

impl TokenHead {
    /// Scores the tokens that follow final states `[rows, width]`. `scores` says which are wanted; `rows` is scratch.
    pub fn score(&self, cpu: &Cpu, states: &[f32], rows: &mut Rows, scores: &mut Scores) {
        self.pack(cpu, states, rows);
        self.head.score(cpu, rows, scores);
    }

    /// Logits of all tokens, `[rows, vocabulary]`.
    pub fn logits(&self, cpu: &Cpu, states: &[f32]) -> Vec<f32> {
        let mut rows = Rows::default();
        self.pack(cpu, states, &mut rows);
        let mut out = vec![0.0; rows.count() * self.head.outputs()];
        self.head.forward(cpu, &rows, Output::Replace, &mut out);
        out
    }

    /// Tokens of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.head.outputs()
    }

    fn pack(&self, cpu: &Cpu, states: &[f32], rows: &mut Rows) {
        let width = self.head.inputs();
        match self.normalization {
            Normalization::None {} => rows.pack(cpu, states, width, self.head.format()),
            other => {
                let mut states = states.to_vec();
                normalize(cpu, other, &mut states, width);
                rows.pack(cpu, &states, width, self.head.format());
            }
        }
    }
}
