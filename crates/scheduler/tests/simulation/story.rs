//! One simulated request and its expected result, which is a function of the request alone.
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
    /// The request's id, from which contents that belong only to this request are derived.
    pub(crate) id: u64,
    /// Number of the tenant, and so of the namespace.
    pub(crate) tenant: u64,
    pub(crate) words: Arc<[u32]>,
    pub(crate) context_len: usize,
    pub(crate) reuse: ReuseClass,
    /// With shape `Whole`, the model refuses a part of the context.
    pub(crate) shape: ContextShape,
    pub(crate) beam_width: usize,
    pub(crate) beam_widths: Option<Arc<[usize]>>,
    pub(crate) min_beam_width: usize,
    pub(crate) generated_steps: usize,
    /// The expansion at which the model already answers, when it comes before the last.
    pub(crate) finishes_at: usize,
    pub(crate) fault: Fault,
}

/// How the model always behaves for this request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Fails the request at this expansion (0: at the first chunk).
    Fails(usize),
    /// Fails the whole step.
    Poison(usize),
    /// Answers with an outcome that does not fit.
    Babbles(usize),
}

/// The expected end of a request that nothing from outside ends.
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

    /// Number of leading positions that another request may use.
    pub(crate) fn reusable_positions(&self) -> usize {
        match self.reuse {
            // All or none: the contents of every position depend on the whole context.
            ReuseClass::Exact => self.context_len,
            reuse => reuse.reusable_positions(self.context_len),
        }
    }

    /// How many of these lie in pages that another request can find.
    pub(crate) fn findable_positions(&self, page_size: usize) -> usize {
        match self.reuse {
            ReuseClass::Exact => self.context_len,
            _ => self.reusable_positions() / page_size * page_size,
        }
    }

    /// Appends the expected content of every context position.
    pub(crate) fn contents(&self, out: &mut Vec<u64>) {
        out.clear();
        let words_per_position = self.words.len() / self.context_len;
        let shared = self.reusable_positions();
        let exact = self.reuse == ReuseClass::Exact;
        let whole = self.words.iter().fold(mix(self.tenant, 0xe5ac7), |sum, word| mix(sum, u64::from(*word)));
        let mut chain = mix(self.tenant, 0x7e4a47);
        for (position, words) in self.words.chunks(words_per_position).enumerate() {
            chain = words.iter().fold(chain, |chain, word| mix(chain, u64::from(*word)));
            // Contents that may not be reused differ in every request, so that a reuse shows.
            let content = match position < shared {
                true if exact => mix(chain, whole),
                true => chain,
                false => mix(chain, mix(self.id, 1)),
            };
            out.push(content);
        }
    }

    /// Number of beams alive after expansion `expansion` (from 1) of a beam of `width`.
    pub(crate) fn rows_after(&self, expansion: usize, width: usize) -> usize {
        let width = width.min(self.width_at(expansion - 1));
        let dice = mix(mix(self.id, 2), expansion as u64);
        if dice.is_multiple_of(4) { 1 + (dice >> 8) as usize % width } else { width }
    }

    /// Number of beams requested for expansion `expansion` (from 0).
    fn width_at(&self, expansion: usize) -> usize {
        self.beam_widths.as_ref().map_or(self.beam_width, |widths| widths[expansion])
    }

    /// The first branch row of a step, behind those that the steps before it may have had.
    pub(crate) fn first_row(&self, step: usize) -> usize {
        (0..step).map(|step| self.width_at(step)).sum()
    }

    /// The expected content of a branch row.
    pub(crate) fn branch_row(&self, step: usize, beam: usize) -> u64 {
        mix(mix(self.id, 3), mix(step as u64, beam as u64))
    }

    /// Whether expansion `expansion` (from 1) is the last.
    pub(crate) fn is_last(&self, expansion: usize) -> bool {
        expansion == self.generated_steps || expansion == self.finishes_at
    }

    /// The start of an answer's digest: the last context position's content, and the width.
    pub(crate) fn first_digest(last_content: u64, width: usize) -> u64 {
        mix(last_content, width as u64)
    }

    /// The expected end of the request over a beam of `width`.
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
