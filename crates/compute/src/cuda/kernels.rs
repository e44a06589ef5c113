//! The kernels of `kernels/` by name: their arguments, and how many threads run them.
//!
//! Place in the flow: the only callers of [`Device::launch`]. A kernel's source says what it does and
//! how its data is laid out; here is what the host must know to start it.
//!
//! Safety of all of them: addresses come from buffers that the forward pass and the executor make as
//! large as the layout of the step says, descriptors are those of that layout, and work of a step is
//! done in order.

#![allow(
    missing_docs,
    reason = "arguments have the names that they have in `kernels/`, where they are described"
)]

pub mod hstu;

use super::device::{Argument, Device, DeviceError, Launch, Product};
use super::layout::{Layout, PrefillTile};
use super::rows::{RowArrays, Rows};
use super::tiles::Tiles;

/// Queries up to which a tile is one of few.
pub const FEW_QUERIES: usize = 32;
/// Warps of a block of attention.
pub const WARPS: usize = 4;
/// Threads of a block of attention.
pub const ATTENTION_THREADS: u32 = 32 * WARPS as u32;
/// Threads of a block of most others.
pub const THREADS: u32 = 256;
/// Widths of heads that there are kernels for.
const PADDED_DIMS: [usize; 5] = [16, 32, 64, 128, 256];
/// Candidates that a block of an expansion sees to at a time.
const EXPAND_TILE: usize = 1024;
/// Columns that a block of `log_sum_exp` sees to.
const LOG_SUM_EXP_CHUNK: usize = 8192;
/// Beams of a block of `branch_rows`.
const BRANCH_ROWS: usize = 128;
/// Candidates up to which one block does the whole expansion.
const EXPAND_SMALL: usize = 2048;
/// Candidates from which on it pays to narrow the cut on all blocks, in case many have about the same
/// score.
const MANY_CANDIDATES: usize = 1 << 20;
/// Blocks of an expansion per multiprocessor.
const EXPAND_BLOCKS: u32 = 3;
/// Most branch rows that a beam consists of: lanes of a warp.
pub const MOST_ANCESTORS: usize = 32;
/// Most columns of the residual stream.
pub const MOST_WIDTH: usize = 16_384;

/// The width that a head has in pages.
pub fn padded_dim(head_dim: usize) -> Option<usize> {
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return None;
    }
    PADDED_DIMS.into_iter().find(|&padded| head_dim <= padded)
}

/// Queries of a tile of many.
pub fn queries(padded_dim: usize) -> usize {
    WARPS * 16 * if padded_dim <= 128 { 2 } else { 1 }
}

/// Keys of a tile.
fn keys(padded_dim: usize) -> usize {
    if padded_dim <= 64 { 64 } else { 32 }
}

/// Tiles of keys that are on their way, in tiles of few queries.
fn few_stages(padded_dim: usize) -> usize {
    if padded_dim <= 128 { 4 } else { 2 }
}

/// `by_rows_bytes` and `by_keys_bytes` of kernels/attention_tile.cuh.
fn attention_shared(padded_dim: usize, few: bool) -> u32 {
    let (keys, queries) = (keys(padded_dim), queries(padded_dim));
    let tile = keys * padded_dim;
    let bytes = match few {
        false => (queries * padded_dim + 4 * tile) * 2 + queries * 4,
        true => {
            let copies =
                (FEW_QUERIES * padded_dim + 2 * few_stages(padded_dim) * tile + FEW_QUERIES * keys) * 2;
            copies + (1 + WARPS) * FEW_QUERIES * 4
        }
    };
    bytes as u32
}

macro_rules! by_dim {
    ($prefix:literal, $dim:expr) => {
        match $dim {
            16 => concat!($prefix, "_16"),
            32 => concat!($prefix, "_32"),
            64 => concat!($prefix, "_64"),
            128 => concat!($prefix, "_128"),
            _ => concat!($prefix, "_256"),
        }
    };
}

pub fn count(value: usize) -> Argument {
    Argument::U32(value as u32)
}

pub fn blocks(of: usize, each: u32) -> u32 {
    of.div_ceil(each as usize) as u32
}

/// Where the arrays of a step lie, of rows that attend with a softmax.
#[derive(Clone, Copy, Debug)]
pub struct StepArrays {
    /// Of the rows.
    pub rows: RowArrays,
    /// Tiles of many and of few queries.
    pub prefill: [u64; 2],
    /// The same of the last layer.
    pub final_prefill: [u64; 2],
    /// Items of many and of few queries.
    pub branch: [u64; 2],
}

/// A matrix product, in the order of computing.
///
/// # Errors
///
/// When the device fails.
pub fn multiply(device: &dyn Device, product: Product) -> Result<(), DeviceError> {
    // SAFETY: see the module.
    unsafe { device.multiply(product) }
}

/// Runs a kernel, unless no block does.
///
/// # Safety
///
/// As [`Device::launch`].
pub unsafe fn run(
    device: &dyn Device,
    kernel: &'static str,
    grid: [u32; 2],
    block: u32,
    shared: u32,
    arguments: &[Argument],
) -> Result<(), DeviceError> {
    if grid[0] == 0 || grid[1] == 0 {
        return Ok(());
    }
    let launch = Launch { grid: [grid[0], grid[1], 1], block, shared };
    // SAFETY: the caller's.
    unsafe { device.launch(kernel, launch, arguments) }
}

/// Threads of a block that has a row of the residual stream.
pub fn row_threads(width: usize) -> u32 {
    (width.div_ceil(256) * 32).min(1024) as u32
}

/// Fills in tokens, positions, places and lineages of rows of beams.
pub fn branch_rows(device: &dyn Device, arrays: &RowArrays, rows: &Rows) -> Result<(), DeviceError> {
    let grid = [blocks(rows.widest(), BRANCH_ROWS as u32), rows.requests.len() as u32];
    let arguments = [
        arrays.requests.into(),
        arrays.tokens.into(),
        arrays.positions.into(),
        arrays.places.into(),
        arrays.lineage.into(),
    ];
    // SAFETY: see the module.
    unsafe { run(device, "branch_rows", grid, BRANCH_ROWS as u32, 0, &arguments) }
}

/// Tokens to the residual stream, and its norm.
#[derive(Clone, Copy, Debug)]
pub struct Embed {
    pub tokens: u64,
    pub table: u64,
    pub norm: u64,
    pub hidden: u64,
    pub out: u64,
    pub rows: usize,
    pub vocab: usize,
    pub width: usize,
    pub eps: f32,
}

/// Looks tokens up.
pub fn embed(device: &dyn Device, e: &Embed) -> Result<(), DeviceError> {
    let arguments = [
        e.tokens.into(),
        e.table.into(),
        e.norm.into(),
        e.hidden.into(),
        e.out.into(),
        count(e.vocab),
        count(e.width),
        e.eps.into(),
    ];
    // SAFETY: see the module.
    unsafe { run(device, "embed_rms_norm", [e.rows as u32, 1], row_threads(e.width), 0, &arguments) }
}

/// Adds to the residual stream, and norms it.
#[derive(Clone, Copy, Debug)]
pub struct ResidualNorm {
    pub hidden: u64,
    /// Rows of `hidden` that are taken, or null for all.
    pub rows_from: u64,
    /// What is added, or null.
    pub delta: u64,
    /// What is added to every row, or null.
    pub bias: u64,
    pub norm: u64,
    /// Where the sum goes; another place than `hidden` if rows are taken.
    pub hidden_out: u64,
    pub out: u64,
    pub rows: usize,
    pub width: usize,
    pub eps: f32,
}

/// Adds and norms.
pub fn residual_norm(device: &dyn Device, n: &ResidualNorm) -> Result<(), DeviceError> {
    let arguments = [
        n.hidden.into(),
        n.rows_from.into(),
        n.delta.into(),
        n.bias.into(),
        n.norm.into(),
        n.hidden_out.into(),
        n.out.into(),
        count(n.width),
        n.eps.into(),
    ];
    // SAFETY: see the module.
    unsafe { run(device, "residual_rms_norm", [n.rows as u32, 1], row_threads(n.width), 0, &arguments) }
}

/// The gate of a feed-forward layer.
pub fn gate(
    device: &dyn Device,
    gate_up: u64,
    bias: u64,
    out: u64,
    rows: usize,
    inner: usize,
) -> Result<(), DeviceError> {
    let arguments = [gate_up.into(), bias.into(), out.into(), count(rows), count(inner)];
    let grid = [blocks(rows * inner.div_ceil(8), THREADS), 1];
    // SAFETY: see the module.
    unsafe { run(device, "silu_gate", grid, THREADS, 0, &arguments) }
}

/// Picks rows out: bf16 `[rows, width]`.
pub fn gather(
    device: &dyn Device,
    from: u64,
    rows_from: u64,
    to: u64,
    rows: usize,
    width: usize,
) -> Result<(), DeviceError> {
    let bytes = 2 * width;
    let words = if bytes.is_multiple_of(16) { bytes / 16 } else { bytes / 2 };
    let arguments = [from.into(), rows_from.into(), to.into(), count(rows), count(bytes)];
    // SAFETY: see the module.
    unsafe { run(device, "gather_rows", [blocks(rows * words, THREADS), 1], THREADS, 0, &arguments) }
}

/// Queries, keys and values: norms, rotation, and where they go.
#[derive(Clone, Copy, Debug)]
pub struct RotaryStore {
    pub qkv: u64,
    pub bias: u64,
    pub norms: [u64; 2],
    pub eps: f32,
    pub positions: u64,
    pub table: u64,
    pub places: u64,
    pub queries: u64,
    pub keys: u64,
    pub values: u64,
    pub rows: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub padded_dim: usize,
}

/// Turns queries and keys, and stores keys and values.
pub fn rotary_store(device: &dyn Device, r: &RotaryStore) -> Result<(), DeviceError> {
    let arguments = [
        r.qkv.into(),
        r.bias.into(),
        r.norms[0].into(),
        r.norms[1].into(),
        r.table.into(),
        r.positions.into(),
        r.places.into(),
        r.queries.into(),
        r.keys.into(),
        r.values.into(),
        count(r.rows),
        count(r.heads),
        count(r.kv_heads),
        count(r.dim),
        count(r.padded_dim),
        r.eps.into(),
    ];
    let grid = [blocks(r.rows * (r.heads + 2 * r.kv_heads), THREADS / 32), 1];
    // SAFETY: see the module.
    unsafe { run(device, "rotary_store", grid, THREADS, 0, &arguments) }
}

/// Where attention finds what it needs.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    pub queries: u64,
    pub keys: u64,
    pub values: u64,
    pub pages: u64,
    pub out: u64,
    pub partial_out: u64,
    pub partial_state: u64,
    pub lineage: u64,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub padded_dim: usize,
}

impl Attention {
    /// Logits are in units of log2(e), so that weights are powers of two.
    fn scale(&self) -> Argument {
        Argument::F32(std::f32::consts::LOG2_E / (self.dim as f32).sqrt())
    }
}

/// Attention of context rows.
pub fn attend_context(
    device: &dyn Device,
    a: &Attention,
    tiles: &Tiles<PrefillTile>,
    addresses: [u64; 2],
) -> Result<(), DeviceError> {
    let names = [by_dim!("prefill_attention", a.padded_dim), by_dim!("prefill_attention_few", a.padded_dim)];
    for (kind, (name, tiles)) in names.into_iter().zip(tiles.counts()).enumerate() {
        let arguments = [
            a.queries.into(),
            a.keys.into(),
            a.values.into(),
            addresses[kind].into(),
            a.pages.into(),
            a.out.into(),
            count(a.heads),
            count(a.kv_heads),
            count(a.dim),
            a.scale(),
        ];
        let (grid, shared) = ([tiles as u32, a.kv_heads as u32], attention_shared(a.padded_dim, kind == 1));
        // SAFETY: see the module.
        unsafe { run(device, name, grid, ATTENTION_THREADS, shared, &arguments) }?;
    }
    Ok(())
}

/// Attention of branch rows: parts of the contexts, then all parts together with the ancestors.
pub fn attend_branches(
    device: &dyn Device,
    a: &Attention,
    layout: &Layout,
    arrays: &StepArrays,
) -> Result<(), DeviceError> {
    let names = [by_dim!("branch_attention", a.padded_dim), by_dim!("branch_attention_few", a.padded_dim)];
    for (kind, (name, items)) in names.into_iter().zip(layout.branch.counts()).enumerate() {
        let arguments = [
            a.queries.into(),
            a.keys.into(),
            a.values.into(),
            arrays.branch[kind].into(),
            a.pages.into(),
            a.partial_out.into(),
            a.partial_state.into(),
            count(a.heads),
            count(a.kv_heads),
            a.scale(),
        ];
        let (grid, shared) = ([items as u32, a.kv_heads as u32], attention_shared(a.padded_dim, kind == 1));
        // SAFETY: see the module.
        unsafe { run(device, name, grid, ATTENTION_THREADS, shared, &arguments) }?;
    }
    let arguments = [
        a.queries.into(),
        a.keys.into(),
        a.values.into(),
        a.partial_out.into(),
        a.partial_state.into(),
        arrays.rows.merge.into(),
        a.lineage.into(),
        a.out.into(),
        count(a.heads),
        count(a.kv_heads),
        count(a.dim),
        a.scale(),
    ];
    let grid = [layout.rows.merge.len() as u32, a.heads.div_ceil(WARPS) as u32];
    // SAFETY: see the module.
    unsafe { run(device, by_dim!("branch_merge", a.padded_dim), grid, ATTENTION_THREADS, 0, &arguments) }
}

/// Logits to what normalises them, and a copy of some.
#[derive(Clone, Copy, Debug)]
pub struct LogSumExp {
    pub logits: u64,
    pub rows: usize,
    pub columns: usize,
    pub out: u64,
    pub kept: u64,
    pub kept_first: u32,
    pub kept_count: usize,
    pub partial: u64,
    pub arrived: u64,
}

/// Bytes of partial results for this number of rows.
pub fn log_sum_exp_partial_bytes(rows: usize, columns: usize) -> usize {
    8 * rows * columns.div_ceil(LOG_SUM_EXP_CHUNK)
}

/// Log-sum-exp of each row of logits.
pub fn log_sum_exp(device: &dyn Device, l: &LogSumExp) -> Result<(), DeviceError> {
    let arguments = [
        l.logits.into(),
        (l.columns as u64).into(),
        count(l.columns),
        l.out.into(),
        l.kept.into(),
        l.kept_first.into(),
        count(l.kept_count),
        l.partial.into(),
        l.arrived.into(),
    ];
    let grid = [l.rows as u32, l.columns.div_ceil(LOG_SUM_EXP_CHUNK) as u32];
    // SAFETY: see the module.
    unsafe { run(device, "log_sum_exp_f32", grid, THREADS, 0, &arguments) }
}

/// How large the expansions of a step are, which says how many threads run them.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExpandSizes {
    /// Number of searches.
    pub searches: usize,
    /// Width of the widest beam.
    pub width: usize,
    /// Candidates of the search that has most, at most.
    pub candidates: usize,
    /// Candidates that the widest search keeps for its last selection.
    pub capacity: usize,
    /// Whether any search is normalised over allowed continuations.
    pub normalizes: bool,
}

/// One step of some searches.
pub fn expand(device: &dyn Device, steps: u64, sizes: &ExpandSizes) -> Result<(), DeviceError> {
    let searches = sizes.searches as u32;
    let one = |kernel, blocks: u32, block, arguments: &[Argument]| {
        // SAFETY: see the module.
        unsafe { run(device, kernel, [blocks, searches], block, 0, arguments) }
    };
    if sizes.candidates.max(sizes.width) <= EXPAND_SMALL {
        // SAFETY: see the module.
        return unsafe { run(device, "expand_small", [searches, 1], THREADS, 0, &[steps.into()]) };
    }
    let most = (EXPAND_BLOCKS * device.multiprocessors() / searches.max(1)).max(1);
    let tiles = blocks(sizes.candidates, EXPAND_TILE as u32).clamp(1, most);
    let refinements: u32 = if sizes.candidates > MANY_CANDIDATES { 2 } else { 0 };
    // SAFETY: see the module.
    unsafe { run(device, "expand_begin", [searches, 1], 1024, 0, &[steps.into()]) }?;
    if sizes.normalizes {
        one("expand_normalize", blocks(sizes.width, 8), THREADS, &[steps.into()])?;
    }
    one("expand_histogram", tiles, THREADS, &[steps.into(), refinements.into()])?;
    for left in (0..refinements).rev() {
        one("expand_refine", tiles, THREADS, &[steps.into(), left.into()])?;
    }
    one("expand_collect", tiles, THREADS, &[steps.into()])?;
    one("expand_finish", blocks(sizes.capacity, THREADS), THREADS, &[steps.into()])
}

/// Fills bf16 values with numbers of a normal distribution of this deviation.
pub fn fill_normal(
    device: &dyn Device,
    to: u64,
    values: usize,
    seed: u32,
    deviation: f32,
) -> Result<(), DeviceError> {
    let arguments = [to.into(), (values as u64).into(), seed.into(), deviation.into()];
    // SAFETY: the caller's memory holds this number of values.
    unsafe { run(device, "fill_normal", [blocks(values, 1024).min(1 << 20), 1], THREADS, 0, &arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_is_what_the_kernels_say() {
        // As kernels/README.md lists it, from assertions in attention_tile.cuh. Every GPU has 99 KiB.
        let many = [12_800, 25_088, 49_664, 66_048, 98_560];
        let few = [22_144, 39_552, 74_368, 76_416, 84_608];
        for ((dim, many), few) in PADDED_DIMS.into_iter().zip(many).zip(few) {
            assert_eq!([attention_shared(dim, false), attention_shared(dim, true)], [many, few], "{dim}");
        }
        assert_eq!(
            [1, 2, 16, 17, 18, 128, 256, 258].map(padded_dim),
            [None, Some(16), Some(16), None, Some(32), Some(128), Some(256), None]
        );
    }
}
