//! Pointwise attention of HSTU over pages: SiLU instead of softmax, with the relative bias gathered
//! tile by tile.
//!
//! ```text
//! s = scale * <q, k> + position weight[distance] + time weight[bucket(time of the prediction - time of the key)]
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
//! What must not be here: layers, norms, what the rows are.

use std::cell::RefCell;
use std::ops::Range;

use super::Cpu;
use super::attention::{Block, Sees, Tables};
use super::isa::{Isa, per_isa};
use super::mask::{Mask, Viewer};
use super::pages::{HeadPages, PAGE_SIZE};
use super::tile::{COLUMNS, Product, SharedMatrix, Strided, rows_at_once};
use super::time_buckets::TimeWeights;
use super::vector::{dot, silu, silu_in_place};

/// How heads lie in a row, and the constants of the attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Heads.
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

/// Relative bias of one layer, the same for all heads.
#[derive(Clone, Debug)]
pub struct RelativeBias {
    /// Positions there are.
    count: usize,
    /// By `count - 1 - distance`, padded so that a whole page can be read from any place.
    positions: Vec<f32>,
    times: TimeWeights,
}

impl RelativeBias {
    /// From the weights of position differences, `2 * count - 1` of them with index `count - 1 +
    /// column - row` (of which a causal mask reaches the first `count`), and of time buckets.
    pub fn new(positions: &[f32], times: &[f32]) -> Self {
        let count = positions.len().div_ceil(2);
        let mut padded = positions[..count].to_vec();
        padded.resize(count + PAGE_SIZE, 0.0);
        Self { count, positions: padded, times: TimeWeights::new(times) }
    }

    /// Positions there are: rows must lie before it.
    pub fn positions(&self) -> usize {
        self.count
    }

    /// The bias of a row and a column at or before it, whose times differ by `difference`.
    pub fn of(&self, row: usize, column: usize, difference: i64) -> f32 {
        self.of_positions(row, column)[0] + self.times.of(difference)
    }

    /// By position alone, for keys from `column` on.
    #[inline(always)]
    fn of_positions(&self, row: usize, column: usize) -> &[f32] {
        &self.positions[self.count - 1 - row + column..]
    }
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
    /// `[rows, row_width]`.
    pub rows: &'a [f32],
    /// Whose rows they are.
    pub sequences: Sequences<'a>,
    /// The heads of the layer: keys and values, the rows' own included.
    pub pages: &'a [HeadPages],
    /// Page tables and ancestors.
    pub tables: Tables<'a>,
}

/// Attends with all blocks. `out` is `[rows, heads * value_dim]`; rows of no block are not touched.
pub fn attend(cpu: &Cpu, call: &Call<'_>, blocks: &[Block], out: &mut [f32]) {
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
        SCRATCH.with_borrow_mut(|scratch| {
            attend_block(cpu.isa(), cpu.isa(), call, strip, heads, scratch, out);
        });
    };
    cpu.each(strips.len() * parts, 1, task);
}

/// Joins at most `most` blocks at a time that continue each other: rows that follow, of the same
/// context.
fn strips_of(blocks: &[Block], most: usize) -> Vec<Block> {
    let mut strips: Vec<Block> = Vec::with_capacity(blocks.len().div_ceil(most));
    let mut joined = 0;
    for block in blocks {
        if let Some(strip) = strips.last_mut().filter(|strip| joined < most && continues(strip, block)) {
            strip.rows.end = block.rows.end;
            joined += 1;
        } else {
            strips.push(block.clone());
            joined = 1;
        }
    }
    strips
}

/// Whether the rows of a block could as well be the next rows of another.
fn continues(before: &Block, block: &Block) -> bool {
    let rows = before.rows.len();
    let seen = match (&before.sees, &block.sees) {
        (Sees::Causal { first_position: first }, Sees::Causal { first_position }) => {
            first + rows == *first_position
        }
        (
            Sees::Branch { context_len, ancestors, lineage, branch_pages },
            Sees::Branch { context_len: other_len, ancestors: others, lineage: next, branch_pages: pages },
        ) => {
            (context_len, ancestors, branch_pages) == (other_len, others, pages)
                && lineage + rows * ancestors == *next
        }
        _ => false,
    };
    seen && before.rows.end == block.rows.start && before.context_pages == block.context_pages
}

/// Tasks that keep threads busy to the end.
const TASKS_PER_THREAD: usize = 3;
/// Most blocks of a strip.
const TALLEST_STRIP: usize = 4;

thread_local! {
    /// Reused by all tasks of a thread, so that the steady path does not allocate.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    /// `[head][row][key_dim]`, scaled.
    queries: Vec<f32>,
    /// `[head][row][value_width]`.
    sums: Vec<f32>,
    /// `[row][PAGE_SIZE]`, the bias of the page at hand.
    bias: Vec<[f32; PAGE_SIZE]>,
    /// `[row][PAGE_SIZE]`, the weights of its keys for the head at hand.
    weights: Vec<[f32; PAGE_SIZE]>,
    /// `[row]`, the keys of the page at hand that are seen, and the rows' own times.
    visible: Vec<u32>,
    times: Vec<i64>,
}

per_isa! {
    fn attend_block(isa: Isa, call: &Call<'_>, block: &Block, heads: Range<usize>, scratch: &mut Scratch,
        out: SharedMatrix<'_>) = attend_block_body
}

#[inline(always)]
fn attend_block_body<const R: usize>(
    isa: Isa,
    call: &Call<'_>,
    block: &Block,
    heads: Range<usize>,
    scratch: &mut Scratch,
    out: SharedMatrix<'_>,
) {
    let shape = call.shape;
    let (rows, value_width, tallest) = (block.rows.len(), call.pages[0].value_width(), rows_at_once(isa));
    let sequence = &call.sequences.all[call.sequences.of_row[block.rows.start] as usize];
    let context_len = sequence.context_len;
    let times = &call.sequences.times[sequence.times.clone()];
    scratch.queries.clear();
    for head in heads.clone() {
        for row in block.rows.clone() {
            let start = row * shape.row_width + shape.query_column + head * shape.key_dim;
            scratch
                .queries
                .extend(call.rows[start..start + shape.key_dim].iter().map(|q| q * shape.logit_scale));
        }
    }
    scratch.sums.clear();
    scratch.sums.resize(heads.len() * rows * value_width, 0.0);
    scratch.bias.clear();
    scratch.bias.resize(rows, [0.0; PAGE_SIZE]);
    scratch.weights.resize(rows, [0.0; PAGE_SIZE]);
    scratch.visible.resize(rows, 0);
    scratch.times.clear();

    let context_pages = &call.tables.pages[block.context_pages.clone()];
    // Rows stand at consecutive positions (context), or all at the same (branches).
    let (first_position, stride, pages) = match block.sees {
        Sees::Causal { first_position } => {
            let pages = call.mask.pages(context_len, first_position + rows - 1, first_position);
            (first_position, 1, pages)
        }
        Sees::Branch { ancestors, context_len, .. } => {
            (context_len + ancestors - 1, 0, context_len.div_ceil(PAGE_SIZE))
        }
    };
    if call.bias.is_some() {
        // The time of the prediction: that of the next event, of the query after the last.
        let next = |row: usize| (first_position + row * stride + 1).min(context_len);
        scratch.times.extend((0..rows).map(|row| times[next(row)]));
    }
    for (page, &id) in context_pages[..pages].iter().enumerate() {
        for (row, visible) in scratch.visible.iter_mut().enumerate() {
            let viewer = match block.sees {
                Sees::Causal { first_position } => Viewer::Context { position: first_position + row },
                Sees::Branch { .. } => Viewer::Branch,
            };
            *visible = call.mask.page(context_len, viewer, page);
        }
        // Rows before the page see nothing of it.
        let Some(first_seeing) = scratch.visible.iter().position(|&visible| visible != 0) else { continue };
        if let Some(bias) = call.bias {
            let keys = &times[page * PAGE_SIZE..context_len.min((page + 1) * PAGE_SIZE)];
            let position = |row: usize| first_position + (first_seeing + row) * stride;
            let (times, out) = (&scratch.times[first_seeing..], &mut scratch.bias[first_seeing..]);
            bias_of_page(bias, page * PAGE_SIZE, keys, times, position, out);
        }
        let mut first = first_seeing;
        while first < rows {
            // Tiles whose last seen key is the same are taken together.
            let (mut end, mut seen) = (first, None);
            while end < rows {
                let next = rows.min(end + tallest);
                let of_tile = last_seen(&scratch.visible[end..next]);
                if seen.is_some_and(|seen| seen != of_tile) {
                    break;
                }
                (end, seen) = (next, Some(of_tile));
            }
            let (height, seen) = (end - first, seen.unwrap_or(0));
            if seen > 0 {
                for (index, head) in heads.clone().enumerate() {
                    let weights = &mut scratch.weights[first..end];
                    weigh(
                        isa,
                        &scratch.queries[(index * rows + first) * shape.key_dim..],
                        shape.key_dim,
                        call.pages[head].context_keys(id),
                        &scratch.bias[first..end],
                        &scratch.visible[first..end],
                        seen,
                        weights,
                    );
                    let values = call.pages[head].values(id);
                    let weighted = Product {
                        rows: Strided { values: weights.as_flattened(), stride: PAGE_SIZE },
                        panel: Strided { values, stride: value_width },
                        height,
                        inner: seen,
                        columns: value_width,
                    };
                    let start = (index * rows + first) * value_width;
                    weighted.add_to(isa, &mut scratch.sums[start..], value_width);
                }
            }
            first = end;
        }
    }
    if let Sees::Branch { ancestors, lineage, ref branch_pages, .. } = block.sees {
        let branch_pages = &call.tables.pages[branch_pages.clone()];
        for row in 0..rows {
            let lineage = &call.tables.lineage[lineage + row * ancestors..][..ancestors];
            see_ancestors(call, lineage, branch_pages, row, rows, heads.clone(), first_position, scratch);
        }
    }
    for (index, head) in heads.enumerate() {
        for row in 0..rows {
            let (start, width) = (head * shape.value_dim, shape.value_dim);
            // SAFETY: a task writes the columns of its own heads in its own rows, and no two tasks
            // share both.
            let out = unsafe { out.row_segment(block.rows.start + row, start, width) };
            let sums = &scratch.sums[(index * rows + row) * value_width..][..width];
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum / shape.divisor;
            }
        }
    }
}

/// Keys up to the last that any of these rows sees.
#[inline(always)]
fn last_seen(visible: &[u32]) -> usize {
    PAGE_SIZE - visible.iter().fold(0, |all, bits| all | bits).leading_zeros() as usize
}

/// Weights of the keys of a page for some queries, one after the other: `silu(bias + <query,
/// key>)`, zero where nothing is seen. No query sees a key after the first `seen`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "one step of attend_block")]
fn weigh(
    isa: Isa,
    queries: &[f32],
    key_dim: usize,
    keys: &[f32],
    bias: &[[f32; PAGE_SIZE]],
    visible: &[u32],
    seen: usize,
    weights: &mut [[f32; PAGE_SIZE]],
) {
    weights.copy_from_slice(bias);
    let products = Product {
        rows: Strided { values: queries, stride: key_dim },
        panel: Strided { values: keys, stride: PAGE_SIZE },
        height: bias.len(),
        inner: key_dim,
        // Near the diagonal the second half of the keys is not seen.
        columns: seen.next_multiple_of(COLUMNS),
    };
    let sums = weights.as_flattened_mut();
    products.add_to(isa, sums, PAGE_SIZE);
    silu_in_place(isa, sums);
    for (weights, &visible) in weights.iter_mut().zip(visible) {
        if visible != u32::MAX {
            for (key, weight) in weights.iter_mut().enumerate() {
                *weight = if visible >> key & 1 == 1 { *weight } else { 0.0 };
            }
        }
    }
}

/// Bias of a tile: rows against the keys of a page, of which the first `keys.len()` exist.
#[inline(always)]
fn bias_of_page(
    bias: &RelativeBias,
    first_key: usize,
    keys: &[i64],
    row_times: &[i64],
    position: impl Fn(usize) -> usize,
    out: &mut [[f32; PAGE_SIZE]],
) {
    let (mut earliest, mut latest) = (i64::MAX, i64::MIN);
    for &time in keys {
        earliest = earliest.min(time);
        latest = latest.max(time);
    }
    // Differences as 32-bit integers where they fit: they convert to the same floats, and faster.
    let mut narrow = [0i32; PAGE_SIZE];
    let fits =
        |difference: i64| i32::try_from(difference).is_ok_and(|d| d > i32::MIN / 2 && d < i32::MAX / 2);
    let narrow_keys = fits(latest - earliest);
    if narrow_keys {
        for (narrow, &key) in narrow.iter_mut().zip(keys) {
            *narrow = (key - earliest) as i32;
        }
    }
    for (row, (out, &time)) in out.iter_mut().zip(row_times).enumerate() {
        let positions = &bias.of_positions(position(row), first_key)[..PAGE_SIZE];
        let outside = time >= latest || time <= earliest;
        let ends = [time.abs_diff(earliest) as f32, time.abs_diff(latest) as f32];
        let shared = if outside { bias.times.shared(ends[0], ends[1]) } else { None };
        if let Some(weight) = shared {
            for key in 0..PAGE_SIZE {
                out[key] = positions[key] + weight;
            }
        } else if narrow_keys && fits(time - earliest) {
            let time = (time - earliest) as i32;
            for key in 0..PAGE_SIZE {
                out[key] = positions[key] + bias.times.of_magnitude((time - narrow[key]).abs() as f32);
            }
        } else {
            for key in 0..keys.len() {
                out[key] = positions[key] + bias.times.of(time - keys[key]);
            }
        }
    }
}

/// A branch row sees its ancestors, itself last. All of them are as old as the query.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "one step of attend_block")]
fn see_ancestors(
    call: &Call<'_>,
    lineage: &[u32],
    branch_pages: &[beamline_kv_cache::PageId],
    row: usize,
    rows: usize,
    heads: Range<usize>,
    position: usize,
    scratch: &mut Scratch,
) {
    let Shape { key_dim, value_dim, .. } = call.shape;
    for (index, head) in heads.enumerate() {
        let pages = &call.pages[head];
        let value_width = pages.value_width();
        let query = &scratch.queries[(index * rows + row) * key_dim..][..key_dim];
        let sums = &mut scratch.sums[(index * rows + row) * value_width..][..value_dim];
        for (generation, &ancestor) in lineage.iter().enumerate() {
            let ancestor = ancestor as usize;
            let (key, value) = pages.branch_row(branch_pages[ancestor / PAGE_SIZE], ancestor % PAGE_SIZE);
            let bias = call.bias.map_or(0.0, |bias| {
                let column = position + 1 + generation - lineage.len();
                bias.of_positions(position, column)[0] + bias.times.of(0)
            });
            let weight = silu(dot(query, key) + bias);
            for (sum, value) in sums.iter_mut().zip(value) {
                *sum = weight.mul_add(*value, *sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use beamline_kv_cache::PageId;

    use super::*;
    use crate::cpu::pages::{Destination, PageStore};

    fn numbers(count: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919) % 1009) as f32 / 500.0 - 1.0).collect()
    }

    fn causal(rows: Range<usize>, first_position: usize) -> Block {
        Block { rows, context_pages: 0..20, sees: Sees::Causal { first_position } }
    }

    #[test]
    fn blocks_are_joined_only_where_one_continues_the_other() {
        let branch = |rows: Range<usize>, lineage| Block {
            rows,
            context_pages: 0..20,
            sees: Sees::Branch { context_len: 640, ancestors: 2, lineage, branch_pages: 20..24 },
        };
        let other = Block { context_pages: 24..44, ..causal(106..110, 106) };
        let blocks = [
            causal(0..10, 22),
            causal(10..42, 32),
            causal(42..74, 64),
            // Another position, another context, another kind.
            causal(74..106, 128),
            other,
            branch(110..142, 0),
            branch(142..150, 64),
            branch(150..152, 0),
        ];
        let rows = |most| strips_of(&blocks, most).into_iter().map(|strip| strip.rows).collect::<Vec<_>>();
        assert_eq!(rows(3), [0..74, 74..106, 106..110, 110..150, 150..152]);
        assert_eq!(rows(2), [0..42, 42..74, 74..106, 106..110, 110..150, 150..152]);
        assert_eq!(strips_of(&blocks, 1), blocks);
    }

    #[test]
    fn a_row_does_not_depend_on_the_strip_it_is_in() {
        const ROWS: usize = 620;
        let (heads, dim) = (3, 20);
        let width = 3 * heads * dim;
        let rows = numbers(ROWS * width);
        let mut store = PageStore::new(1, heads, dim, dim, 20).unwrap();
        for (head, pages) in store.layer_mut(0).iter_mut().enumerate() {
            for position in 0..ROWS {
                let row = &rows[position * width + head * dim..];
                let (page, offset) = (PageId((position / PAGE_SIZE) as u32), position % PAGE_SIZE);
                pages.write(Destination::Context { page, offset }, &row[..dim], &row[heads * dim..][..dim]);
            }
        }
        let times: Vec<i64> = (0..=ROWS as i64).map(|i| i * 40 + i / 9 * 70_000).collect();
        let bias = RelativeBias::new(&numbers(2 * ROWS + 9), &numbers(129));
        let page_ids: Vec<PageId> = (0..20).map(PageId).collect();
        let blocks: Vec<Block> = (0..ROWS)
            .step_by(PAGE_SIZE)
            .map(|first| causal(first..ROWS.min(first + PAGE_SIZE), first))
            .collect();
        for bias in [None, Some(&bias)] {
            let call = Call {
                shape: Shape {
                    heads,
                    key_dim: dim,
                    value_dim: dim,
                    row_width: width,
                    query_column: 2 * heads * dim,
                    logit_scale: 0.3,
                    divisor: 211.0,
                },
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
            let attended = |blocks: &[&[Block]], threads| {
                let cpu = Cpu::new(threads).unwrap();
                let mut out = vec![0.0; ROWS * heads * dim];
                blocks.iter().for_each(|blocks| attend(&cpu, &call, blocks, &mut out));
                out.iter().map(|x: &f32| x.to_bits()).collect::<Vec<_>>()
            };
            let one_by_one = attended(&blocks.chunks(1).collect::<Vec<_>>(), 1);
            for threads in [1, 2, 5] {
                assert!(attended(&[&blocks], threads) == one_by_one, "{threads} threads");
                assert!(attended(&[&blocks[..7], &blocks[7..]], threads) == one_by_one, "{threads} threads");
            }
        }
    }
}
