//! HSTU as the rest of the system sees it: facts, memory, loading.

use std::sync::Arc;

use beamline_catalog::Catalog;
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::PageShape;
use beamline_compute::cuda::device::Device;
use beamline_compute::cuda::pages::DevicePages;
use beamline_kv_cache::ReuseClass;
use serde_json::Value;

use super::Hstu;
use super::config::{HstuConfig, Purpose, ResearchHead, VariantConfig};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::tensors::Tensors;
use crate::cuda::beams::check_beams;
use crate::cuda::hstu::model::DeviceHstu;
use crate::cuda::hstu::stack::DeviceStack;
use crate::error::ModelError;
use crate::executor::{Executor, ModelExecutor};
use crate::loaded::{Bytes, DeviceLimits, Facts, FamilyConfig, LoadOptions};
use crate::reference::verify::Verified;

impl FamilyConfig for HstuConfig {
    fn reads(config: &Value) -> bool {
        config["model_type"] == "hstu"
    }

    fn facts(&self) -> Facts {
        Facts::Events(Arc::new(self.clone()))
    }

    fn page_shape(&self, format: KvFormat) -> PageShape {
        self.stack.page_shape(format)
    }

    /// Tables stay in single precision, and the items to retrieve from are packed beside theirs.
    fn weight_bytes(&self, tensors: &Tensors, _positions: usize, _format: WeightFormat) -> usize {
        tensors.parameters().saturating_mul(8)
    }

    fn describe(&self) -> Vec<(&'static str, String)> {
        let stack = &self.stack;
        let sizes = format!(
            "{} layers, width {}, {} heads with keys of {} and values of {}",
            stack.layers, stack.model_dim, stack.heads, stack.key_dim, stack.value_dim
        );
        vec![
            ("architecture", format!("hstu, variant {}", self.variant_name())),
            ("sizes", sizes),
            ("reads", self.describe_input()),
            ("history", format!("at most {} events", self.max_events() / self.rows_per_event())),
            ("answers", self.describe_answers()),
            ("cached", what_is_kept(self.reuse()).to_owned()),
        ]
    }

    fn load(
        checkpoint: &Checkpoint<Self>,
        cpu: &Arc<Cpu>,
        options: LoadOptions,
    ) -> Result<(Box<dyn ModelExecutor>, usize), ModelError> {
        let model = Hstu::load(checkpoint, cpu, options.weight_format)?;
        let bytes = model.weight_bytes();
        let executor = Executor::new(Arc::new(model), Arc::clone(cpu), options.kv_format, options.pages)?;
        Ok((Box::new(executor), bytes))
    }

    fn verify(checkpoint: &Checkpoint<Self>, cpu: &Arc<Cpu>) -> Result<Verified, ModelError> {
        super::verify::verify(checkpoint, cpu)
    }

    /// `beams` is also the most items of an answer.
    fn device_bytes(&self, _tensors: &Tensors, limits: DeviceLimits) -> Result<Bytes, ModelError> {
        if self.purpose() != Purpose::Rank {
            check_beams(limits.beams)?;
        }
        let widths = DeviceStack::check(&self.stack)?;
        let [weights, beside] = DeviceHstu::bytes(self);
        let page = DevicePages::bytes_per_page(self.stack.layers, self.stack.heads, widths);
        Ok(Bytes { page, weights, beside })
    }

    /// Loads the model on the device. Its host parts run on `cpu`.
    fn load_on_device(
        checkpoint: &Checkpoint<Self>,
        device: &Arc<dyn Device>,
        cpu: &Arc<Cpu>,
        _positions: usize,
        pages: usize,
        catalog: &Arc<Catalog>,
    ) -> Result<Box<dyn ModelExecutor>, ModelError> {
        let model = Arc::new(DeviceHstu::load(device, checkpoint, cpu)?);
        let mut executor = Executor::on_device(model, pages)?;
        // A model that ranks asks nothing of the trie.
        if checkpoint.config().purpose() != Purpose::Rank {
            executor.prepare(catalog)?;
        }
        Ok(Box::new(executor))
    }
}

impl HstuConfig {
    fn variant_name(&self) -> &'static str {
        match &self.variant {
            VariantConfig::Research(..) => "research",
            VariantConfig::Dlrm(..) => "dlrm",
            VariantConfig::Nvidia(..) => "nvidia",
        }
    }

    /// The name of the architecture, as for other families.
    pub fn architecture(&self) -> String {
        format!("hstu_{}", self.variant_name())
    }

    fn describe_input(&self) -> String {
        match &self.variant {
            VariantConfig::Research(input, _) => {
                let bias = if self.stack.relative_bias.is_some() { ", times" } else { "" };
                let actions =
                    input.actions.map_or(String::new(), |actions| format!(", {} actions", actions.count));
                format!("{} rows in the item table{actions}{bias}", input.num_items + 1)
            }
            VariantConfig::Dlrm(input, _) => {
                let names: Vec<&str> = input.features.iter().map(|feature| feature.name.as_str()).collect();
                format!("{}; {} action bits, times", names.join(", "), input.action_weights.len())
            }
            VariantConfig::Nvidia(input, _) => {
                let tables = input.tables.iter().map(|table| format!("{} ({} rows)", table.name, table.rows));
                tables.collect::<Vec<_>>().join(", ")
            }
        }
    }

    fn describe_answers(&self) -> String {
        let ranks = |tasks: Vec<&str>| {
            format!("POST /v1/rank: {}, at most {} candidates", tasks.join(", "), self.max_candidates())
        };
        match &self.variant {
            VariantConfig::Research(_, output) => match &output.head {
                ResearchHead::Items { .. } => {
                    "POST /v1/recommend: the best items by inner product".to_owned()
                }
                ResearchHead::Tokens { semantic_id_levels, .. } => {
                    let codes: Vec<String> =
                        semantic_id_levels.iter().map(|level| level.codes.to_string()).collect();
                    format!(
                        "POST /v1/recommend and /v1/rank: semantic IDs, codes by level {}",
                        codes.join(", ")
                    )
                }
            },
            VariantConfig::Dlrm(_, output) => {
                ranks(output.tasks.iter().map(|task| task.name.as_str()).collect())
            }
            VariantConfig::Nvidia(_, output) => ranks(output.tasks.iter().map(String::as_str).collect()),
        }
    }
}

/// The part of a user's history that the cache keeps for the next visit.
fn what_is_kept(class: ReuseClass) -> &'static str {
    match class {
        ReuseClass::CrossRequest => "the history, for later requests of the user",
        ReuseClass::CrossRequestMinusLast => "the history but its last event, for later requests of the user",
        ReuseClass::WithinRequest => "the history within one request: each event changes what came before",
        ReuseClass::Exact => "the history, for later requests with exactly the same one",
    }
}
