//! How an HSTU model reads the semantic IDs of a catalog: as rows of its item table, or as codes that
//! are its tokens.
//!
//! Invariant: a symbol is a row or a token that the model has.

use beamline_catalog::{SidPart, SymbolTable};

use super::config::{HstuConfig, SemanticIdLevel, TableConfig, VariantConfig};

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
    /// The symbols of a model.
    pub fn new(config: &HstuConfig) -> Self {
        match config.semantic_id_levels() {
            Some(levels) => Self::Levels(levels.to_vec()),
            None => Self::Rows(ItemRows::new(config)),
        }
    }
}

impl ItemRows {
    fn new(config: &HstuConfig) -> Self {
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
