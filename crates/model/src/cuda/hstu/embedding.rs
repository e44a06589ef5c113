//! From ids to rows of the residual stream, on the device or on the host.
//!
//! Place in the flow: before the layers. The research variant looks its rows up in tables on the device,
//! because only the device knows generated tokens. The ranking variants have small networks and many
//! tables around their rows, all known on the host. The host makes those rows with the CPU's own code
//! and copies them.
//!
//! Tables are single precision in both cases, so rows equal those of the CPU bit for bit. The exception
//! is the networks on the host, whose weights are bf16.

use std::ops::Range;
use std::sync::Arc;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cuda::device::{Device, DeviceError, Memory};
use beamline_compute::cuda::kernels::hstu::{self as kernels, Embed};
use beamline_compute::cuda::rows::RowArrays;
use beamline_compute::cuda::weights::vector;

use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;
use crate::families::hstu::config::{Combine, HstuConfig, ResearchInput, VariantConfig};
use crate::families::hstu::embed::{Embedder, Research};
use crate::families::hstu::inputs::Prepared;

/// What turns ids into rows.
#[derive(Debug)]
pub(super) enum DeviceEmbedder {
    /// Tables on the device.
    Tables(Tables),
    /// On the host.
    Host(Embedder),
}

/// Tables of the research variant.
#[derive(Debug)]
pub(super) struct Tables {
    items: Memory,
    actions: Option<Memory>,
    positions: Memory,
    input: ResearchInput,
    width: usize,
    item_dim: usize,
    scale: f32,
}

/// What rows of a step are made from, beside the tokens and positions of its layout.
#[derive(Debug, Default)]
pub(super) struct Embedded {
    /// Rows `[rows, model_dim]`, if the host makes them.
    rows: Vec<f32>,
    /// Action of each row, if the model has actions and the device makes the rows.
    pub(super) actions: Vec<u32>,
}

impl Embedded {
    /// Makes it empty and keeps its memory.
    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.actions.clear();
    }
}

impl DeviceEmbedder {
    pub(super) fn load(
        device: &Arc<dyn Device>,
        config: &HstuConfig,
        tensors: &Tensors,
    ) -> Result<Self, ModelError> {
        let VariantConfig::Research(input, _) = &config.variant else {
            return Ok(Self::Host(Embedder::load(config, tensors, WeightFormat::Bf16)?));
        };
        let (items, actions, positions) = Research::tables(input);
        let table = |name: &str| Ok::<_, ModelError>(vector(device, &[tensors.load(name)?])?);
        Ok(Self::Tables(Tables {
            items: table(items)?,
            actions: actions.map(table).transpose()?,
            positions: table(positions)?,
            width: config.stack.model_dim,
            item_dim: input.item_dim(&config.stack),
            scale: input.position.scale.value(&config.stack),
            input: input.clone(),
        }))
    }

    /// Adds rows of a context.
    pub(super) fn context(&self, cpu: &Cpu, request: &Prepared, positions: Range<usize>, to: &mut Embedded) {
        match self {
            Self::Host(embedder) => embedder.context(cpu, request, positions, &mut to.rows),
            Self::Tables(tables) if tables.actions.is_some() => {
                to.actions.extend_from_slice(&request.request.events.actions[positions]);
            }
            Self::Tables(_) => {}
        }
    }

    /// Adds candidates. Says whether the model has any.
    pub(super) fn candidates(
        &self,
        cpu: &Cpu,
        request: &Prepared,
        candidates: Range<usize>,
        to: &mut Embedded,
    ) -> bool {
        let Self::Host(embedder) = self else { return false };
        embedder.candidates(cpu, request, candidates, &mut to.rows);
        true
    }

    /// Adds generated tokens, whatever they are.
    pub(super) fn generated(&self, rows: usize, to: &mut Embedded) {
        if let Self::Tables(Tables { actions: Some(_), input, .. }) = self {
            let generated = input.actions.map_or(0, |actions| actions.generated);
            to.actions.extend(std::iter::repeat_n(generated, rows));
        }
    }

    /// Puts the rows of a step into the residual stream.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub(super) fn put(
        &self,
        device: &dyn Device,
        from: &Embedded,
        arrays: &RowArrays,
        actions: u64,
        rows: usize,
        hidden: u64,
    ) -> Result<(), DeviceError> {
        let tables = match self {
            Self::Host(_) => return device.upload(bytemuck::cast_slice(&from.rows), hidden),
            Self::Tables(tables) => tables,
        };
        let shape = tables.input.actions;
        kernels::embed(
            device,
            &Embed {
                items: arrays.tokens,
                actions: tables.actions.as_ref().map_or(0, |_| actions),
                positions: arrays.positions,
                item_table: tables.items.address(),
                action_table: tables.actions.as_ref().map_or(0, Memory::address),
                position_table: tables.positions.address(),
                hidden,
                rows,
                item_count: tables.input.num_items + 1,
                padding: tables.input.padding_id.unwrap_or(u32::MAX),
                item_dim: tables.item_dim,
                action_dim: shape.map_or(0, |actions| actions.dim),
                width: tables.width,
                concat: shape.is_some_and(|actions| actions.combine == Combine::Concat),
                scale: tables.scale,
            },
        )
    }

    /// The tables and networks on the host.
    pub(super) fn host(&self) -> Option<&Embedder> {
        match self {
            Self::Host(embedder) => Some(embedder),
            Self::Tables(_) => None,
        }
    }
}
