//! What becomes of the products of a tile and a panel.

use super::GATED;
use super::scores::Target;
use crate::cpu::isa::{Isa, per_isa};
use crate::cpu::tile::{PANEL, SharedMatrix};
use crate::cpu::vector::{self, exp, larger};

/// Where products go. Each pair of tile and panel is stored by one call, so calls write disjoint places.
#[derive(Clone, Copy)]
pub(super) enum Sink<'a> {
    /// Overwrites a matrix.
    Replace(SharedMatrix<'a>),
    /// Overwrites a matrix, with SiLU on its columns before this one.
    Silu(SharedMatrix<'a>, usize),
    /// Adds to a matrix.
    Add(SharedMatrix<'a>),
    /// `silu(gate) * up`: the gates are the first half of a panel.
    Gate(SharedMatrix<'a>),
    /// Keeps some logits and sums up the exponentials of all.
    Score(Target<'a>),
}

impl Sink<'_> {
    /// Takes the products of rows from `first_row` on and one panel.
    pub(super) fn store(
        self,
        isa: Isa,
        sums: &mut [[f32; PANEL]],
        bias: Option<&[f32; PANEL]>,
        first_row: usize,
        panel: usize,
    ) {
        if let Some(bias) = bias {
            sums.iter_mut().for_each(|sums| add_bias(isa, sums, bias));
        }
        match self {
            Self::Replace(out) => replace(isa, out, sums, first_row, panel),
            Self::Silu(out, end) => {
                activate(isa, sums, end.saturating_sub(panel * PANEL));
                replace(isa, out, sums, first_row, panel);
            }
            Self::Add(out) => add(isa, out, sums, first_row, panel),
            Self::Gate(out) => gate(isa, out, sums, first_row, panel),
            Self::Score(target) => score(isa, target, sums, first_row, panel),
        }
    }
}

// One function each, so that none of them pays for the registers of another.

per_isa! {
    /// For one row: given several, the compiler goes along their columns, with gathers and scatters.
    fn add_bias(sums: &mut [f32; PANEL], bias: &[f32; PANEL]) = add_bias_body
}

#[inline(always)]
fn add_bias_body<const R: usize>(sums: &mut [f32; PANEL], bias: &[f32; PANEL]) {
    for column in 0..PANEL {
        sums[column] += bias[column];
    }
}

per_isa! {
    fn activate(sums: &mut [[f32; PANEL]], columns: usize) = activate_body
}

#[inline(always)]
fn activate_body<const R: usize>(sums: &mut [[f32; PANEL]], columns: usize) {
    if columns >= PANEL {
        sums.as_flattened_mut().iter_mut().for_each(|sum| *sum = vector::silu(*sum));
    } else if columns > 0 {
        for sums in sums {
            sums[..columns].iter_mut().for_each(|sum| *sum = vector::silu(*sum));
        }
    }
}

per_isa! {
    fn replace(out: SharedMatrix<'_>, sums: &[[f32; PANEL]], first_row: usize, panel: usize) = replace_body
}

#[inline(always)]
fn replace_body<const R: usize>(
    out: SharedMatrix<'_>,
    sums: &[[f32; PANEL]],
    first_row: usize,
    panel: usize,
) {
    for (row, sums) in sums.iter().enumerate() {
        // SAFETY: one call stores this row and panel.
        write(unsafe { segment(out, first_row + row, panel * PANEL, PANEL) }, sums, |_, sum| sum);
    }
}

per_isa! {
    fn add(out: SharedMatrix<'_>, sums: &[[f32; PANEL]], first_row: usize, panel: usize) = add_body
}

#[inline(always)]
fn add_body<const R: usize>(out: SharedMatrix<'_>, sums: &[[f32; PANEL]], first_row: usize, panel: usize) {
    for (row, sums) in sums.iter().enumerate() {
        // SAFETY: one call stores this row and panel.
        write(unsafe { segment(out, first_row + row, panel * PANEL, PANEL) }, sums, |old, sum| old + sum);
    }
}

per_isa! {
    fn gate(out: SharedMatrix<'_>, sums: &[[f32; PANEL]], first_row: usize, panel: usize) = gate_body
}

#[inline(always)]
fn gate_body<const R: usize>(out: SharedMatrix<'_>, sums: &[[f32; PANEL]], first_row: usize, panel: usize) {
    for (row, sums) in sums.iter().enumerate() {
        // A loop, because `array::from_fn` is not vectorised here.
        let mut gated = [0.0; GATED];
        for column in 0..GATED {
            gated[column] = silu(sums[column]) * sums[GATED + column];
        }
        // SAFETY: one call stores this row and panel.
        write(unsafe { segment(out, first_row + row, panel * GATED, GATED) }, &gated, |_, value| value);
    }
}

per_isa! {
    fn score(target: Target<'_>, sums: &[[f32; PANEL]], first_row: usize, panel: usize) = score_body
}

#[inline(always)]
fn score_body<const R: usize>(target: Target<'_>, sums: &[[f32; PANEL]], first_row: usize, panel: usize) {
    for (row, sums) in sums.iter().enumerate() {
        target.store(first_row + row, panel, sums);
    }
}

/// The columns of a panel that exist.
///
/// # Safety
///
/// As [`SharedMatrix::row_segment`].
#[inline(always)]
unsafe fn segment(out: SharedMatrix<'_>, row: usize, column: usize, width: usize) -> &mut [f32] {
    // SAFETY: by contract.
    unsafe { out.row_segment(row, column, width.min(out.columns() - column)) }
}

#[inline(always)]
fn write<const W: usize>(out: &mut [f32], values: &[f32; W], combine: impl Fn(f32, f32) -> f32) {
    // A whole panel is a fixed number of vector instructions; the last one of a matrix may be narrower.
    if let Ok(out) = <&mut [f32; W]>::try_from(&mut *out) {
        for column in 0..W {
            out[column] = combine(out[column], values[column]);
        }
    } else {
        for (out, value) in out.iter_mut().zip(values) {
            *out = combine(*out, *value);
        }
    }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-larger(x, -87.0)))
}
