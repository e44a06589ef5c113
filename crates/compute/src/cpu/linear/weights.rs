//! A weight matrix in one of the formats, cut into panels of [`PANEL`] outputs.

use super::format::WeightFormat;
use super::rows::Rows;
use super::{bfloat16, quantized, single};
use crate::cpu::Cpu;
use crate::cpu::tile::PANEL;

/// A part of a panel that is needed soon.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ahead {
    pub(super) panel: usize,
    pub(super) part: usize,
    /// Parts that the panel is cut into.
    pub(super) parts: usize,
}

impl Ahead {
    /// The part of what the panel holds.
    fn of<T>(self, panel: &[T]) -> &[T] {
        let size = panel.len().div_ceil(self.parts);
        &panel[panel.len().min(self.part * size)..panel.len().min((self.part + 1) * size)]
    }
}

/// A packed matrix.
#[derive(Debug)]
pub(super) enum Weights {
    Single(single::Panels),
    Bfloat16(bfloat16::Panels),
    Quantized(quantized::Panels),
}

impl Weights {
    /// Packs rows of `inputs` weights, a whole number of panels of them; `None` is an output that does
    /// not exist.
    pub(super) fn pack(rows: &[Option<&[f32]>], inputs: usize, format: WeightFormat) -> Self {
        assert_eq!(rows.len() % PANEL, 0, "whole panels");
        match format {
            WeightFormat::F32 => Self::Single(single::Panels::pack(rows, inputs)),
            WeightFormat::Bf16 => Self::Bfloat16(bfloat16::Panels::pack(rows, inputs)),
            WeightFormat::Q8_0 => Self::Quantized(quantized::Panels::pack(rows, inputs)),
        }
    }

    pub(super) fn format(&self) -> WeightFormat {
        match self {
            Self::Single(_) => WeightFormat::F32,
            Self::Bfloat16(_) => WeightFormat::Bf16,
            Self::Quantized(_) => WeightFormat::Q8_0,
        }
    }

    pub(super) fn panels(&self) -> usize {
        match self {
            Self::Single(panels) => panels.count(),
            Self::Bfloat16(panels) => panels.count(),
            Self::Quantized(panels) => panels.count(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Single(panels) => panels.bytes(),
            Self::Bfloat16(panels) => panels.bytes(),
            Self::Quantized(panels) => panels.bytes(),
        }
    }

    /// Products of a tile of rows and a panel, one row of `sums` for each row of the tile. `ahead` is fetched
    /// meanwhile, where the kernel knows how.
    pub(super) fn multiply(
        &self,
        cpu: &Cpu,
        rows: &Rows,
        tile: usize,
        panel: usize,
        ahead: Option<Ahead>,
        sums: &mut [[f32; PANEL]],
    ) {
        match self {
            Self::Single(panels) => {
                let ahead = ahead.map_or(&[][..], |ahead| ahead.of(panels.panel(ahead.panel)));
                single::multiply(cpu.isa(), rows.single(tile), panels.panel(panel), ahead, sums);
            }
            Self::Bfloat16(panels) => {
                bfloat16::multiply(cpu.bf16_kernel(), cpu.isa(), rows.words(tile), panels.panel(panel), sums);
            }
            Self::Quantized(panels) => {
                let ahead = ahead.map_or(&[][..], |ahead| ahead.of(panels.panel(ahead.panel).codes));
                quantized::multiply(cpu.isa(), rows.quantized(tile), panels.panel(panel), ahead, sums);
            }
        }
    }
}
