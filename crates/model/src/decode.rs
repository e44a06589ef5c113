//! Exact beam search over the semantic IDs of a catalog.
//!
//! Place in the flow: the executor computes logits; a [`Search`] turns them into the beams of the next
//! step, and at the end into leaves of the trie. It is independent of how logits come about, so it runs
//! on tables as well.
//!
//! A *path* is what is generated: the steps of the convention ([`Step`]). Each is a level of the SID, or
//! a token that is always the same, such as an end token. After a prefix, exactly those tokens are
//! allowed that lead to a leaf the filter allows; the filter therefore never costs a place in the beam.
//! Every beam is expanded by all its allowed tokens. Then the best `width` candidates of all beams
//! survive: the same number after every step, or one for each.
//!
//! The score of a path is the sum over its tokens of the log-probability under the declared
//! [`Normalization`], in double precision. Higher scores come first; equal scores are ordered by the
//! smaller token path, which is the order of nodes within a level because symbols of the trie are token
//! ids.

use std::cmp::Ordering;
use std::ops::Range;
use std::sync::Arc;

use beamline_catalog::{Catalog, Filter, Leaf, Node};

use beamline_compute::cpu::isa::Isa;
use beamline_compute::cpu::vector::log_sum_exp;

/// One generated token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The next level of the SID.
    Level,
    /// Always this token; its probability counts.
    Fixed(u32),
    /// Always this token. The request gave it, so its probability does not count.
    Given(u32),
}

/// What the probability of a token is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Normalization {
    /// Softmax over every row of the output matrix, padding rows included. Hugging Face with a logits
    /// processor and vLLM compute the same.
    FullVocab,
    /// Softmax over the allowed tokens only.
    AllowedSet,
}

/// What to search for.
#[derive(Clone, Debug)]
pub struct SearchRequest {
    /// The snapshot whose leaves are searched.
    pub catalog: Arc<Catalog>,
    /// Which of them are allowed.
    pub filter: Filter,
    /// Where the search begins: the root, or the node of a forced SID prefix. The tokens of the prefix
    /// are part of the context and not of the score.
    pub start: Node,
    /// What is generated from there on.
    pub steps: Arc<[Step]>,
    /// How tokens are scored.
    pub normalization: Normalization,
    /// For [`Normalization::AllowedSet`]: the leaves that count as allowed, where the search covers only
    /// some of them. Given candidates are scored this way; none of them affects another's score.
    pub normalize_over: Option<Box<Filter>>,
    /// How many beams survive each step, where that differs; see [`Search::new`].
    pub widths: Option<Arc<[usize]>>,
}

/// A search in progress.
#[derive(Debug)]
pub struct Search {
    request: SearchRequest,
    width: usize,
    step: usize,
    beams: Vec<Beam>,
    candidates: Vec<Candidate>,
    /// `step - 1` ancestors for each beam, oldest first, as rows of earlier steps.
    lineage: Vec<u32>,
    next_lineage: Vec<u32>,
    /// Allowed continuations of the row at hand, reused.
    allowed: Vec<(u32, Node)>,
    /// As many candidates as survive are at least this good: worse ones need not be kept.
    cutoff: f64,
    /// Leading beams that were offered in an earlier part of this step.
    offered: usize,
}

/// One hypothesis of a search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Beam {
    /// What it has spelled of a SID.
    pub node: Node,
    /// Its last token.
    pub token: u32,
    /// Sum of log-probabilities.
    pub score: f64,
}

/// A finished path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hypothesis {
    /// Leaf of the SID.
    pub leaf: Leaf,
    /// Sum of log-probabilities over all generated tokens.
    pub score: f64,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    beam: Beam,
    parent: u32,
}

/// A row of logits holds a value that is not a number or not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model produced logits that are not finite")]
pub struct NotFinite;

impl Search {
    /// Begins a search of at most `width` beams, and after no step of more than the request says.
    pub fn new(request: SearchRequest, width: usize) -> Self {
        let widths = request.widths.as_deref().unwrap_or_default();
        assert!(width > 0 && !widths.contains(&0), "a beam has a width");
        assert!(request.widths.is_none() || widths.len() == request.steps.len(), "a width for every step");
        let root = Beam { node: request.start, token: 0, score: 0.0 };
        let any = request.filter.allows_any(request.catalog.trie().leaves(request.start));
        Self {
            request,
            width,
            step: 0,
            beams: if any { vec![root] } else { Vec::new() },
            candidates: Vec::new(),
            lineage: Vec::new(),
            next_lineage: Vec::new(),
            allowed: Vec::new(),
            cutoff: f64::NEG_INFINITY,
            offered: 0,
        }
    }

    /// The beams alive, best first. Each wants one row of logits, unless the search [is over](Self::is_over).
    pub fn beams(&self) -> &[Beam] {
        &self.beams
    }

    /// Leading beams that were offered already, when the step is taken in parts.
    pub fn offered(&self) -> usize {
        self.offered
    }

    /// Whether a part of the beams was offered, and others are to be.
    pub fn is_partly_offered(&self) -> bool {
        self.offered > 0
    }

    /// Number of steps done.
    pub fn steps_done(&self) -> usize {
        self.step
    }

    /// How tokens are scored.
    pub fn normalization(&self) -> Normalization {
        self.request.normalization
    }

    /// Most beams that survive a step.
    pub fn width_at(&self, step: usize) -> usize {
        self.request.widths.as_ref().map_or(self.width, |widths| self.width.min(widths[step]))
    }

    /// Branch rows of the steps before the one that takes the beams of a step further: the most that
    /// there may have been.
    pub fn rows_before(&self, step: usize) -> usize {
        match &self.request.widths {
            None => step * self.width,
            Some(_) => (0..step).map(|step| self.width_at(step)).sum(),
        }
    }

    /// For each beam, the rows of its ancestors in the branch steps so far, oldest first. A row of step
    /// `s` is numbered by its place in the beam of that step.
    pub fn lineage(&self, beam: usize) -> &[u32] {
        let ancestors = self.step.saturating_sub(1);
        &self.lineage[beam * ancestors..][..ancestors]
    }

    /// Whether nothing is left to generate.
    pub fn is_over(&self) -> bool {
        self.step == self.request.steps.len() || self.beams.is_empty()
    }

    /// Calls `want` with every token whose logit [`Search::offer_normalized`] will look at for these
    /// beams. A token may come more than once.
    pub fn wanted(&self, beams: Range<usize>, mut want: impl FnMut(u32)) {
        match self.request.steps[self.step] {
            Step::Fixed(token) | Step::Given(token) => want(token),
            Step::Level => {
                let trie = self.request.catalog.trie();
                for beam in &self.beams[beams] {
                    trie.children(beam.node).iter().for_each(|(token, _)| want(token));
                }
            }
        }
    }

    /// Adds the continuations of one beam, given the logits that predict its next token, `[vocab_size]`.
    /// Every beam is offered once per step, in any order.
    ///
    /// # Errors
    ///
    /// When the logits are not finite.
    pub fn offer(&mut self, isa: Isa, beam: usize, logits: &[f32]) -> Result<(), NotFinite> {
        let full = match self.request.normalization {
            Normalization::FullVocab => {
                let mut lse = 0.0;
                log_sum_exp(isa, logits, &mut lse);
                Some(lse)
            }
            Normalization::AllowedSet => None,
        };
        self.offer_normalized(beam, |token| logits[token as usize], full)
    }

    /// As [`Search::offer`], given the logits of the [`wanted`](Search::wanted) tokens and, for
    /// `full_vocab` only, the log-sum-exp of all logits.
    ///
    /// # Errors
    ///
    /// When the log-sum-exp or a used logit is not finite.
    pub fn offer_normalized(
        &mut self,
        beam: usize,
        logit: impl Fn(u32) -> f32,
        full: Option<f64>,
    ) -> Result<(), NotFinite> {
        let Beam { node, score, .. } = self.beams[beam];
        let trie = self.request.catalog.trie();
        let filter = &self.request.filter;
        // Allowed and searched leaves are the same, except when candidates are given.
        let (allowed, searched) = match &self.request.normalize_over {
            Some(over) if full.is_none() => (&**over, Some(filter)),
            _ => (filter, None),
        };
        let leads_to = |filter: &Filter, child: Node| filter.allows_any(trie.leaves(child));
        self.allowed.clear();
        match self.request.steps[self.step] {
            Step::Fixed(token) | Step::Given(token) => self.allowed.push((token, node)),
            Step::Level => {
                let children = trie.children(node).iter();
                self.allowed.extend(children.filter(|&(_, child)| leads_to(allowed, child)));
            }
        }
        let normalizer =
            full.unwrap_or_else(|| log_sum_exp_of(self.allowed.iter().map(|&(token, _)| logit(token))));
        if let Some(filter) = searched {
            self.allowed.retain(|&(_, child)| leads_to(filter, child));
        }
        if !normalizer.is_finite() {
            return Err(NotFinite);
        }
        let counts = !matches!(self.request.steps[self.step], Step::Given(_));
        for &(token, node) in &self.allowed {
            let own = if counts { f64::from(logit(token)) - normalizer } else { 0.0 };
            let score = score + own;
            // At equal score the smaller path wins, so an equal one is kept.
            if score >= self.cutoff {
                self.candidates.push(Candidate { beam: Beam { node, token, score }, parent: beam as u32 });
            }
        }
        // Keeps memory bounded by the width when beams have many children each.
        let width = self.width_at(self.step);
        if self.candidates.len() >= (8 * width).max(4096) {
            keep_best(&mut self.candidates, width);
            self.cutoff = self.candidates[width - 1].beam.score;
        }
        Ok(())
    }

    /// How many of the beams, from the best on, are worth offering, given those offered so far: no
    /// continuation of the others can survive. A log-probability is never above zero, not even in
    /// floating point. The normaliser is the largest logit plus the logarithm of a sum that is at least
    /// one.
    pub fn worthwhile(&mut self) -> usize {
        let width = self.width_at(self.step);
        if self.candidates.len() < width {
            return self.beams.len();
        }
        keep_best(&mut self.candidates, width);
        self.cutoff = self.candidates[width - 1].beam.score;
        // At equal score the smaller path wins, so an equal one is worth it.
        self.beams.partition_point(|beam| beam.score >= self.cutoff)
    }

    /// Ends a part of the step: the first beams were offered, others are to be.
    pub fn pause(&mut self, offered: usize) {
        assert!(self.offered < offered && offered < self.beams.len(), "a part leaves another");
        self.offered = offered;
    }

    /// Ends the step: the best candidates become the beams.
    pub fn advance(&mut self) {
        self.offered = 0;
        let width = self.width_at(self.step);
        keep_best(&mut self.candidates, width);
        self.cutoff = f64::NEG_INFINITY;
        self.candidates.sort_unstable_by(order);
        let ancestors = self.step.saturating_sub(1);
        self.next_lineage.clear();
        for candidate in &self.candidates {
            let parent = candidate.parent as usize;
            self.next_lineage.extend_from_slice(&self.lineage[parent * ancestors..][..ancestors]);
            // The first expansion comes from the context, which is nobody's branch row.
            if self.step > 0 {
                self.next_lineage.push(candidate.parent);
            }
        }
        std::mem::swap(&mut self.lineage, &mut self.next_lineage);
        self.beams.clear();
        self.beams.extend(self.candidates.drain(..).map(|candidate| candidate.beam));
        self.step += 1;
    }

    /// The finished paths, best first. Empty while the search is not over.
    pub fn hypotheses(&self) -> Vec<Hypothesis> {
        let finished = self.step == self.request.steps.len();
        let trie = self.request.catalog.trie();
        let leaf = |beam: &Beam| Some(Hypothesis { leaf: trie.leaf(beam.node)?, score: beam.score });
        self.beams.iter().filter(|_| finished).filter_map(leaf).collect()
    }
}

/// Steps that generate a SID from `node_level` on: the rest of the convention's steps after a forced
/// prefix.
pub fn steps_from(steps: &[Step], node_level: usize) -> Option<Range<usize>> {
    if node_level == 0 {
        return Some(0..steps.len());
    }
    let last_forced =
        steps.iter().enumerate().filter(|(_, step)| **step == Step::Level).nth(node_level - 1)?.0;
    Some(last_forced + 1..steps.len())
}

/// Better candidates first: the higher score, then the smaller path.
fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.beam.score.total_cmp(&a.beam.score).then_with(|| a.beam.node.cmp(&b.beam.node))
}

/// Keeps the `width` best candidates, if there are as many the worst of them last, without sorting.
fn keep_best(candidates: &mut Vec<Candidate>, width: usize) {
    if candidates.len() >= width {
        candidates.select_nth_unstable_by(width - 1, order);
        candidates.truncate(width);
    }
}

/// `ln(sum of e^x)` over few values, in double precision and in the given order.
fn log_sum_exp_of(logits: impl Iterator<Item = f32> + Clone) -> f64 {
    let max = logits.clone().fold(f32::NEG_INFINITY, |max, x| if x > max || x.is_nan() { x } else { max });
    f64::from(max) + logits.map(|x| f64::from(x - max).exp()).sum::<f64>().ln()
}
