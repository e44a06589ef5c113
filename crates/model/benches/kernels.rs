//! Attention on the shapes of a small decoder (workload S: 256 wide, 4 query and 2 key-value heads of 64).
#![allow(missing_docs, reason = "criterion's macro makes public items")]
#![allow(clippy::expect_used, reason = "a measurement for people to run")]

use beamline_kv_cache::PageId;
use beamline_model::cpu::Cpu;
use beamline_model::cpu::attention::{Block, Heads, Sees, Tables, attend};
use beamline_model::cpu::pages::{Destination, PAGE_SIZE, PageStore};
use criterion::{Criterion, criterion_group, criterion_main};

const THREADS: usize = 2;
const CONTEXT: usize = 321;
const HEADS: Heads = Heads { query: 4, key_value: 2, dim: 64 };

fn numbers(count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn attention(c: &mut Criterion) {
    let cpu = Cpu::new(THREADS).expect("threads");
    let context_pages = CONTEXT.div_ceil(PAGE_SIZE);
    let mut store =
        PageStore::new(1, HEADS.key_value, HEADS.dim, HEADS.dim, context_pages + 4).expect("pages");
    let values = numbers(HEADS.dim);
    for head in store.layer_mut(0) {
        for position in 0..CONTEXT {
            let page = PageId((position / PAGE_SIZE) as u32);
            head.write(Destination::Context { page, offset: position % PAGE_SIZE }, &values, &values);
        }
        for row in 0..4 * PAGE_SIZE {
            let page = PageId((context_pages + row / PAGE_SIZE) as u32);
            head.write(Destination::Branch { page, offset: row % PAGE_SIZE }, &values, &values);
        }
    }
    let pages: Vec<PageId> = (0..context_pages as u32 + 4).map(PageId).collect();

    let causal: Vec<Block> = (0..context_pages)
        .map(|page| {
            let first = page * PAGE_SIZE;
            Block {
                rows: first..CONTEXT.min(first + PAGE_SIZE),
                context_pages: 0..page + 1,
                sees: Sees::Causal { first_position: first },
            }
        })
        .collect();
    run(c, &cpu, &store, &pages, &[], "attention: a prefill of 321 rows", CONTEXT, &causal);

    for beams in [32, 128] {
        // The second branch step: every row sees the context, its parent and itself.
        let lineage: Vec<u32> = (0..beams as u32).flat_map(|row| [row / 2, row]).collect();
        let blocks: Vec<Block> = (0..beams / PAGE_SIZE)
            .map(|block| Block {
                rows: block * PAGE_SIZE..(block + 1) * PAGE_SIZE,
                context_pages: 0..context_pages,
                sees: Sees::Branch {
                    context_len: CONTEXT,
                    ancestors: 2,
                    lineage: 2 * block * PAGE_SIZE,
                    branch_pages: context_pages..context_pages + 4,
                },
            })
            .collect();
        run(
            c,
            &cpu,
            &store,
            &pages,
            &lineage,
            &format!("attention: {beams} beams see 321 positions"),
            beams,
            &blocks,
        );
    }
}

#[allow(clippy::too_many_arguments, reason = "the arguments of the kernel, and a name")]
fn run(
    c: &mut Criterion,
    cpu: &Cpu,
    store: &PageStore,
    pages: &[PageId],
    lineage: &[u32],
    name: &str,
    rows: usize,
    blocks: &[Block],
) {
    let qkv = numbers(rows * HEADS.qkv_width());
    let mut out = vec![0.0; rows * HEADS.query * HEADS.dim];
    let tables = Tables { pages, lineage };
    c.bench_function(name, |b| b.iter(|| attend(cpu, HEADS, &qkv, store.layer(0), blocks, tables, &mut out)));
}

criterion_group!(benches, attention);
criterion_main!(benches);
