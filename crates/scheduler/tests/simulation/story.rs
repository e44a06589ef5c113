//! What one simulated request is, and what must come of it: a function of the request alone.
//!
//! Page contents are numbers. The number at a context position stands for everything that its keys
//! and values would depend on, so a page that is stale, wrongly shared or overwritten holds a wrong
//! number.

use std::sync::Arc;

use beamline_kv_cache::ReuseClass;
use beamline_model::step::ContextShape;

use crate::rng::mix;

/// The payload of a simulated request.
#[derive(Clone, Debug)]
pub(crate) struct Story {
    /// The id of the request, for what belongs to this request only.
    pub(crate) id: u64,
    /// Which namespace.
    pub(crate) tenant: u64,
    pub(crate) words: Arc<[u32]>,
    pub(crate) context_len: usize,
    pub(crate) reuse: ReuseClass,
    /// The model refuses a part of a context of shape `Whole`.
    pub(crate) shape: ContextShape,
    pub(crate) beam_width: usize,
    pub(crate) beam_widths: Option<Arc<[usize]>>,
    pub(crate) min_beam_width: usize,
    pub(crate) generated_steps: usize,
    /// The model answers already at this expansion, when it comes before the last.
    pub(crate) finishes_at: usize,
    pub(crate) fault: Fault,
}

/// What the model does at this request, always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Fails the request, at this expansion (0: at the first chunk).
    Fails(usize),
    /// Fails the whole step.
    Poison(usize),
    /// Answers something that means nothing.
    Babbles(usize),
}

/// What must come of a request that nothing from outside ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Answer(u64),
    Warmed,
    Fails,
    Poison,
    Babbles,
}

impl Story {
    pub(crate) fn is_warm(&self) -> bool {
        self.generated_steps == 0
    }

    /// Leading positions that another request may use.
    pub(crate) fn reusable_positions(&self) -> usize {
        match self.reuse {
            // All, or none: the contents of every position depend on the whole context.
            ReuseClass::Exact => self.context_len,
            reuse => reuse.reusable_positions(self.context_len),
        }
    }

    /// Those of them in pages that another request can find.
    pub(crate) fn findable_positions(&self, page_size: usize) -> usize {
        match self.reuse {
            ReuseClass::Exact => self.context_len,
            _ => self.reusable_positions() / page_size * page_size,
        }
    }

    /// What has to lie at every context position.
    pub(crate) fn contents(&self, out: &mut Vec<u64>) {
        out.clear();
        let words_per_position = self.words.len() / self.context_len;
        let shared = self.reusable_positions();
        let exact = self.reuse == ReuseClass::Exact;
        let whole = self.words.iter().fold(mix(self.tenant, 0xe5ac7), |sum, word| mix(sum, u64::from(*word)));
        let mut chain = mix(self.tenant, 0x7e4a47);
        for (position, words) in self.words.chunks(words_per_position).enumerate() {
            chain = words.iter().fold(chain, |chain, word| mix(chain, u64::from(*word)));
            // What may not be reused is different in every request, so that reusing it shows.
            let content = match position < shared {
                true if exact => mix(chain, whole),
                true => chain,
                false => mix(chain, mix(self.id, 1)),
            };
            out.push(content);
        }
    }

    /// Beams alive after expansion number `expansion` (from 1) of a beam of `width`.
    pub(crate) fn rows_after(&self, expansion: usize, width: usize) -> usize {
        let width = width.min(self.width_at(expansion - 1));
        let dice = mix(mix(self.id, 2), expansion as u64);
        if dice.is_multiple_of(4) { 1 + (dice >> 8) as usize % width } else { width }
    }

    /// Beams asked for of expansion number `expansion` (from 0).
    fn width_at(&self, expansion: usize) -> usize {
        self.beam_widths.as_ref().map_or(self.beam_width, |widths| widths[expansion])
    }

    /// The first of the branch rows of a step: behind those that the steps before it may have had.
    pub(crate) fn first_row(&self, step: usize) -> usize {
        (0..step).map(|step| self.width_at(step)).sum()
    }

    /// What lies in a branch row.
    pub(crate) fn branch_row(&self, step: usize, beam: usize) -> u64 {
        mix(mix(self.id, 3), mix(step as u64, beam as u64))
    }

    /// Whether expansion number `expansion` (from 1) answers.
    pub(crate) fn is_last(&self, expansion: usize) -> bool {
        expansion == self.generated_steps || expansion == self.finishes_at
    }

    /// The beginning of an answer: what was read at the last context position, and the width.
    pub(crate) fn first_digest(last_content: u64, width: usize) -> u64 {
        mix(last_content, width as u64)
    }

    /// What must come of it, over a beam of `width`.
    pub(crate) fn fate(&self, width: usize) -> Fate {
        if let Some(fate) = self.fault_at(0) {
            return fate;
        }
        if self.is_warm() {
            return Fate::Warmed;
        }
        let mut contents = Vec::new();
        self.contents(&mut contents);
        let mut digest = Self::first_digest(contents[self.context_len - 1], width);
        for expansion in 1.. {
            if let Some(fate) = self.fault_at(expansion) {
                return fate;
            }
            if self.is_last(expansion) {
                break;
            }
            for beam in 0..self.rows_after(expansion, width) {
                digest = mix(digest, self.branch_row(expansion - 1, beam));
            }
        }
        Fate::Answer(digest)
    }

    fn fault_at(&self, expansion: usize) -> Option<Fate> {
        match self.fault {
            Fault::Fails(at) if at == expansion => Some(Fate::Fails),
            Fault::Poison(at) if at == expansion => Some(Fate::Poison),
            Fault::Babbles(at) if at == expansion => Some(Fate::Babbles),
            _ => None,
        }
    }
}
