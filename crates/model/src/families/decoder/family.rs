//! A decoder as the rest of the system sees it: facts, memory, loading.

use std::sync::Arc;

use beamline_catalog::Catalog;
use beamline_compute::batch::{Batch, ContextRows};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::{PAGE_SIZE, PageShape, PageStore};
use beamline_compute::cuda::device::Device;
use beamline_compute::cuda::kernels;
use beamline_compute::cuda::pages::DevicePages;
use beamline_kv_cache::{PageId, ReuseClass};
use candle_core::DType;
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::{Architecture, Config};
use crate::checkpoint::tensors::Tensors;
use crate::cuda::beams::check_beams;
use crate::cuda::decoder::DeviceDecoder;
use crate::error::ModelError;
use crate::executor::{Executor, ModelExecutor};
use crate::families::decoder::{Decoder, Workspace, first_layer_table_bytes, page_shape};
use crate::loaded::{Bytes, DeviceLimits, Facts, FamilyConfig, LoadOptions, TokenFacts};
use crate::reference::verify::{EngineLogits, LONGEST, Referenced, Verified, verify_tokens};
use crate::reference::{DecoderReference, Reference};
use crate::step::ContextShape;

impl FamilyConfig for Config {
    fn reads(config: &Value) -> bool {
        let first = config["architectures"][0].as_str();
        first.is_some_and(|name| Architecture::ALL.iter().any(|known| known.name() == name))
    }

    fn facts(&self) -> Facts {
        Facts::Tokens(TokenFacts {
            family: "qwen",
            architecture: self.architecture.name().to_owned(),
            vocab_size: self.vocab_size,
            max_positions: self.max_positions,
            shape: ContextShape::Causal,
            reuse: ReuseClass::CrossRequest,
            pairs_per_row: self.pairs_per_row(),
            decoder: None,
        })
    }

    fn page_shape(&self, format: KvFormat) -> PageShape {
        page_shape(self, format)
    }

    fn weight_bytes(&self, tensors: &Tensors, positions: usize, format: WeightFormat) -> usize {
        // The embedding, norms and rotary tables are in single precision in every format.
        let embedding = self.vocab_size.saturating_mul(self.hidden_size);
        // Rows of matrices are packed in panels, the last of which may be half empty.
        let packed = tensors.entries().values().map(|entry| match entry.shape.as_slice() {
            [rows, rest @ ..] if !rest.is_empty() => {
                rest.iter().fold(rows.saturating_add(PAGE_SIZE), |bytes, size| bytes.saturating_mul(*size))
            }
            shape => shape.iter().product(),
        });
        let values = packed.fold(0_usize, usize::saturating_add);
        // The output matrix is a copy of its own, packed another way than the embedding.
        let tied = if self.tied_head {
            self.vocab_size.saturating_add(PAGE_SIZE).saturating_mul(self.hidden_size)
        } else {
            0
        };
        let rotary = positions.saturating_mul(self.head_dim);
        let single =
            embedding.saturating_add(rotary).saturating_mul(4).saturating_add(first_layer_table_bytes(self));
        single.saturating_add(format.bytes_of(values.saturating_sub(embedding).saturating_add(tied)))
    }

    fn describe(&self) -> Vec<(&'static str, String)> {
        let head = if self.tied_head { "tied" } else { "untied" };
        let sizes = format!(
            "{} layers, hidden {}, feed-forward {}, {} heads of {} over {} key-value heads",
            self.layers, self.hidden_size, self.intermediate_size, self.heads, self.head_dim, self.kv_heads
        );
        vec![
            ("architecture", self.architecture.name().to_owned()),
            ("sizes", sizes),
            ("vocabulary", format!("{} rows, {head} output matrix", self.vocab_size)),
            ("positions", self.max_positions.to_string()),
        ]
    }

    fn load(
        checkpoint: &Checkpoint<Self>,
        cpu: &Arc<Cpu>,
        options: LoadOptions,
    ) -> Result<(Box<dyn ModelExecutor>, usize), ModelError> {
        let LoadOptions { positions, weight_format, kv_format, pages } = options;
        let model = Decoder::load(checkpoint, positions, weight_format)?;
        let bytes = model.weight_bytes();
        let executor = Executor::new(Arc::new(model), Arc::clone(cpu), kv_format, pages)?;
        Ok((Box::new(executor), bytes))
    }

    fn verify(checkpoint: &Checkpoint<Self>, cpu: &Arc<Cpu>) -> Result<Verified, ModelError> {
        verify_tokens(checkpoint, cpu, checkpoint.config().vocab_size, None)
    }

    fn device_bytes(&self, tensors: &Tensors, limits: DeviceLimits) -> Result<Bytes, ModelError> {
        let DeviceLimits { positions, steps, beams } = limits;
        check_beams(beams)?;
        let padded = kernels::padded_dim(self.head_dim).ok_or_else(|| {
            ModelError::Limit(format!("head_dim {}: not implemented on CUDA", self.head_dim))
        })?;
        if steps > kernels::MOST_ANCESTORS {
            let most = kernels::MOST_ANCESTORS;
            return Err(ModelError::Limit(format!("{steps} generated tokens: at most {most} on CUDA")));
        }
        let rotary = positions.saturating_mul(self.head_dim).saturating_mul(4);
        let weights = tensors.parameters().saturating_mul(2).saturating_add(rotary);
        let page = DevicePages::bytes_per_page(self.layers, self.kv_heads, [padded; 2]);
        Ok(Bytes { page, weights, beside: 0 })
    }

    fn load_on_device(
        checkpoint: &Checkpoint<Self>,
        device: &Arc<dyn Device>,
        _cpu: &Arc<Cpu>,
        positions: usize,
        pages: usize,
        catalog: &Arc<Catalog>,
    ) -> Result<Box<dyn ModelExecutor>, ModelError> {
        let model = DeviceDecoder::load(device, checkpoint, positions)?;
        let mut executor = Executor::on_device(Arc::new(model), pages)?;
        executor.prepare(catalog)?;
        Ok(Box::new(executor))
    }
}

impl Referenced for Config {
    fn engine_logits(
        checkpoint: &Checkpoint<Self>,
        cpu: &Arc<Cpu>,
    ) -> Result<Box<EngineLogits<'static>>, ModelError> {
        let model = Decoder::load(checkpoint, LONGEST, WeightFormat::F32)?;
        let cpu = Arc::clone(cpu);
        Ok(Box::new(move |tokens| {
            let count = tokens.len().div_ceil(PAGE_SIZE) as u32;
            let mut store = PageStore::new(page_shape(model.config(), KvFormat::F32), count as usize)?;
            let pages: Vec<PageId> = (0..count).map(PageId).collect();
            let (mut batch, mut workspace) = (Batch::default(), Workspace::default());
            let (owner, first_position, cached, wanted) = (0, 0, 0, 1);
            batch.push_context(ContextRows { owner, tokens, first_position, cached, pages: &pages, wanted });
            batch.check_writes(store.pages()).map_err(ModelError::Internal)?;
            cpu.run(|| model.forward(&cpu, &batch, &mut store, &mut workspace, &mut |_, _| {}));
            let mut logits = Vec::new();
            model.logits(&cpu, &workspace.hidden, &mut logits);
            Ok(logits)
        }))
    }

    fn reference(checkpoint: &Checkpoint<Self>) -> Result<Box<dyn Reference>, ModelError> {
        let (config, tensors) = (checkpoint.config(), checkpoint.tensors());
        Ok(Box::new(DecoderReference::new(config, tensors, DType::F64, &candle_core::Device::Cpu)?))
    }
}
