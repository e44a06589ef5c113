//! From final states to what is asked of the research variant: the best items, or logits of tokens.
//!
//! Retrieval is exact: the inner product of the user's vector with every item's, each of unit length,
//! and the best of those that a filter allows. The items are packed once, at load, into blocks. A
//! block's scores are looked through as soon as they are there, so at most one block of them exists per
//! thread. Reading all items from memory is most of the work for one user. So where few items are asked
//! for, a [`Sieve`] first says which panels of items can matter. Ties go to the smaller item. "Exact" is
//! with respect to the weight format: bf16 and q8_0 round the items and the user.
//!
//! What must not be here: how the states came about, what an item is called.

use std::cell::RefCell;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::linear::{Linear, Output, Rows, Scores, WeightFormat};
use beamline_compute::cpu::parallel::at_least;
use beamline_compute::cpu::vector::{dot, l2_normalize, layer_norm};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::best::Best;
use super::config::Normalization;
use super::sieve::{self, Passed, Sieve};
use crate::error::ModelError;

/// Items whose scores are computed together.
pub(super) const BLOCK: usize = 1024;

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
    /// Inner product with the user's vector.
    pub score: f32,
}

/// What one user asks for.
#[derive(Clone, Copy)]
pub struct TopItems<'a> {
    /// Number of items to return.
    pub count: usize,
    /// Whether an item may be returned. Asked for few items only, and of those that would be.
    pub allowed: &'a (dyn Fn(u32) -> bool + Sync),
}

/// A user's vector, or its length, is not finite, so no item can be scored. Other users of the call are
/// answered.
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
    /// Normalises and packs rows `[items, width]`, dividing each by its length or by `least` if that is
    /// more. Items before `first` are never returned.
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
        let best = Best::new(asked);
        if let Some(block) = self.blocks.first() {
            let mut rows = Rows::default();
            rows.pack(cpu, users, self.width, block.format());
            let sieve = self.sieve.as_ref().filter(|sieve| sieve.pays(asked));
            let passed = sieve.and_then(|sieve| sieve.pass(cpu, users, self.first, asked));
            // Blocks are the tasks; each is multiplied on one thread.
            let alone = cpu.alone();
            cpu.each(self.blocks.len(), 1, |index| {
                let (block, first) = (&self.blocks[index], self.first + index * BLOCK);
                SCRATCH.with_borrow_mut(|scratch| match &passed {
                    None => scratch.look(&alone, block, &rows, first, &best),
                    Some(passed) => scratch.look_at(&alone, block, &rows, first, &best, passed, index),
                });
            });
        }
        let answer = |(user, found): (&[f32], Vec<Scored>)| {
            // With a finite length no inner product with a unit vector overflows.
            if dot(user, user).is_finite() { Ok(found) } else { Err(UserNotFinite) }
        };
        users.chunks_exact(self.width).zip(best.into_sorted()).map(answer).collect()
    }
}

/// What a thread needs to look at a block.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    /// Scores of some panels.
    panels: Scores,
}

thread_local! {
    /// Reused by all blocks of a thread.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Scratch {
    /// Looks at all items of a block.
    fn look(&mut self, cpu: &Cpu, block: &Linear, rows: &Rows, first: usize, best: &Best<'_>) {
        let scores = at_least(&mut self.scores, rows.count() * block.outputs());
        block.forward(cpu, rows, Output::Replace, scores);
        for (user, scores) in scores.chunks_exact(block.outputs()).enumerate() {
            best.offer(user, first, scores, 0.0);
        }
    }

    /// Looks at the items of a block that passed the sieve.
    fn look_at(
        &mut self,
        cpu: &Cpu,
        block: &Linear,
        rows: &Rows,
        first: usize,
        best: &Best<'_>,
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
        for user in 0..rows.count() {
            for place in passed.places(index, outputs) {
                best.offer_one(user, first + place, self.panels.logit(user, place as u32));
            }
        }
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

    /// Table of the items.
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
    /// Scores the tokens that follow final states `[rows, width]`. `scores` says which tokens are
    /// wanted; `rows` is scratch.
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
