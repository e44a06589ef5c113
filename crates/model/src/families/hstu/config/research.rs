//! The research variant: events in, retrieval or the tokens of semantic IDs out.

use serde::Deserialize;

use super::checks::{MAX_LEVELS, MAX_ROWS, epsilon, in_range, nullable, positive, require, size};
use super::stack::StackConfig;
use super::{Direction, Normalization, PositionConfig};

/// Events of the research variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResearchInput {
    /// Highest item id; the table has one row more.
    pub num_items: usize,
    /// The id whose rows are zero, or null.
    #[serde(deserialize_with = "nullable")]
    pub padding_id: Option<u32>,
    /// Most events of a history.
    pub max_sequence_length: usize,
    /// Position embedding of the events.
    pub position: PositionConfig,
    /// How the action of an event enters, or null if it does not.
    #[serde(deserialize_with = "nullable")]
    pub actions: Option<ResearchActions>,
}

/// Actions of the research variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResearchActions {
    /// Rows of the action table; actions are its row numbers.
    pub count: usize,
    /// Width of the table.
    pub dim: usize,
    /// Whether the action's row is added to the item's, or appended (the item table is then narrower).
    pub combine: Combine,
    /// Action of rows that are generated.
    pub generated: u32,
}

/// How two embeddings become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// Their sum, element by element.
    Add,
    /// One after the other.
    Concat,
}

/// Final states of the research variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResearchOutput {
    /// What is done to a final state.
    pub normalization: Normalization,
    /// What it is compared with.
    pub head: ResearchHead,
}

/// What a final state is compared with.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ResearchHead {
    /// All items, each of unit length: retrieval.
    Items {
        /// Least length an item is divided by.
        eps: f64,
    },
    /// The tokens of a vocabulary, to be decoded one by one.
    Tokens {
        /// Rows of the head; token ids are item ids.
        vocab_size: usize,
        /// Whether the head is the item table; otherwise it is a tensor of its own.
        tied: bool,
        /// Factor of every logit: one over the temperature of training.
        logit_scale: f64,
        /// How the levels of a semantic ID are written, first level first. An event of the history takes
        /// one row per level.
        semantic_id_levels: Vec<SemanticIdLevel>,
    },
}

/// Tokens of a level of a semantic ID: code c is token `first_token + c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SemanticIdLevel {
    /// Token of code 0.
    pub first_token: u32,
    /// Number of codes of the level.
    pub codes: u32,
}

impl SemanticIdLevel {
    /// The token of a code.
    pub fn token(self, code: u32) -> Option<u32> {
        (code < self.codes).then(|| self.first_token + code)
    }
}

impl ResearchInput {
    /// The first row of the item table that is an item: padding is the first row, or there is none.
    pub fn first_item(&self) -> usize {
        self.padding_id.map_or(0, |id| id as usize + 1)
    }

    /// Width of the item table.
    pub fn item_dim(&self, stack: &StackConfig) -> usize {
        match self.actions {
            Some(ResearchActions { combine: Combine::Concat, dim, .. }) => stack.model_dim - dim,
            _ => stack.model_dim,
        }
    }

    pub(super) fn check(&self, stack: &StackConfig, output: &ResearchOutput) -> Result<(), String> {
        in_range("input.num_items", self.num_items, MAX_ROWS)?;
        size("input.max_sequence_length", self.max_sequence_length)?;
        size("input.position.rows", self.position.rows)?;
        self.position.scale.check("input.position.scale")?;
        require(
            self.position.direction == Direction::Forward,
            "input.position.direction \"backward\" is not implemented for research",
        )?;
        let positions = stack.relative_bias.map_or(self.position.rows, |bias| bias.positions);
        require(
            self.max_sequence_length <= self.position.rows.min(positions),
            "input.max_sequence_length exceeds input.position.rows or stack.relative_bias.positions",
        )?;
        if let Some(actions) = self.actions {
            size("input.actions.count", actions.count)?;
            match actions.combine {
                Combine::Add => {
                    require(
                        actions.dim == stack.model_dim,
                        "input.actions.dim must be stack.model_dim to be added",
                    )?;
                }
                Combine::Concat => {
                    in_range("input.actions.dim", actions.dim, stack.model_dim.saturating_sub(1))?;
                }
            }
            require((actions.generated as usize) < actions.count, "input.actions.generated is no action")?;
        }
        output.normalization.check()?;
        match &output.head {
            ResearchHead::Items { eps } => epsilon("output.head.eps", *eps)?,
            ResearchHead::Tokens { vocab_size, logit_scale, semantic_id_levels, .. } => {
                in_range("output.head.vocab_size", *vocab_size, self.num_items + 1)?;
                positive("output.head.logit_scale", *logit_scale)?;
                self.check_levels(semantic_id_levels, *vocab_size, positions)?;
            }
        }
        require(
            self.item_dim(stack) == stack.model_dim
                || matches!(&output.head, ResearchHead::Tokens { tied: false, .. }),
            "with appended actions the item table is narrower than a final state: only an untied token head fits",
        )
    }
}

impl ResearchInput {
    fn check_levels(
        &self,
        levels: &[SemanticIdLevel],
        vocab_size: usize,
        positions: usize,
    ) -> Result<(), String> {
        in_range("output.head.semantic_id_levels: levels", levels.len(), MAX_LEVELS)?;
        for (index, level) in levels.iter().enumerate() {
            let name = format!("output.head.semantic_id_levels[{index}]");
            require(
                level.codes > 0 && u64::from(level.first_token) + u64::from(level.codes) <= vocab_size as u64,
                &format!(
                    "{name}: tokens {} and on for {} codes are not all in a vocabulary of {vocab_size}",
                    level.first_token, level.codes
                ),
            )?;
            let padding = self.padding_id.and_then(|id| id.checked_sub(level.first_token));
            require(
                padding.is_none_or(|code| code >= level.codes),
                &format!("{name}: one of its tokens is input.padding_id"),
            )?;
        }
        require(
            self.max_sequence_length.is_multiple_of(levels.len()),
            "input.max_sequence_length counts rows: it must be a multiple of the levels of a semantic ID",
        )?;
        // The last token is predicted, and never a row.
        require(
            self.max_sequence_length + levels.len() - 1 <= positions,
            "input.position.rows or stack.relative_bias.positions has no place for the generated tokens: at least \
             input.max_sequence_length and the levels of a semantic ID less one",
        )
    }
}
