//! The kernels of HSTU by name: their arguments, and how many threads run them.
//!
//! Place in the flow and safety: as [`cuda::kernels`](crate::cuda::kernels).

use bytemuck::{Pod, Zeroable};

use super::{ATTENTION_THREADS, FEW_QUERIES, THREADS, WARPS, blocks, count, queries, row_threads, run};
use crate::cpu::mask::Mask;
use crate::cuda::device::{Argument, Device, DeviceError};
use crate::cuda::tiles::Tiles;

/// `items` of kernels/pointwise_attention.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Item {
    /// First row of the step.
    pub first_row: u32,
    /// Number of rows.
    pub rows: u32,
    /// Where the context's pages begin in the page table.
    pub pages: u32,
    /// First key that the rows see.
    pub key_begin: u32,
    /// End of the keys.
    pub key_end: u32,
    /// Where the result of the first row goes.
    pub out_first_row: u32,
    /// Position of the first row.
    pub position: u32,
    /// From the position of a row to that of the next: 1 for context rows, 0 for branch rows.
    pub step: u32,
    /// Positions of the context.
    pub context_len: u32,
    /// Where its times begin.
    pub times: u32,
}

/// Most columns of a head.
pub const MOST_HEAD: usize = 256;
/// Bytes of `TimeTable` in kernels/pointwise_tile.cuh, which is the last of a block's shared memory.
const TIME_TABLE: usize = 3328;

/// The widths that keys and values have in pages, for heads of these widths; none if there is no kernel.
pub fn padded_widths(widths: [usize; 2]) -> Option<[usize; 2]> {
    let pad = |width: usize| [16, 32, 64, 128].into_iter().find(|&padded| width <= padded);
    if widths.iter().any(|&width| width == 0 || width > MOST_HEAD) {
        return None;
    }
    match widths.map(pad) {
        [Some(key), Some(value)] => Some([key, value]),
        _ => Some([MOST_HEAD; 2]),
    }
}

/// `Shared<S>::BYTES` of kernels/pointwise_tile.cuh.
fn shared([key, value]: [usize; 2], few: bool) -> u32 {
    let widest = key.max(value);
    let keys = if widest <= 64 { 64 } else { 32 };
    let queries = if few { FEW_QUERIES } else { queries(widest) };
    let stages = if few && widest <= 128 { 4 } else { 2 };
    let weights = if few { 2 * queries * keys } else { 0 };
    let tiles = 2 * queries * key + 2 * stages * keys * (key + value) + weights;
    let beside = 8 * keys + 16 * (keys / 32) + 4 * (queries + keys);
    let table = if few || widest <= 128 { TIME_TABLE } else { 0 };
    (tiles + 2 * beside + 16 * queries + table) as u32
}

macro_rules! by_value {
    ($prefix:literal, $value:expr) => {
        match $value {
            16 => concat!($prefix, "_16"),
            32 => concat!($prefix, "_32"),
            64 => concat!($prefix, "_64"),
            _ => concat!($prefix, "_128"),
        }
    };
}

/// The kernels of many and of few queries.
fn attention_names([key, value]: [usize; 2]) -> [&'static str; 2] {
    match key {
        16 => [by_value!("pointwise_attention_16", value), by_value!("pointwise_attention_few_16", value)],
        32 => [by_value!("pointwise_attention_32", value), by_value!("pointwise_attention_few_32", value)],
        64 => [by_value!("pointwise_attention_64", value), by_value!("pointwise_attention_few_64", value)],
        128 => [by_value!("pointwise_attention_128", value), by_value!("pointwise_attention_few_128", value)],
        _ => ["pointwise_attention_256_256", "pointwise_attention_few_256_256"],
    }
}

/// Ids to the residual stream.
#[derive(Clone, Copy, Debug)]
pub struct Embed {
    pub items: u64,
    /// Null without actions.
    pub actions: u64,
    pub positions: u64,
    pub item_table: u64,
    pub action_table: u64,
    pub position_table: u64,
    pub hidden: u64,
    pub rows: usize,
    pub item_count: usize,
    pub padding: u32,
    pub item_dim: usize,
    pub action_dim: usize,
    pub width: usize,
    /// Whether the action's row follows the item's.
    pub concat: bool,
    pub scale: f32,
}

/// Looks ids up.
pub fn embed(device: &dyn Device, e: &Embed) -> Result<(), DeviceError> {
    let arguments = [
        e.items.into(),
        e.actions.into(),
        e.positions.into(),
        e.item_table.into(),
        e.action_table.into(),
        e.position_table.into(),
        e.hidden.into(),
        count(e.rows),
        count(e.item_count),
        e.padding.into(),
        count(e.item_dim),
        count(e.action_dim),
        count(e.width),
        u32::from(e.concat).into(),
        e.scale.into(),
    ];
    // SAFETY: see the module.
    unsafe { run(device, "hstu_embed", [blocks(e.rows * e.width, THREADS), 1], THREADS, 0, &arguments) }
}

/// Adds to the residual stream, and norms it. What is null is left out.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResidualNorm {
    pub hidden: u64,
    /// Rows of `hidden` that are taken, or null for all.
    pub rows_from: u64,
    pub delta: u64,
    pub bias: u64,
    pub norm: [u64; 2],
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
        n.norm[0].into(),
        n.norm[1].into(),
        n.hidden_out.into(),
        n.out.into(),
        count(n.width),
        n.eps.into(),
    ];
    // SAFETY: see the module.
    unsafe { run(device, "hstu_residual_norm", [n.rows as u32, 1], row_threads(n.width), 0, &arguments) }
}

/// What a final state becomes before it is compared with items or tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Finish {
    /// Rounded, and nothing more.
    Nothing,
    /// Divided by its length, or by this if that is more.
    L2(f32),
    /// Normed with this epsilon.
    LayerNorm(f32),
}

/// Turns final states into what is compared: bf16, and the most that a product with a vector of unit
/// length can be.
pub fn finish(
    device: &dyn Device,
    states: u64,
    out: u64,
    bounds: u64,
    [rows, width]: [usize; 2],
    finish: Finish,
) -> Result<(), DeviceError> {
    let (kind, number) = match finish {
        Finish::Nothing => (0_u32, 0.0),
        Finish::L2(least) => (1, least),
        Finish::LayerNorm(eps) => (2, eps),
    };
    let arguments =
        [states.into(), out.into(), bounds.into(), count(width), kind.into(), Argument::F32(number)];
    // SAFETY: see the module.
    unsafe { run(device, "hstu_finish", [rows as u32, 1], row_threads(width), 0, &arguments) }
}

/// Heads of a layer, where they lie, and the constants of attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub heads: usize,
    /// Widths of keys and values.
    pub widths: [usize; 2],
    /// The same in pages and queries.
    pub padded: [usize; 2],
    pub scale: f32,
    pub divisor: f32,
    pub mask: Mask,
    /// Positions of the bias, if there is one.
    pub positions: usize,
}

impl Heads {
    /// Width of all values.
    pub fn values(&self) -> usize {
        self.heads * self.widths[1]
    }
}

/// u, v, q and k to where they are read.
#[derive(Clone, Copy, Debug)]
pub struct Split {
    pub uvqk: u64,
    pub bias: u64,
    pub places: u64,
    pub u: u64,
    pub queries: u64,
    pub keys: u64,
    pub values: u64,
    pub rows: usize,
    /// 2: of all four, 1: of u, 0: of none.
    pub silu: u32,
}

/// Splits the columns of `uvqk` into u, queries, keys and values.
pub fn split(device: &dyn Device, heads: &Heads, s: &Split) -> Result<(), DeviceError> {
    let arguments = [
        s.uvqk.into(),
        s.bias.into(),
        s.places.into(),
        s.u.into(),
        s.queries.into(),
        s.keys.into(),
        s.values.into(),
        count(s.rows),
        count(heads.heads),
        count(heads.widths[0]),
        count(heads.widths[1]),
        count(heads.padded[0]),
        count(heads.padded[1]),
        s.silu.into(),
    ];
    let grid = [blocks(s.rows * 4 * heads.heads, THREADS / 32), 1];
    // SAFETY: see the module.
    unsafe { run(device, "hstu_split", grid, THREADS, 0, &arguments) }
}

/// Where attention finds what it needs.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    pub queries: u64,
    pub keys: u64,
    pub values: u64,
    pub pages: u64,
    pub times: u64,
    /// Null without a bias.
    pub time_table: u64,
    pub position_weights: u64,
    pub out: u64,
    pub merge: u64,
    pub lineage: u64,
    pub merge_rows: usize,
}

/// Attention of all items, then of branch rows their parts together with their ancestors.
pub fn attend(
    device: &dyn Device,
    heads: &Heads,
    a: &Attention,
    items: &Tiles<Item>,
    addresses: [u64; 2],
) -> Result<(), DeviceError> {
    let sizes = [heads.scale.into(), heads.divisor.into()];
    let mask = heads.mask;
    let kinds = attention_names(heads.padded).into_iter().zip(items.counts()).zip(addresses);
    for (kind, ((name, items), address)) in kinds.enumerate() {
        let arguments = [
            a.queries.into(),
            a.keys.into(),
            a.values.into(),
            address.into(),
            a.pages.into(),
            a.times.into(),
            a.time_table.into(),
            a.position_weights.into(),
            a.out.into(),
            count(heads.heads),
            count(heads.widths[1]),
            count(heads.positions),
            sizes[0],
            sizes[1],
            count(mask.contextual),
            count(mask.window),
            count(mask.full_tail),
        ];
        let grid = [items as u32, heads.heads as u32];
        // SAFETY: see the module.
        unsafe { run(device, name, grid, ATTENTION_THREADS, shared(heads.padded, kind == 1), &arguments) }?;
    }
    let arguments = [
        a.queries.into(),
        a.keys.into(),
        a.values.into(),
        a.merge.into(),
        a.lineage.into(),
        a.time_table.into(),
        a.position_weights.into(),
        a.out.into(),
        count(heads.heads),
        count(heads.padded[0]),
        count(heads.padded[1]),
        count(heads.widths[1]),
        count(heads.positions),
        sizes[0],
        sizes[1],
    ];
    let grid = [a.merge_rows as u32, heads.heads.div_ceil(WARPS) as u32];
    // SAFETY: see the module.
    unsafe { run(device, "pointwise_merge", grid, ATTENTION_THREADS, 0, &arguments) }
}

/// The gate of what attention found.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    pub attended: u64,
    pub u: u64,
    /// Rows of both that are taken, or null for all.
    pub rows_from: u64,
    pub norm: [u64; 2],
    pub out: u64,
    pub rows: usize,
    /// 0: u n, 1: u, a, u n, 2: u, n, u n.
    pub parts: u32,
    /// Whether each head is normed by itself.
    pub by_head: bool,
    pub eps: f32,
}

/// Norms and gates.
pub fn gate(device: &dyn Device, heads: &Heads, g: &Gate) -> Result<(), DeviceError> {
    let [attended, u, rows_from, weight, bias, out]: [Argument; 6] =
        [g.attended, g.u, g.rows_from, g.norm[0], g.norm[1], g.out].map(Into::into);
    let (parts, eps) = (g.parts.into(), g.eps.into());
    let width = heads.values();
    if g.by_head {
        let sizes = [count(g.rows), count(heads.heads), count(heads.widths[1])];
        let arguments = [attended, u, rows_from, weight, bias, out, sizes[0], sizes[1], sizes[2], parts, eps];
        let grid = [blocks(g.rows * heads.heads, THREADS / 32), 1];
        // SAFETY: see the module.
        return unsafe { run(device, "hstu_gate_group", grid, THREADS, 0, &arguments) };
    }
    let arguments = [attended, u, rows_from, weight, bias, out, count(width), parts, eps];
    // SAFETY: see the module.
    unsafe { run(device, "hstu_gate", [g.rows as u32, 1], row_threads(width), 0, &arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_is_what_the_kernels_say() {
        // As kernels/README.md lists it, from assertions in pointwise_attention.cu: by key, then by
        // value, of many and of few.
        let listed = [
            [[20_288, 27_200], [24_384, 35_392], [32_576, 51_776], [29_728, 44_832]],
            [[28_480, 36_416], [32_576, 44_608], [40_768, 60_992], [35_872, 49_952]],
            [[44_864, 54_848], [48_960, 63_040], [57_152, 79_424], [48_160, 60_192]],
            [[58_400, 52_000], [60_448, 56_096], [64_544, 64_288], [72_736, 80_672]],
        ];
        let widths = [16, 32, 64, 128];
        for (key, by_value) in widths.into_iter().zip(listed) {
            for (value, bytes) in widths.into_iter().zip(by_value) {
                let widths = [key, value];
                assert_eq!([shared(widths, false), shared(widths, true)], bytes, "{widths:?}");
                let names = attention_names(widths);
                assert_eq!(names[0], format!("pointwise_attention_{key}_{value}"));
                assert_eq!(names[1], format!("pointwise_attention_few_{key}_{value}"));
            }
        }
        let widest = [shared([256; 2], false), shared([256; 2], true)];
        assert_eq!(widest, [100_640, 88_864]);
        assert_eq!(padded_widths([5, 33]), Some([16, 64]));
        assert_eq!(padded_widths([16, 129]), Some([256, 256]));
        assert_eq!([padded_widths([0, 4]), padded_widths([4, 257])], [None, None]);
    }
}
