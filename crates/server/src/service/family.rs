//! What a model reads and writes: tokens, or events and item numbers.
//!
//! Invariant: a catalog of a model is read with [`Family::symbols`], so that its leaves stand for what
//! that model reads: a path of token ids, or the row of an item.

use std::sync::Arc;

use beamline_catalog::SymbolTable;
use beamline_model::convention::Convention;
use beamline_model::decode::Step;
use beamline_model::families::hstu::config::{HstuConfig, Purpose};
use beamline_model::families::hstu::symbols::HstuSymbols;
use beamline_model::loaded::TokenFacts;

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

impl HstuFamily {
    /// Of a model.
    pub fn new(config: Arc<HstuConfig>) -> Self {
        let symbols = HstuSymbols::new(&config);
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
}

impl Family {
    /// Name of the family.
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
            Self::Hstu(hstu) => hstu.config.architecture(),
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
