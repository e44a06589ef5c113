//! Pointwise attention on the published shapes of HSTU: whole histories, and candidates that look at
//! one, with keys and values in each format.

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::attention::{Block, Sees, Tables};
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::mask::Mask;
use beamline_compute::cpu::pages::{Destination, PAGE_SIZE, PageShape, PageStore};
use beamline_compute::cpu::pointwise::{Call, RelativeBias, Sequence, Sequences, Shape, attend};
use beamline_kv_cache::PageId;

use crate::case::{Case, Kernel};
use crate::peaks::Instruction;
use crate::products::numbers;

/// Heads, and the width of one.
const SHAPES: [(usize, usize); 2] = [(4, 64), (1, 50)];
const HISTORIES: [usize; 2] = [200, 2048];
const CANDIDATES: usize = 256;

struct Pointwise {
    shape: Shape,
    bias: Option<RelativeBias>,
    rows: Vec<f32>,
    store: PageStore,
    pages: Vec<PageId>,
    blocks: Vec<Block>,
    lineage: Vec<u32>,
    of_row: Vec<u32>,
    sequence: [Sequence; 1],
    times: Vec<i64>,
    out: Vec<f32>,
}

impl Kernel for Pointwise {
    fn prepare(&mut self, _: &Cpu) {}

    fn run(&mut self, cpu: &Cpu) {
        let call = Call {
            shape: self.shape,
            mask: Mask::default(),
            bias: self.bias.as_ref(),
            rows: &self.rows,
            sequences: Sequences { of_row: &self.of_row, all: &self.sequence, times: &self.times },
            pages: self.store.layer(0),
            tables: Tables { pages: &self.pages, lineage: &self.lineage },
        };
        attend(cpu, &call, &self.blocks, &mut self.out);
    }
}

/// Histories with and without relative bias, and candidates.
pub(crate) fn cases() -> Vec<Case> {
    KvFormat::ALL.into_iter().flat_map(cases_in).collect()
}

fn cases_in(kv: KvFormat) -> Vec<Case> {
    let mut cases = Vec::new();
    for (heads, dim) in SHAPES {
        for history in HISTORIES {
            let pairs = history * (history + 1) / 2;
            for (is_biased, name) in [(true, "bias"), (false, "no bias")] {
                let shape = format!("{heads} x {dim}, {history} events, {name}");
                let kernel = kernel(kv, heads, dim, history, history, is_biased, causal(history), Vec::new());
                cases.push(case(kv, shape, heads * pairs * dim, kernel));
            }
        }
    }
    for history in HISTORIES {
        let (heads, dim) = SHAPES[0];
        let lineage = (0..CANDIDATES as u32).collect();
        let kernel = kernel(kv, heads, dim, history, CANDIDATES, false, branches(history), lineage);
        let shape = format!("{heads} x {dim}, {CANDIDATES} candidates on {history}");
        cases.push(case(kv, shape, heads * CANDIDATES * (history + 1) * dim, kernel));
    }
    cases
}

/// `pairs` of a value of a row and one of a key.
fn case(kv: KvFormat, shape: String, pairs: usize, kernel: Pointwise) -> Case {
    Case {
        family: "pointwise",
        format: kv.name(),
        shape,
        differs_at: &["portable", "avx2", "avx512"],
        instruction: Some(Instruction::MultiplyAdd),
        operations: (4 * pairs) as f64,
        demand: None,
        kernel: Box::new(kernel),
    }
}

fn causal(history: usize) -> Vec<Block> {
    let block = |first: usize| Block {
        rows: first..history.min(first + PAGE_SIZE),
        context_pages: 0..history.div_ceil(PAGE_SIZE),
        sees: Sees::Causal { first_position: first },
    };
    (0..history).step_by(PAGE_SIZE).map(block).collect()
}

/// Candidates see the history and themselves.
fn branches(history: usize) -> Vec<Block> {
    let pages = history.div_ceil(PAGE_SIZE);
    let block = |first: usize| Block {
        rows: first..CANDIDATES.min(first + PAGE_SIZE),
        context_pages: 0..pages,
        sees: Sees::Branch {
            context_len: history,
            ancestors: 1,
            lineage: first,
            branch_pages: pages..pages + CANDIDATES.div_ceil(PAGE_SIZE),
        },
    };
    (0..CANDIDATES).step_by(PAGE_SIZE).map(block).collect()
}

fn kernel(
    kv: KvFormat,
    heads: usize,
    dim: usize,
    history: usize,
    count: usize,
    is_biased: bool,
    blocks: Vec<Block>,
    lineage: Vec<u32>,
) -> Pointwise {
    let width = 4 * heads * dim;
    let pages = history.div_ceil(PAGE_SIZE) + lineage.len().div_ceil(PAGE_SIZE);
    let times = times(history + 1);
    Pointwise {
        shape: Shape {
            heads,
            key_dim: dim,
            value_dim: dim,
            row_width: width,
            query_column: 2 * heads * dim,
            logit_scale: 1.0,
            divisor: 211.0,
        },
        bias: is_biased.then(|| RelativeBias::new(&numbers(2 * history + 41), &numbers(129))),
        rows: numbers(count * width),
        store: filled(kv, heads, dim, history, pages),
        pages: (0..pages as u32).map(PageId).collect(),
        blocks,
        lineage,
        of_row: vec![0; count],
        sequence: [Sequence { context_len: history, times: 0..times.len() }],
        times,
        out: vec![0.0; count * heads * dim],
    }
}

fn filled(format: KvFormat, heads: usize, dim: usize, history: usize, pages: usize) -> PageStore {
    let shape = PageShape { format, layers: 1, heads, key_dim: dim, value_dim: dim };
    let mut store = PageStore::new(shape, pages).expect("pages");
    let values = numbers(history * dim);
    for head in 0..heads {
        for (position, values) in values.chunks_exact(dim).enumerate() {
            let (page, offset) = (PageId((position / PAGE_SIZE) as u32), position % PAGE_SIZE);
            store.write(0, head, Destination::Context { page, offset }, values, values);
        }
    }
    store
}

/// Times of a user who comes in sessions: seconds within one, days between.
fn times(count: usize) -> Vec<i64> {
    let gap = |event: i64| if event % 17 == 0 { 70_000 + event * 131 } else { 20 + event % 40 };
    let gaps = (0..count as i64).map(gap);
    gaps.scan(1_700_000_000, |time, gap| {
        *time += gap;
        Some(*time)
    })
    .collect()
}
