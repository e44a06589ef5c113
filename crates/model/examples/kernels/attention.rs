//! Softmax attention on the heads of S: whole contexts, and beams that look at one, with keys and values
//! in each format.

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::attention::{Block, Heads, Sees, Tables, attend};
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::pages::{Destination, PAGE_SIZE, PageShape, PageStore};
use beamline_kv_cache::PageId;

use crate::case::{Case, Kernel};
use crate::peaks::Instruction;
use crate::products::numbers;

const HEADS: Heads = Heads { query: 4, key_value: 2, dim: 64 };
const PREFILLS: [usize; 2] = [321, 641];
const BEAMS: [usize; 2] = [32, 128];
const CONTEXTS: [usize; 3] = [321, 641, 2048];
/// The least share of the multiply-add loop's rate in a prefill. Exponentials take most of the rest.
const DEMAND: f64 = 0.55;

struct Attention {
    store: PageStore,
    pages: Vec<PageId>,
    blocks: Vec<Block>,
    lineage: Vec<u32>,
    qkv: Vec<f32>,
    out: Vec<f32>,
}

impl Kernel for Attention {
    fn prepare(&mut self, _: &Cpu) {}

    fn run(&mut self, cpu: &Cpu) {
        let tables = Tables { pages: &self.pages, lineage: &self.lineage };
        attend(cpu, HEADS, &self.qkv, self.store.layer(0), &self.blocks, tables, &mut self.out);
    }
}

/// Prefills, and the second branch step of beams.
pub(crate) fn cases() -> Vec<Case> {
    let of_format = |kv| {
        let beams =
            CONTEXTS.into_iter().flat_map(move |context| BEAMS.map(|beams| branches(kv, beams, context)));
        PREFILLS.into_iter().map(move |context| prefill(kv, context)).chain(beams)
    };
    KvFormat::ALL.into_iter().flat_map(of_format).collect()
}

fn prefill(kv: KvFormat, context: usize) -> Case {
    let pages = context.div_ceil(PAGE_SIZE);
    let block = |page: usize| {
        let first = page * PAGE_SIZE;
        Block {
            rows: first..context.min(first + PAGE_SIZE),
            context_pages: 0..page + 1,
            sees: Sees::Causal { first_position: first },
        }
    };
    let shape = format!("S prefill of {context}");
    case(kv, shape, context, 0, (0..pages).map(block).collect(), Vec::new(), context * (context + 1) / 2)
}

fn branches(kv: KvFormat, beams: usize, context: usize) -> Case {
    let pages = context.div_ceil(PAGE_SIZE);
    // Every row sees the context, its parent and itself.
    let lineage = (0..beams as u32).flat_map(|row| [row / 2, row]).collect();
    let block = |index: usize| Block {
        rows: index * PAGE_SIZE..beams.min((index + 1) * PAGE_SIZE),
        context_pages: 0..pages,
        sees: Sees::Branch {
            context_len: context,
            ancestors: 2,
            lineage: 2 * index * PAGE_SIZE,
            branch_pages: pages..pages + beams.div_ceil(PAGE_SIZE),
        },
    };
    let blocks = (0..beams.div_ceil(PAGE_SIZE)).map(block).collect();
    case(kv, format!("S {beams} beams on {context}"), context, beams, blocks, lineage, beams * (context + 2))
}

/// `pairs` of a row and a key that it sees.
fn case(
    kv: KvFormat,
    shape: String,
    context: usize,
    beams: usize,
    blocks: Vec<Block>,
    lineage: Vec<u32>,
    pairs: usize,
) -> Case {
    let rows = if beams == 0 { context } else { beams };
    let (context_pages, branch_pages) = (context.div_ceil(PAGE_SIZE), beams.div_ceil(PAGE_SIZE));
    let pages = context_pages + branch_pages;
    let kernel = Attention {
        store: filled(kv, context, context_pages, beams, pages),
        pages: (0..pages as u32).map(PageId).collect(),
        blocks,
        lineage,
        qkv: numbers(rows * HEADS.qkv_width()),
        out: vec![0.0; rows * HEADS.query * HEADS.dim],
    };
    Case {
        family: "softmax",
        format: kv.name(),
        shape,
        differs_at: &["portable", "avx2", "avx512"],
        instruction: Some(Instruction::MultiplyAdd),
        operations: (4 * HEADS.query * HEADS.dim * pairs) as f64,
        demand: (beams == 0).then_some(DEMAND),
        kernel: Box::new(kernel),
    }
}

fn filled(format: KvFormat, context: usize, context_pages: usize, beams: usize, pages: usize) -> PageStore {
    let (heads, dim) = (HEADS.key_value, HEADS.dim);
    let shape = PageShape { format, layers: 1, heads, key_dim: dim, value_dim: dim };
    let mut store = PageStore::new(shape, pages).expect("pages");
    let values = numbers((context + beams) * HEADS.dim);
    let page = |index: usize| PageId(index as u32);
    for head in 0..heads {
        for (row, values) in values.chunks_exact(HEADS.dim).enumerate() {
            let destination = if row < context {
                Destination::Context { page: page(row / PAGE_SIZE), offset: row % PAGE_SIZE }
            } else {
                let row = row - context;
                Destination::Branch { page: page(context_pages + row / PAGE_SIZE), offset: row % PAGE_SIZE }
            };
            store.write(0, head, destination, values, values);
        }
    }
    store
}
