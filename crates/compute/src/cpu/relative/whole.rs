//! Self-attention of the encoder: all rows of a request see each other, with a relative bias.
//!
//! ```text
//! logit[query][key] = bias[head][key - query] + <q, k>      no division by a root
//! out[query]        = sum of e^(logit - largest) v / sum of e^(logit - largest)
//! ```
//!
//! Place in the flow: between the products of an encoder block. Keys and values live for one block only,
//! so they are in no page.
//!
//! Keys are transposed first, so that a product takes many of them at a time. Then tasks of some rows go
//! over all heads.
//!
//! Invariant: a row is one chain of operations in the order of its keys, whatever other rows or requests
//! are there.

use std::cell::RefCell;
use std::ops::Range;

use super::bias::Bias;
use crate::cpu::Cpu;
use crate::cpu::attention::Heads;
use crate::cpu::isa::{Isa, per_isa};
use crate::cpu::parallel::{at_least, write};
use crate::cpu::tile::{COLUMNS, Product, Strided, rows_at_once};
use crate::cpu::vector::{LANES, exp_or_zero, fold_lanes, larger};

/// Values behind the last row of queries, keys and values: products read whole vectors, and drop what
/// lies behind a head.
pub const SLACK: usize = COLUMNS;

/// Rows of a task: a few tiles.
const ROWS_PER_TASK: usize = 24;

/// Memory of all attentions, reused.
#[derive(Debug, Default)]
pub struct Workspace {
    /// Of each sequence and head, keys `[dim][keys]`, as many columns as whole vectors need.
    turned: Vec<f32>,
}

/// Reused by all tasks of a thread.
#[derive(Default)]
struct Scratch {
    /// Logits, then weights, `[row][keys]`.
    logits: Vec<f32>,
    /// `[row][dim]`, as wide as whole vectors.
    sums: Vec<f32>,
    totals: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A head's keys to be turned around.
struct Turn<'a> {
    /// Rows of the sequence.
    rows: &'a Range<usize>,
    head: usize,
    out: &'a mut [f32],
}

/// Some rows of a sequence.
struct Task<'a> {
    /// Rows of the sequence.
    sequence: &'a Range<usize>,
    /// Rows of the task, counted from the sequence's first.
    rows: Range<usize>,
    /// The sequence's keys of all heads.
    turned: &'a [f32],
    out: &'a mut [f32],
}

/// What all tasks read.
#[derive(Clone, Copy)]
struct Shared<'a> {
    isa: Isa,
    heads: Heads,
    bias: &'a Bias,
    qkv: &'a [f32],
}

/// Attends within every sequence. `qkv` is `[rows, 3 heads * dim]` with [`SLACK`] behind it, `out`
/// `[rows, heads * dim]`; the sequences cover their rows in order.
pub fn attend(
    cpu: &Cpu,
    heads: Heads,
    bias: &Bias,
    sequences: &[Range<usize>],
    qkv: &[f32],
    workspace: &mut Workspace,
    out: &mut [f32],
) {
    let shared = Shared { isa: cpu.isa(), heads, bias, qkv };
    let size = |rows: &Range<usize>| heads.dim * columns(rows.len());
    let total = sequences.iter().map(|rows| heads.query * size(rows)).sum();
    let turned = at_least(&mut workspace.turned, total);

    let mut turns = Vec::new();
    let mut rest = &mut *turned;
    for rows in sequences {
        for head in 0..heads.query {
            let (out, others) = rest.split_at_mut(size(rows));
            rest = others;
            turns.push(Turn { rows, head, out });
        }
    }
    cpu.each_part(write(&mut turns, 1), |_, turns| turns.iter_mut().for_each(|turn| turn.run(shared)));

    let mut tasks = Vec::new();
    let (mut keys, mut rest) = (&*turned, out);
    for sequence in sequences {
        let (own, others) = keys.split_at(heads.query * size(sequence));
        keys = others;
        for first in (0..sequence.len()).step_by(ROWS_PER_TASK) {
            let rows = first..sequence.len().min(first + ROWS_PER_TASK);
            let (out, others) = rest.split_at_mut(rows.len() * heads.query * heads.dim);
            rest = others;
            tasks.push(Task { sequence, rows, turned: own, out });
        }
    }
    cpu.each_part(write(&mut tasks, 1), |_, tasks| {
        SCRATCH.with_borrow_mut(|scratch| tasks.iter_mut().for_each(|task| task.run(shared, scratch)));
    });
}

/// Columns of turned keys.
fn columns(keys: usize) -> usize {
    keys.next_multiple_of(COLUMNS)
}

impl Turn<'_> {
    fn run(&mut self, Shared { heads, qkv, .. }: Shared<'_>) {
        let (width, dim) = (heads.qkv_width(), heads.dim);
        let columns = columns(self.rows.len());
        let first = (heads.query + self.head) * dim;
        for (key, row) in self.rows.clone().enumerate() {
            let values = &qkv[row * width + first..][..dim];
            for (place, value) in self.out[key..].iter_mut().step_by(columns).zip(values) {
                *place = *value;
            }
        }
        // What is behind the last key is not seen, but it is multiplied.
        for keys in self.out.chunks_exact_mut(columns) {
            keys[self.rows.len()..].fill(0.0);
        }
    }
}

impl Task<'_> {
    fn run(&mut self, shared: Shared<'_>, scratch: &mut Scratch) {
        let (heads, tallest) = (shared.heads, rows_at_once(shared.isa));
        for first in (self.rows.start..self.rows.end).step_by(tallest) {
            let rows = first..self.rows.end.min(first + tallest);
            for head in 0..heads.query {
                self.attend_head(shared, head, rows.clone(), scratch);
            }
        }
    }

    /// One head of a tile of rows.
    fn attend_head(&mut self, shared: Shared<'_>, head: usize, rows: Range<usize>, scratch: &mut Scratch) {
        let Shared { isa, heads, bias, qkv } = shared;
        let (dim, width, keys) = (heads.dim, heads.qkv_width(), self.sequence.len());
        let (columns, value_width) = (columns(keys), dim.next_multiple_of(COLUMNS));
        let (height, start) = (rows.len(), self.sequence.start);
        let logits = at_least(&mut scratch.logits, height * columns);
        let sums = at_least(&mut scratch.sums, height * value_width);
        let totals = at_least(&mut scratch.totals, height);
        for (row, logits) in rows.clone().zip(logits.chunks_exact_mut(columns)) {
            bias.fill(head, -(row as i64), &mut logits[..keys]);
            logits[keys..].fill(0.0);
        }
        let queries = Product {
            rows: Strided { values: &qkv[(start + rows.start) * width + head * dim..], stride: width },
            panel: Strided { values: &self.turned[head * dim * columns..][..dim * columns], stride: columns },
            height,
            inner: dim,
            columns,
        };
        queries.add_to(isa, logits, columns);
        weigh(isa, logits, columns, keys, totals);
        sums.fill(0.0);
        let values = Product {
            rows: Strided { values: logits, stride: columns },
            panel: Strided { values: &qkv[start * width + (2 * heads.query + head) * dim..], stride: width },
            height,
            inner: keys,
            columns: value_width,
        };
        values.add_to(isa, sums, value_width);
        let out_width = heads.query * dim;
        for ((row, sums), total) in rows.zip(sums.chunks_exact(value_width)).zip(&*totals) {
            let out = &mut self.out[(row - self.rows.start) * out_width + head * dim..][..dim];
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum / total);
        }
    }
}

per_isa! {
    /// Turns the first `keys` logits of each row of `columns` into weights, e^(logit - largest), and
    /// adds them up.
    fn weigh(logits: &mut [f32], columns: usize, keys: usize, totals: &mut [f32]) = weigh_body
}

#[inline(always)]
fn weigh_body<const R: usize>(logits: &mut [f32], columns: usize, keys: usize, totals: &mut [f32]) {
    for (row, total) in logits.chunks_exact_mut(columns).zip(totals) {
        row[keys..].fill(f32::NEG_INFINITY);
        let chunks = row.as_chunks_mut::<LANES>().0;
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in chunks.iter() {
            for lane in 0..LANES {
                lanes[lane] = larger(chunk[lane], lanes[lane]);
            }
        }
        let largest = fold_lanes(lanes, larger);
        let mut added = [0.0; LANES];
        for chunk in chunks {
            let mut weights = *chunk;
            for lane in 0..LANES {
                weights[lane] = exp_or_zero(weights[lane] - largest);
                added[lane] += weights[lane];
            }
            *chunk = weights;
        }
        *total = fold_lanes(added, |a, b| a + b);
    }
}
