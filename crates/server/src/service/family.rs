//! What a model reads and writes: tokens, or events and item numbers.
//!
//! Invariant: a catalog of a model is read with [`Family::symbols`], so that what its leaves stand for is a row of that
//! model: a path of token ids, or the row of an item.

use std::sync::Arc;

use beamline_catalog::{SidPart, SymbolTable};
use beamline_model::convention::Convention;
use beamline_model::decode::Step;
use beamline_model::families::hstu::config::{
    HstuConfig, Purpose, SemanticIdLevel, TableConfig, VariantConfig,
};
use beamline_model::families::tokens::TokenFacts;

use super::PromptLayout;

/// A family, with what its requests need.
#[derive(Clone, Debug)]
pub enum Family {
    /// A model that reads tokens and generates semantic IDs.
    Tokens(TokenModel),
    /// An HSTU model.
    Hstu(HstuFamily),
}

/// A model that reads tokens.
#[derive(Clone, Debug)]
pub struct TokenModel {
    /// What its requests depend on.
    pub facts: TokenFacts,
    /// How histories become tokens.
    pub convention: Arc<Convention>,
    /// What the decoder of an encoder-decoder starts from: the last token of a context.
    pub start_token: Option<u32>,
    /// How many items fit.
    pub layout: PromptLayout,
}

/// An HSTU model.
#[derive(Clone, Debug)]
pub struct HstuFamily {
    /// Constants of the model: requests are checked by them before they go to the engine.
    pub config: Arc<HstuConfig>,
    /// What the semantic IDs of its catalog are.
    pub symbols: HstuSymbols,
    /// What is generated for an item, by a model that decodes; nothing by others.
    steps: Arc<[Step]>,
}

/// What semantic IDs are to an HSTU model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HstuSymbols {
    /// The row of an item, as the only level.
    Rows(ItemRows),
    /// Codes that are tokens of the model.
    Levels(Vec<SemanticIdLevel>),
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

impl SymbolTable for HstuSymbols {
    fn depth(&self) -> Option<usize> {
        match self {
            Self::Rows(rows) => rows.depth(),
            Self::Levels(levels) => Some(levels.len()),
        }
    }

    fn symbol(&self, level: usize, part: &SidPart) -> Option<u32> {
        match (self, part) {
            (Self::Rows(rows), _) => rows.symbol(level, part),
            (Self::Levels(levels), SidPart::Code(code)) => levels.get(level)?.token(*code),
            (Self::Levels(_), _) => None,
        }
    }

    fn advice(&self, level: usize, part: &SidPart) -> Option<String> {
        if matches!(part, SidPart::Token(_)) {
            return Some("this model's codes are integers".to_owned());
        }
        let (first, count) = match self {
            Self::Rows(rows) => (rows.first, u32::try_from(rows.count).unwrap_or(u32::MAX)),
            Self::Levels(levels) => (0, levels.get(level)?.codes),
        };
        Some(format!("this level has the codes {first} to {}", count.saturating_sub(1)))
    }
}

impl HstuSymbols {
    /// Of a model.
    pub fn of(config: &HstuConfig) -> Self {
        match config.semantic_id_levels() {
            Some(levels) => Self::Levels(levels.to_vec()),
            None => Self::Rows(ItemRows::of(config)),
        }
    }
}

impl ItemRows {
    fn of(config: &HstuConfig) -> Self {
        let table = |name: &str, tables: &[TableConfig]| {
            tables.iter().find(|table| table.name == name).map_or(0, |table| table.rows)
        };
        match &config.variant {
            VariantConfig::Research(input, _) => {
                Self { first: input.padding_id.map_or(0, |padding| padding + 1), count: input.num_items + 1 }
            }
            VariantConfig::Dlrm(input, _) => {
                Self { first: 0, count: table(&input.features[0].table, &input.tables) }
            }
            VariantConfig::Nvidia(input, _) => {
                Self { first: 0, count: table(&input.item_table, &input.tables) }
            }
        }
    }
}

impl HstuFamily {
    /// Of a model.
    pub fn new(config: Arc<HstuConfig>) -> Self {
        let symbols = HstuSymbols::of(&config);
        let levels = match &symbols {
            HstuSymbols::Levels(levels) => levels.len(),
            HstuSymbols::Rows(_) => 0,
        };
        Self { config, symbols, steps: vec![Step::Level; levels].into() }
    }

    /// What it answers.
    pub fn tasks_of(&self) -> &'static [&'static str] {
        match self.config.purpose() {
            Purpose::Retrieve => &["recommend"],
            Purpose::Rank => &["rank"],
            Purpose::Decode => &["recommend", "rank"],
        }
    }

    /// Most items of a history, before `more` tokens.
    pub fn max_items(&self, more: usize) -> usize {
        let config = &self.config;
        config.max_events().saturating_sub(more) / config.rows_per_event()
    }

    /// Whether it reads times: of events, and of the query.
    pub fn reads_times(&self) -> bool {
        match &self.config.variant {
            VariantConfig::Research(..) => self.config.stack.relative_bias.is_some(),
            VariantConfig::Dlrm(..) => true,
            VariantConfig::Nvidia(..) => false,
        }
    }

    /// Whether it reads actions.
    pub fn reads_actions(&self) -> bool {
        match &self.config.variant {
            VariantConfig::Research(input, _) => input.actions.is_some(),
            VariantConfig::Dlrm(..) => true,
            VariantConfig::Nvidia(input, _) => input.action_table.is_some(),
        }
    }

    /// The action of rows that are generated.
    pub fn generated_action(&self) -> Option<u32> {
        match &self.config.variant {
            VariantConfig::Research(input, _) => input.actions.map(|actions| actions.generated),
            VariantConfig::Dlrm(..) | VariantConfig::Nvidia(..) => None,
        }
    }

    /// Names of the features of events and candidates beside the item.
    pub fn item_features(&self) -> Vec<&str> {
        match &self.config.variant {
            VariantConfig::Dlrm(input, _) => input.features[1..].iter().map(|f| f.name.as_str()).collect(),
            VariantConfig::Research(..) | VariantConfig::Nvidia(..) => Vec::new(),
        }
    }

    /// Names of the features of users.
    pub fn user_features(&self) -> Vec<&str> {
        let contextual = match &self.config.variant {
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
            Self::Tokens(model) => model.facts.family,
            Self::Hstu(_) => "hstu",
        }
    }

    /// Architecture that config.json names.
    pub fn architecture(&self) -> String {
        match self {
            Self::Tokens(model) => model.facts.architecture.clone(),
            Self::Hstu(hstu) => format!("hstu_{:?}", hstu.config.variant.variant()).to_lowercase(),
        }
    }

    /// What a catalog's semantic IDs are written in.
    pub fn symbols(&self) -> &dyn SymbolTable {
        match self {
            Self::Tokens(model) => &*model.convention,
            Self::Hstu(hstu) => &hstu.symbols,
        }
    }

    /// Levels of a semantic ID.
    pub fn levels(&self) -> usize {
        match self {
            Self::Tokens(model) => model.convention.format().levels,
            Self::Hstu(hstu) => hstu.steps.len().max(1),
        }
    }

    /// What is generated for an item; nothing by a model that generates nothing.
    pub fn steps(&self) -> &Arc<[Step]> {
        match self {
            Self::Tokens(model) => model.convention.steps(),
            Self::Hstu(hstu) => &hstu.steps,
        }
    }

    /// The model, if it finds items by inner product instead of searching for semantic IDs.
    pub fn retrieves(&self) -> Option<&HstuFamily> {
        match self {
            Self::Hstu(hstu) if hstu.config.purpose() == Purpose::Retrieve => Some(hstu),
            Self::Hstu(_) | Self::Tokens(_) => None,
        }
    }

    /// The model, if it predicts by task instead of scoring semantic IDs.
    pub fn predicts(&self) -> Option<&HstuFamily> {
        match self {
            Self::Hstu(hstu) if hstu.config.purpose() == Purpose::Rank => Some(hstu),
            Self::Hstu(_) | Self::Tokens(_) => None,
        }
    }

    /// What it answers: `/v1/recommend`, `/v1/rank`.
    pub fn tasks(&self) -> &'static [&'static str] {
        match self {
            Self::Tokens(_) => &["recommend", "rank"],
            Self::Hstu(hstu) => hstu.tasks_of(),
        }
    }
}
