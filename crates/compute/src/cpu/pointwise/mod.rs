//! Pointwise attention of HSTU over pages: SiLU instead of softmax, with the relative bias gathered
//! tile by tile.
//!
//! ```text
//! s = scale * <q, k> + position weight[distance]
//!     + time weight[bucket(time of the prediction - time of the key)]
//! out = (sum over visible keys of silu(s) * v) / divisor
//! ```
//!
//! Place in the flow: a layer computes queries, keys and values, writes keys and values to pages,
//! and calls [`attend`]. There is no maximum and no sum to keep: the weight of a key does not
//! depend on the other keys. So the result of a row is one chain of multiply-adds over its keys,
//! page by page in the order of absolute positions, then over the ancestors of a branch row from
//! the first to itself. Keys that a row of the same tile sees and another does not weigh exactly
//! zero for the other. Hence a row's bits do not depend on chunks, on the cache, on threads, on the
//! other rows of the call, or on the instruction set.
//!
//! Blocks that continue each other are taken as one *strip*, so that keys and values are read from
//! far away less often.
//!
//! The bias of a strip of rows and one page of keys is computed once and serves all heads of a
//! task. It never exists for more than a strip and a page. Most pages lie so far back that all of
//! their keys fall into one time bucket of a row, which two look-ups tell; otherwise every key is
//! looked up.
//!
//! ```text
//! mod       what a call is, and how it is cut into tasks
//! strips    blocks that are taken together
//! bias      relative bias, by position and time
//! kernel    one strip with some of the heads
//! ```
//!
//! What must not be here: layers, norms, what the rows are.

mod bias;
mod kernel;
mod strips;

use std::ops::Range;

use super::Cpu;
use super::attention::{Block, Tables, are_apart};
use super::mask::Mask;
use super::pages::{LayerHeads, LayerPages};
use super::tile::SharedMatrix;
pub use bias::RelativeBias;
use strips::{TALLEST_STRIP, strips_of};

/// How heads lie in a row, and the constants of the attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Number of heads.
    pub heads: usize,
    /// Width of a query and of a key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Width of the rows that hold the queries.
    pub row_width: usize,
    /// Column of the first head's query.
    pub query_column: usize,
    /// Factor of the inner product.
    pub logit_scale: f32,
    /// Divisor of the weighted sum: a constant of the checkpoint.
    pub divisor: f32,
}

/// The context of a request, as far as attention needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Positions of the context.
    pub context_len: usize,
    /// Times of the context's positions, and one more: the time of the query. Empty if no layer has
    /// a bias. A range of [`Sequences::times`].
    pub times: Range<usize>,
}

/// The sequences that the rows of a call belong to.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// For each row, which.
    pub of_row: &'a [u32],
    /// All of them.
    pub all: &'a [Sequence],
    /// Arena of times.
    pub times: &'a [i64],
}

/// What all blocks of a call share.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Heads and constants.
    pub shape: Shape,
    /// Who sees whom.
    pub mask: Mask,
    /// Relative bias; only with a causal mask.
    pub bias: Option<&'a RelativeBias>,
    /// Rows of the step, `[rows, row_width]`.
    pub rows: &'a [f32],
    /// Whose rows they are.
    pub sequences: Sequences<'a>,
    /// The heads of the layer: keys and values, the rows' own included.
    pub pages: LayerPages<'a>,
    /// Page tables and ancestors.
    pub tables: Tables<'a>,
}

/// Attends with all blocks, whose rows ascend. `out` is `[rows, heads * value_dim]`; rows of no
/// block are not touched.
pub fn attend(cpu: &Cpu, call: &Call<'_>, blocks: &[Block], out: &mut [f32]) {
    assert!(are_apart(blocks), "rows of blocks ascend");
    let heads = call.shape.heads;
    let out = SharedMatrix::new(out, heads * call.shape.value_dim);
    let tasks = TASKS_PER_THREAD * cpu.threads();
    // Heads of a task share its bias; they are parted when there are few blocks for the threads.
    // Without a bias they share nothing, and the keys and values of one head stay in a core's own
    // cache while strip after strip passes by.
    let parts = match call.bias {
        Some(_) => tasks.div_ceil(blocks.len().max(1)).clamp(1, heads),
        None => heads,
    };
    let size = heads.div_ceil(parts);
    let parts = heads.div_ceil(size);
    // Taller strips read keys and values less often. They pay where those of all heads pass by.
    let tallest = if size == 1 { 1 } else { TALLEST_STRIP };
    let strips = strips_of(blocks, (blocks.len() * parts / tasks).clamp(1, tallest));
    let task = |index: usize| {
        // One by one, and the last rows of a context first: they see the most.
        let (strip, part) = (&strips[strips.len() - 1 - index % strips.len()], index / strips.len());
        let heads = part * size..heads.min((part + 1) * size);
        match call.pages.0 {
            LayerHeads::F32(pages) => kernel::attend(cpu.isa(), call, pages, strip, heads, out),
            LayerHeads::Bf16(pages) => kernel::attend(cpu.isa(), call, pages, strip, heads, out),
        }
    };
    cpu.each(strips.len() * parts, 1, task);
}

/// Tasks that keep threads busy to the end.
const TASKS_PER_THREAD: usize = 3;

#[cfg(test)]
mod tests {
    use beamline_kv_cache::PageId;

    use super::*;
    use crate::cpu::Bf16;
    use crate::cpu::attention::Sees;
    use crate::cpu::isa::Isa;
    use crate::cpu::kv_format::KvFormat;
    use crate::cpu::pages::{Destination, PAGE_SIZE, PageShape, PageStore};
    use crate::cpu::stored::Stored;

    fn numbers(count: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919) % 1009) as f32 / 500.0 - 1.0).collect()
    }

    fn causal(rows: Range<usize>, first_position: usize) -> Block {
        Block { rows, context_pages: 0..20, sees: Sees::Causal { first_position } }
    }

    /// In both formats, and a third in single precision of what the second rounds to.
    fn stores(
        heads: usize,
        dim: usize,
        pages: usize,
        rows: &[f32],
        destinations: &[Destination],
    ) -> [PageStore; 3] {
        let width = rows.len() / destinations.len();
        [(KvFormat::F32, false), (KvFormat::Bf16, false), (KvFormat::F32, true)].map(|(format, round)| {
            let shape = PageShape { format, layers: 1, heads, key_dim: dim, value_dim: dim };
            let mut store = PageStore::new(shape, pages).unwrap();
            let rounded = |x: &[f32]| -> Vec<f32> {
                x.iter().map(|&x| if round { Bf16::nearest(x).widen() } else { x }).collect()
            };
            for head in 0..heads {
                for (row, destination) in rows.chunks(width).zip(destinations) {
                    let (key, value) = (&row[head * dim..][..dim], &row[(heads + head) * dim..][..dim]);
                    store.write(0, head, *destination, &rounded(key), &rounded(value));
                }
            }
            store
        })
    }

    fn place(row: usize) -> (PageId, usize) {
        (PageId((row / PAGE_SIZE) as u32), row % PAGE_SIZE)
    }

    #[test]
    fn a_row_does_not_depend_on_the_strip_it_is_in() {
        const ROWS: usize = 620;
        let (heads, dim) = (3, 20);
        let width = 3 * heads * dim;
        let rows = numbers(ROWS * width);
        let context = (0..ROWS).map(place).map(|(page, offset)| Destination::Context { page, offset });
        let stores = stores(heads, dim, 20, &rows, &context.collect::<Vec<_>>());
        let times: Vec<i64> = (0..=ROWS as i64).map(|i| i * 40 + i / 9 * 70_000).collect();
        let bias = RelativeBias::new(&numbers(2 * ROWS + 9), &numbers(129));
        let page_ids: Vec<PageId> = (0..20).map(PageId).collect();
        let blocks: Vec<Block> = (0..ROWS)
            .step_by(PAGE_SIZE)
            .map(|first| causal(first..ROWS.min(first + PAGE_SIZE), first))
            .collect();
        for bias in [None, Some(&bias)] {
            let attended = |store: &PageStore, blocks: &[&[Block]], cpu: &Cpu| {
                let call = Call {
                    shape: shape(heads, dim, width),
                    mask: Mask::default(),
                    bias,
                    rows: &rows,
                    sequences: Sequences {
                        of_row: &[0; ROWS],
                        all: &[Sequence { context_len: ROWS, times: 0..times.len() }],
                        times: &times,
                    },
                    pages: store.layer(0),
                    tables: Tables { pages: &page_ids, lineage: &[] },
                };
                let mut out = vec![0.0; ROWS * heads * dim];
                blocks.iter().for_each(|blocks| attend(cpu, &call, blocks, &mut out));
                out.iter().map(|x: &f32| x.to_bits()).collect::<Vec<_>>()
            };
            let alone = Cpu::new(1).unwrap();
            let one_by_one =
                stores.each_ref().map(|store| attended(store, &blocks.chunks(1).collect::<Vec<_>>(), &alone));
            assert!(one_by_one[0] != one_by_one[1]);
            assert!(one_by_one[1] == one_by_one[2], "rows in bfloat16 are seen as they were rounded");
            for (threads, isa) in
                [1, 2, 5].into_iter().flat_map(|n| Isa::all().into_iter().map(move |isa| (n, isa)))
            {
                let cpu = Cpu::with_isa(threads, isa).unwrap();
                for (store, one_by_one) in stores.iter().zip(&one_by_one) {
                    let isa = isa.name();
                    assert!(attended(store, &[&blocks], &cpu) == *one_by_one, "{threads} threads, {isa}");
                    let parts = [&blocks[..7], &blocks[7..]];
                    assert!(attended(store, &parts, &cpu) == *one_by_one, "{threads} threads, {isa}");
                }
            }
        }
    }

    #[test]
    fn branches_see_a_rounded_ancestor_as_they_see_a_rounded_context() {
        const CONTEXT: usize = 75;
        const BRANCHES: usize = 40;
        let (heads, dim) = (2, 23);
        let width = 3 * heads * dim;
        let rows = numbers((CONTEXT + BRANCHES) * width);
        let destinations: Vec<Destination> = (0..CONTEXT + BRANCHES)
            .map(|row| match row.checked_sub(CONTEXT) {
                None => (place(row), false),
                Some(branch) => (place(3 * PAGE_SIZE + branch), true),
            })
            .map(|((page, offset), branch)| match branch {
                false => Destination::Context { page, offset },
                true => Destination::Branch { page, offset },
            })
            .collect();
        let stores = stores(heads, dim, 5, &rows, &destinations);
        let lineage: Vec<u32> = (0..BRANCHES as u32).flat_map(|row| [row / 2, row]).collect();
        let page_ids: Vec<PageId> = (0..5).map(PageId).collect();
        let block = |rows: Range<usize>| Block {
            context_pages: 0..3,
            sees: Sees::Branch {
                context_len: CONTEXT,
                ancestors: 2,
                lineage: 2 * rows.start,
                branch_pages: 3..5,
            },
            rows,
        };
        let mut of_isa = Vec::new();
        for isa in Isa::all() {
            let attended = stores.each_ref().map(|store| {
                let call = Call {
                    shape: shape(heads, dim, width),
                    mask: Mask::default(),
                    bias: None,
                    rows: &rows[CONTEXT * width..],
                    sequences: Sequences {
                        of_row: &[0; BRANCHES],
                        all: &[Sequence { context_len: CONTEXT, times: 0..0 }],
                        times: &[],
                    },
                    pages: store.layer(0),
                    tables: Tables { pages: &page_ids, lineage: &lineage },
                };
                let mut out = vec![0.0; BRANCHES * heads * dim];
                let blocks = [block(0..PAGE_SIZE), block(PAGE_SIZE..BRANCHES)];
                attend(&Cpu::with_isa(2, isa).unwrap(), &call, &blocks, &mut out);
                out.iter().map(|x: &f32| x.to_bits()).collect::<Vec<_>>()
            });
            assert!(attended[0] != attended[1] && attended[1] == attended[2], "{}", isa.name());
            of_isa.push(attended);
        }
        assert!(of_isa.windows(2).all(|pair| pair[0] == pair[1]));
    }

    fn shape(heads: usize, dim: usize, width: usize) -> Shape {
        Shape {
            heads,
            key_dim: dim,
            value_dim: dim,
            row_width: width,
            query_column: 2 * heads * dim,
            logit_scale: 0.3,
            divisor: 211.0,
        }
    }
}
