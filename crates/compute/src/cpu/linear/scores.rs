//! The logits of a step that are wanted, and the normalisers of all its rows.
//!
//! Of a row's logits only some panels are kept: those with tokens that can follow. The others only go
//! into the normaliser, `ln(sum of e^logit)` over the whole vocabulary: `[rows, vocabulary]` never
//! exists.
//!
//! Each panel of a row leaves its largest logit and the sum of exponentials relative to it. They are
//! merged from the first to the last panel, whichever thread computed them.

use crate::cpu::isa::{Isa, per_isa};
use crate::cpu::tile::{PANEL, SharedMatrix};
use crate::cpu::vector::{LANES, exp, fold_lanes, larger};

/// Wanted logits and normalisers; the memory is reused from step to step.
#[derive(Debug, Default)]
pub struct Scores {
    outputs: usize,
    normalized: bool,
    /// Panels to keep, ascending once a product begins.
    kept: Vec<u32>,
    /// Per panel, its place among the kept ones.
    place: Vec<Option<u32>>,
    /// Kept logits, `[row][kept panel][PANEL]`.
    logits: Vec<f32>,
    /// `[row][panel]`, the largest logit.
    maxima: Vec<f32>,
    /// `[row][panel]`, the sum of e^(logit - largest); not finite if a logit is not.
    totals: Vec<f32>,
}

impl Scores {
    /// Begins anew, with nothing wanted. With `normalized`, normalisers are computed.
    pub fn begin(&mut self, normalized: bool) {
        self.normalized = normalized;
        self.kept.clear();
        self.place.clear();
    }

    /// Wants the logit of a token.
    #[inline]
    pub fn want(&mut self, token: u32) {
        let panel = token as usize / PANEL;
        if self.place.len() <= panel {
            self.place.resize(panel + 1, None);
        }
        if self.place[panel].is_none() {
            self.place[panel] = Some(0);
            self.kept.push(panel as u32);
        }
    }

    /// Values kept per row.
    pub fn width(&self) -> usize {
        self.kept.len() * PANEL
    }

    /// Makes room for a product.
    pub(super) fn reset(&mut self, rows: usize, outputs: usize) {
        self.outputs = outputs;
        self.place.resize(outputs.div_ceil(PANEL), None);
        self.kept.sort_unstable();
        for (place, panel) in self.kept.iter().enumerate() {
            self.place[*panel as usize] = Some(place as u32);
        }
        self.logits.resize(rows * self.width(), 0.0);
        let parts = if self.normalized { rows * self.place.len() } else { 0 };
        self.maxima.resize(parts, 0.0);
        self.totals.resize(parts, 0.0);
    }

    pub(super) fn target(&mut self) -> Target<'_> {
        let (width, panels) = (self.width(), self.place.len());
        Target {
            kept: &self.kept,
            place: &self.place,
            outputs: self.outputs,
            logits: SharedMatrix::new(&mut self.logits, width),
            maxima: SharedMatrix::new(&mut self.maxima, panels),
            totals: SharedMatrix::new(&mut self.totals, panels),
            normalized: self.normalized,
        }
    }

    /// The logit of a wanted token.
    #[inline]
    pub fn logit(&self, row: usize, token: u32) -> f32 {
        let (panel, column) = (token as usize / PANEL, token as usize % PANEL);
        let Some(place) = self.place[panel] else {
            unreachable!("token {token} is wanted before it is read")
        };
        self.logits[(row * self.kept.len() + place as usize) * PANEL + column]
    }

    /// `ln(sum of e^logit)` over all logits of a row, summed in double precision; not finite if any
    /// logit is not finite. `None` unless normalisers were asked for.
    pub fn normalizer(&self, isa: Isa, row: usize) -> Option<f64> {
        let panels = self.place.len();
        self.normalized.then(|| {
            let mut out = 0.0;
            merge(
                isa,
                &self.maxima[row * panels..][..panels],
                &self.totals[row * panels..][..panels],
                &mut out,
            );
            out
        })
    }
}

/// Where the kernels write scores.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    /// Panels whose logits are kept.
    pub(super) kept: &'a [u32],
    place: &'a [Option<u32>],
    outputs: usize,
    logits: SharedMatrix<'a>,
    maxima: SharedMatrix<'a>,
    totals: SharedMatrix<'a>,
    /// Whether all panels are summed up.
    pub(super) normalized: bool,
}

impl Target<'_> {
    /// Takes the logits of one row and panel. The calls that share a target must be for different rows
    /// or panels.
    #[inline(always)]
    pub(super) fn store(&self, row: usize, panel: usize, sums: &[f32; PANEL]) {
        if let Some(place) = self.place[panel] {
            // SAFETY: one call stores this row and panel.
            unsafe { self.logits.row_segment(row, place as usize * PANEL, PANEL) }.copy_from_slice(sums);
        }
        if !self.normalized {
            return;
        }
        let exist = self.outputs - panel * PANEL;
        let (largest, total) = if exist >= PANEL {
            summarise(sums, sums)
        } else {
            // What does not exist weighs nothing.
            let mut logits = *sums;
            logits[exist..].fill(f32::NEG_INFINITY);
            summarise(&logits, sums)
        };
        // SAFETY: as above.
        unsafe { self.maxima.row_segment(row, panel, 1) }.fill(largest);
        // SAFETY: as above.
        unsafe { self.totals.row_segment(row, panel, 1) }.fill(total);
    }
}

/// The largest logit, and the sum of exponentials relative to it; NaN if one of the sums is not finite.
#[inline(always)]
fn summarise(logits: &[f32; PANEL], sums: &[f32; PANEL]) -> (f32, f32) {
    let halves = logits.as_chunks::<LANES>().0;
    let mut largest = [f32::NEG_INFINITY; LANES];
    for half in halves {
        for lane in 0..LANES {
            largest[lane] = larger(half[lane], largest[lane]);
        }
    }
    // All lanes take part in each step, and all are used, so that the compiler makes it a shuffle and
    // one instruction.
    for distance in [8, 4, 2, 1] {
        let others: [f32; LANES] = std::array::from_fn(|lane| largest[lane ^ distance]);
        for lane in 0..LANES {
            largest[lane] = larger(largest[lane], others[lane]);
        }
    }
    // A NaN would be lost in a maximum and -infinity in an exponential; zero times them is not lost in a sum.
    let mut total = [0.0f32; LANES];
    for (half, sums) in halves.iter().zip(sums.as_chunks::<LANES>().0) {
        for lane in 0..LANES {
            total[lane] += sums[lane].mul_add(0.0, exp(half[lane] - largest[lane]));
        }
    }
    (largest[0], fold_lanes(total, |a, b| a + b))
}

per_isa! {
    /// Merges the parts of a row.
    fn merge(maxima: &[f32], totals: &[f32], out: &mut f64) = merge_body
}

#[inline(always)]
fn merge_body<const R: usize>(maxima: &[f32], totals: &[f32], out: &mut f64) {
    let largest = maxima.iter().fold(f32::NEG_INFINITY, |largest, &max| larger(max, largest));
    let mut sums = [0.0f64; LANES];
    let (full_maxima, rest_maxima) = maxima.as_chunks::<LANES>();
    let (full_totals, rest_totals) = totals.as_chunks::<LANES>();
    for (maxima, totals) in full_maxima.iter().zip(full_totals) {
        for lane in 0..LANES {
            sums[lane] += f64::from(totals[lane]) * f64::from(exp(maxima[lane] - largest));
        }
    }
    for (max, total) in rest_maxima.iter().zip(rest_totals) {
        sums[0] += f64::from(*total) * f64::from(exp(max - largest));
    }
    *out = f64::from(largest) + sums.into_iter().sum::<f64>().ln();
}
