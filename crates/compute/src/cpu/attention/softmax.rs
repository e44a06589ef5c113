//! Softmax over keys that come a page at a time: running maxima, sums, and weighted values.
//!
//! For every query, with `m` the largest logit so far:
//!
//! ```text
//! totals   sum of e^(logit - m), lane by lane: key `i` of a page goes to lane `i % LANES`
//! sums     sum of e^(logit - m) * value
//! ```
//!
//! When a larger logit comes, both are multiplied by `e^(old m - new m)`. Where none comes that factor
//! is exactly one, and the multiplication is left out.

use crate::cpu::isa::{Isa, per_isa};
use crate::cpu::pages::PAGE_SIZE;
use crate::cpu::tile::MOST_ROWS;
use crate::cpu::vector::{LANES, exp_or_zero, fold_lanes, larger};

/// The state of some queries.
#[derive(Default)]
pub(super) struct Softmax {
    /// `[query]`, the largest logit so far.
    maxima: Vec<f32>,
    /// Sum of the weights of each `[query]`.
    totals: Vec<[f32; LANES]>,
    /// Weighted sums of values, `[query][width]`.
    sums: Vec<f32>,
    /// Width of a value, padding included.
    width: usize,
}

impl Softmax {
    /// Begins anew: no query has seen a key.
    pub(super) fn begin(&mut self, queries: usize, width: usize) {
        self.width = width;
        self.maxima.clear();
        self.maxima.resize(queries, f32::NEG_INFINITY);
        self.totals.clear();
        self.totals.resize(queries, [0.0; LANES]);
        self.sums.clear();
        self.sums.resize(queries * width, 0.0);
    }

    /// Queries there are.
    pub(super) fn queries(&self) -> usize {
        self.maxima.len()
    }

    /// Weighted values of the queries from one on, `[query][width]`.
    pub(super) fn sums_from(&mut self, query: usize) -> &mut [f32] {
        &mut self.sums[query * self.width..]
    }

    /// Weighted values of a query.
    #[inline(always)]
    pub(super) fn sums_mut(&mut self, query: usize) -> &mut [f32] {
        &mut self.sums[query * self.width..][..self.width]
    }

    /// Turns the logits of queries from `first` on into weights, e^(logit - maximum), and brings their
    /// state to the new maximum; at most [`MOST_ROWS`] of them. Each sees as many keys as `visible`
    /// says, and none sees more than the last. What a weight is beyond them is not said.
    pub(super) fn weigh(
        &mut self,
        isa: Isa,
        first: usize,
        logits: &mut [[f32; PAGE_SIZE]],
        visible: &[usize],
    ) {
        // Lanes of keys that nobody sees would add zeros.
        if visible.last().is_some_and(|&seen| seen <= LANES) {
            weigh_half(isa, self, first, logits, visible);
        } else {
            weigh_page(isa, self, first, logits, visible);
        }
    }

    /// Writes what a query found: the mean of the values by their weights.
    #[inline(always)]
    pub(super) fn write(&self, query: usize, out: &mut [f32]) {
        let total = fold_lanes(self.totals[query], |a, b| a + b);
        // Plain slices: over arrays the compiler goes across them, with gathers.
        for (out, sum) in out.iter_mut().zip(&self.sums[query * self.width..]) {
            *out = sum / total;
        }
    }
}

per_isa! {
    /// [`Softmax::weigh`] where some query sees a key of the second half of a page.
    fn weigh_page(state: &mut Softmax, first: usize, logits: &mut [[f32; PAGE_SIZE]], visible: &[usize]) = weigh_page_body
}

#[inline(always)]
fn weigh_page_body<const R: usize>(
    state: &mut Softmax,
    first: usize,
    logits: &mut [[f32; PAGE_SIZE]],
    visible: &[usize],
) {
    weigh::<{ PAGE_SIZE / LANES }>(state, first, logits, visible);
}

per_isa! {
    /// [`Softmax::weigh`] where none does.
    fn weigh_half(state: &mut Softmax, first: usize, logits: &mut [[f32; PAGE_SIZE]], visible: &[usize]) = weigh_half_body
}

#[inline(always)]
fn weigh_half_body<const R: usize>(
    state: &mut Softmax,
    first: usize,
    logits: &mut [[f32; PAGE_SIZE]],
    visible: &[usize],
) {
    weigh::<1>(state, first, logits, visible);
}

#[inline(always)]
fn weigh<const CHUNKS: usize>(
    state: &mut Softmax,
    first: usize,
    logits: &mut [[f32; PAGE_SIZE]],
    visible: &[usize],
) {
    let height = logits.len();
    let width = state.width;
    let maxima = &mut state.maxima[first..first + height];
    let totals = &mut state.totals[first..first + height];
    let sums = &mut state.sums[first * width..(first + height) * width];
    let mut decays = [0.0; DECAYS];
    for (member, (logits, &visible)) in logits.iter_mut().zip(visible).enumerate() {
        let chunks = &mut logits.as_chunks_mut::<LANES>().0[..CHUNKS];
        if visible < CHUNKS * LANES {
            hide(chunks, visible as u32);
        }
        let mut lanes = chunks[0];
        for chunk in &chunks[1..] {
            for lane in 0..LANES {
                lanes[lane] = larger(chunk[lane], lanes[lane]);
            }
        }
        let largest = larger(fold_lanes(lanes, larger), maxima[member]);
        decays[member] = maxima[member] - largest;
        maxima[member] = largest;
    }
    // All at once: one by one they would wait for each other.
    for decay in &mut decays {
        *decay = exp_or_zero(*decay);
    }
    for (member, (logits, totals)) in logits.iter_mut().zip(totals).enumerate() {
        let (largest, decay) = (maxima[member], decays[member]);
        let mut added = [0.0; LANES];
        for chunk in &mut logits.as_chunks_mut::<LANES>().0[..CHUNKS] {
            let mut weights = *chunk;
            for lane in 0..LANES {
                weights[lane] = exp_or_zero(weights[lane] - largest);
                added[lane] += weights[lane];
            }
            *chunk = weights;
        }
        let before = *totals;
        for lane in 0..LANES {
            added[lane] = before[lane].mul_add(decay, added[lane]);
        }
        *totals = added;
        if decay != 1.0 {
            sums[member * width..][..width].iter_mut().for_each(|sum| *sum *= decay);
        }
    }
}

/// [`MOST_ROWS`], in whole vectors.
const DECAYS: usize = MOST_ROWS.next_multiple_of(LANES);

/// What is not visible weighs nothing: e^-inf is 0.
#[inline(always)]
fn hide(chunks: &mut [[f32; LANES]], visible: u32) {
    for (index, chunk) in chunks.iter_mut().enumerate() {
        let mut seen = *chunk;
        for (lane, logit) in seen.iter_mut().enumerate() {
            let visible = ((index * LANES + lane) as u32) < visible;
            *logit = if visible { *logit } else { f32::NEG_INFINITY };
        }
        *chunk = seen;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of logits of some queries, those of the last page seen in part.
    fn run(isa: Isa, height: usize, width: usize, last: usize) -> (Vec<f32>, Vec<f64>) {
        const PAGES: usize = 4;
        let number = |i: usize| ((i * 7919) % 1009) as f32 / 50.0 - 10.0;
        let logit = |page: usize, query: usize, key: usize| number(page * 5003 + query * 97 + key);
        let mut softmax = Softmax::default();
        softmax.begin(height + 3, width);
        let mut truth = vec![0.0f64; height];
        for page in 0..PAGES {
            let visible: Vec<usize> =
                (0..height).map(|query| if page + 1 == PAGES { last + query } else { PAGE_SIZE }).collect();
            let mut logits = vec![[0.0; PAGE_SIZE]; height];
            for (query, logits) in logits.iter_mut().enumerate() {
                *logits = std::array::from_fn(|key| logit(page, query, key));
                truth[query] += logits[..visible[query]].iter().map(|&x| f64::from(x).exp()).sum::<f64>();
            }
            softmax.weigh(isa, 3, &mut logits, &visible);
            for (query, logits) in logits.iter().enumerate() {
                // The value of every key is one.
                let sums = softmax.sums_mut(3 + query);
                let weight: f32 = logits[..visible[query]].iter().sum();
                sums.iter_mut().for_each(|sum| *sum += weight);
            }
        }
        let mut out = vec![0.0; height * (width - 3)];
        for (query, out) in out.chunks_exact_mut(width - 3).enumerate() {
            softmax.write(3 + query, out);
        }
        let found = (0..height).map(|query| {
            let total: f32 = softmax.totals[3 + query].iter().sum();
            f64::from(total) * f64::from(softmax.maxima[3 + query]).exp()
        });
        let off = found.zip(&truth).map(|(found, truth)| ((found - truth) / truth).abs());
        (out, off.collect())
    }

    #[test]
    fn weights_of_all_pages_add_up_with_every_instruction_set() {
        for height in 1..=MOST_ROWS {
            for (last, width) in
                [(1, 32), (3, 272), (16 - height.min(15), 48), (17, 64), (PAGE_SIZE - height + 1, 16)]
            {
                let (portable, off) = run(Isa::all()[0], height, width, last);
                assert!(off.iter().all(|&off| off < 1e-5), "{off:?}");
                assert!(portable.iter().all(|mean| (mean - 1.0).abs() < 1e-5), "{portable:?}");
                for isa in Isa::all() {
                    let (out, _) = run(isa, height, width, last);
                    let equal = out.iter().zip(&portable).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(equal, "{height} queries, {last} keys with {}", isa.name());
                }
            }
        }
    }

    #[test]
    fn a_logit_that_is_not_a_number_is_not_lost() {
        for isa in Isa::all() {
            for place in [0, 7, 15, 16, 31] {
                for page in 0..2 {
                    let mut softmax = Softmax::default();
                    softmax.begin(1, 16);
                    for at in 0..2 {
                        let mut logits = [[0.5; PAGE_SIZE]];
                        if at == page {
                            logits[0][place] = f32::NAN;
                        }
                        softmax.weigh(isa, 0, &mut logits, &[PAGE_SIZE]);
                    }
                    let mut out = [0.0; 16];
                    softmax.write(0, &mut out);
                    assert!(out[0].is_nan(), "place {place} of page {page} with {}", isa.name());
                }
            }
        }
    }
}
