//! T5 as the rest of the system sees it: facts, memory, loading.

use std::sync::Arc;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::{PAGE_SIZE, PageShape};
use beamline_kv_cache::{PageId, ReuseClass};
use candle_core::{DType, Device};
use serde_json::Value;

use super::batch::{T5Batch, WholeContext};
use super::config::{ARCHITECTURE, T5Config};
use super::tensors::memory;
use super::{T5, Workspace};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;
use crate::executor::{Executor, ModelExecutor};
use crate::loaded::{DecoderFacts, Facts, FamilyConfig, LoadOptions, TokenFacts};
use crate::reference::verify::{EngineLogits, Referenced, Verified, verify_tokens};
use crate::reference::{Reference, T5Reference};
use crate::step::ContextShape;

impl FamilyConfig for T5Config {
    fn reads(config: &Value) -> bool {
        match config["architectures"][0].as_str() {
            Some(name) => name == ARCHITECTURE,
            None => config["model_type"] == "t5",
        }
    }

    fn facts(&self) -> Facts {
        Facts::Tokens(TokenFacts {
            family: "t5",
            architecture: ARCHITECTURE.to_owned(),
            vocab_size: self.vocab_size,
            max_positions: self.max_positions(),
            shape: ContextShape::Whole,
            reuse: ReuseClass::Exact,
            pairs_per_row: self.pairs_per_row(),
            decoder: Some(DecoderFacts { start_token: self.decoder_start }),
        })
    }

    fn page_shape(&self, format: KvFormat) -> PageShape {
        self.page_shape(format)
    }

    fn weight_bytes(&self, _tensors: &Tensors, _positions: usize, format: WeightFormat) -> usize {
        memory(self, format)
    }

    fn describe(&self) -> Vec<(&'static str, String)> {
        let head = if self.tied_head { "tied" } else { "untied" };
        let sizes = format!(
            "{} encoder and {} decoder layers, width {}, feed-forward {}, {} heads of {}",
            self.encoder_layers, self.decoder_layers, self.d_model, self.d_ff, self.num_heads, self.d_kv
        );
        vec![
            ("architecture", ARCHITECTURE.to_owned()),
            ("sizes", sizes),
            ("vocabulary", format!("{} rows, {head} output matrix", self.vocab_size)),
            ("positions", format!("relative; at most {} here", self.max_positions())),
        ]
    }

    fn load(
        checkpoint: &Checkpoint<Self>,
        cpu: &Arc<Cpu>,
        options: LoadOptions,
    ) -> Result<(Box<dyn ModelExecutor>, usize), ModelError> {
        let model = T5::load(checkpoint, options.weight_format)?;
        let bytes = model.weight_bytes();
        let executor = Executor::new(Arc::new(model), Arc::clone(cpu), options.kv_format, options.pages)?;
        Ok((Box::new(executor), bytes))
    }

    fn verify(checkpoint: &Checkpoint<Self>, cpu: &Arc<Cpu>) -> Result<Verified, ModelError> {
        let start_token = checkpoint.config().decoder_start.unwrap_or_default();
        verify_tokens(checkpoint, cpu, checkpoint.config().vocab_size, Some(start_token))
    }
}

impl Referenced for T5Config {
    fn engine_logits(
        checkpoint: &Checkpoint<Self>,
        cpu: &Arc<Cpu>,
    ) -> Result<Box<EngineLogits<'static>>, ModelError> {
        let model = T5::load(checkpoint, WeightFormat::F32)?;
        let cpu = Arc::clone(cpu);
        Ok(Box::new(move |tokens| {
            let count = tokens.len().div_ceil(PAGE_SIZE) as u32;
            let mut store = model.page_store(KvFormat::F32, count as usize)?;
            let pages: Vec<PageId> = (0..count).map(PageId).collect();
            let (mut batch, mut workspace) = (T5Batch::default(), Workspace::default());
            let context = WholeContext { owner: 0, tokens, cached: false, pages: &pages };
            batch.push_context(context).map_err(ModelError::Internal)?;
            batch.check_writes(store.pages()).map_err(ModelError::Internal)?;
            cpu.run(|| model.forward(&cpu, &batch, &mut store, &mut workspace, &mut || {}));
            let mut logits = Vec::new();
            model.logits(&cpu, workspace.hidden(), &mut logits);
            Ok(logits)
        }))
    }

    fn reference(checkpoint: &Checkpoint<Self>) -> Result<Box<dyn Reference>, ModelError> {
        let (config, tensors) = (checkpoint.config(), checkpoint.tensors());
        Ok(Box::new(T5Reference::new(config, tensors, DType::F64, &Device::Cpu)?))
    }
}
