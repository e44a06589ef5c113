//! What a model reads and writes: tokens, or events and item numbers.
//!
//! Invariant: a catalog of a model is read with [`Family::symbols`], so that what its leaves stand for is a row of that
//! model: a path of token ids, or the row of an item.

use std::sync::Arc;

use beamline_catalog::{SidPart, SymbolTable};
use beamline_model::checkpoint::config::Config;
use beamline_model::convention::Convention;
use beamline_model::families::hstu::config::VariantConfig;
use beamline_model::families::hstu::{Hstu, Task};

use super::PromptLayout;

/// A family, with what its requests need.
#[derive(Clone, Debug)]
pub enum Family {
    /// A decoder of semantic IDs.
    Decoder(Decoder),
    /// An HSTU model.
    Hstu(HstuFamily),
}

/// A decoder.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Sizes.
    pub config: Config,
    /// How histories become tokens.
    pub convention: Arc<Convention>,
    /// How many items fit.
    pub layout: PromptLayout,
}

/// An HSTU model.
#[derive(Clone, Debug)]
pub struct HstuFamily {
    /// The model: requests are checked by it before they go to the engine.
    pub model: Arc<Hstu>,
    /// Rows of its item table.
    pub rows: ItemRows,
}

/// Semantic IDs of one level, whose code is the row of an item in the model's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ItemRows {
    /// First row that is an item.
    pub first: u32,
    /// Rows of the table.
    pub count: usize,
}

impl SymbolTable for ItemRows {
    fn depth(&self) -> Option<usize> {
        Some(1)
    }

    fn symbol(&self, _level: usize, part: &SidPart) -> Option<u32> {
        match part {
            SidPart::Code(row) if *row >= self.first && (*row as usize) < self.count => Some(*row),
            _ => None,
        }
    }
}

impl HstuFamily {
    /// Of a loaded model.
    pub fn new(model: Arc<Hstu>) -> Self {
        let table = |name: &str, tables: &[beamline_model::families::hstu::config::TableConfig]| {
            tables.iter().find(|table| table.name == name).map_or(0, |table| table.rows)
        };
        let rows = match &model.config().variant {
            VariantConfig::Research(input, _) => ItemRows {
                first: input.padding_id.map_or(0, |padding| padding + 1),
                count: input.num_items + 1,
            },
            VariantConfig::Dlrm(input, _) => {
                ItemRows { first: 0, count: table(&input.features[0].table, &input.tables) }
            }
            VariantConfig::Nvidia(input, _) => {
                ItemRows { first: 0, count: table(&input.item_table, &input.tables) }
            }
        };
        Self { model, rows }
    }

    /// What it answers.
    pub fn tasks_of(&self) -> &'static [&'static str] {
        match self.model.task() {
            Task::Retrieval(_) => &["recommend"],
            Task::Ranking(_) => &["rank"],
            Task::Tokens(_) => &[],
        }
    }

    /// Whether it reads times: of events, and of the query.
    pub fn reads_times(&self) -> bool {
        match &self.model.config().variant {
            VariantConfig::Research(..) => self.model.config().stack.relative_bias.is_some(),
            VariantConfig::Dlrm(..) => true,
            VariantConfig::Nvidia(..) => false,
        }
    }

    /// Whether it reads actions.
    pub fn reads_actions(&self) -> bool {
        match &self.model.config().variant {
            VariantConfig::Research(input, _) => input.actions.is_some(),
            VariantConfig::Dlrm(..) => true,
            VariantConfig::Nvidia(input, _) => input.action_table.is_some(),
        }
    }

    /// Names of the features of events and candidates beside the item.
    pub fn item_features(&self) -> Vec<&str> {
        match &self.model.config().variant {
            VariantConfig::Dlrm(input, _) => input.features[1..].iter().map(|f| f.name.as_str()).collect(),
            VariantConfig::Research(..) | VariantConfig::Nvidia(..) => Vec::new(),
        }
    }

    /// Names of the features of users.
    pub fn user_features(&self) -> Vec<&str> {
        let contextual = match &self.model.config().variant {
            VariantConfig::Dlrm(input, _) => &input.contextual,
            VariantConfig::Nvidia(input, _) => &input.contextual,
            VariantConfig::Research(..) => return Vec::new(),
        };
        contextual.iter().map(|feature| feature.name.as_str()).collect()
    }
}

impl Family {
    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Decoder(_) => "qwen",
            Self::Hstu(_) => "hstu",
        }
    }

    /// Architecture that config.json names.
    pub fn architecture(&self) -> String {
        match self {
            Self::Decoder(decoder) => decoder.config.architecture.name().to_owned(),
            Self::Hstu(hstu) => format!("hstu_{:?}", hstu.model.config().variant.variant()).to_lowercase(),
        }
    }

    /// What a catalog's semantic IDs are written in.
    pub fn symbols(&self) -> &dyn SymbolTable {
        match self {
            Self::Decoder(decoder) => &*decoder.convention,
            Self::Hstu(hstu) => &hstu.rows,
        }
    }

    /// Levels of a semantic ID.
    pub fn levels(&self) -> usize {
        match self {
            Self::Decoder(decoder) => decoder.convention.format().levels,
            Self::Hstu(_) => 1,
        }
    }

    /// Tokens generated per item; none by a model that generates none.
    pub fn generated_steps(&self) -> usize {
        match self {
            Self::Decoder(decoder) => decoder.convention.steps().len(),
            Self::Hstu(_) => 0,
        }
    }

    /// What it answers: `/v1/recommend`, `/v1/rank`.
    pub fn tasks(&self) -> &'static [&'static str] {
        match self {
            Self::Decoder(_) => &["recommend", "rank"],
            Self::Hstu(hstu) => hstu.tasks_of(),
        }
    }
}
