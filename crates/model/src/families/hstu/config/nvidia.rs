//! NVIDIA's variant: items and actions in, predictions of tasks out.

use serde::Deserialize;
use serde_json::Value;

use super::checks::{check_contextual, check_tables, nullable, require, size};
use super::{ContextualConfig, Direction, Normalization, PositionConfig, TableConfig};

/// Input of NVIDIA's variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NvidiaInput {
    /// Tables, all as wide as the model.
    pub tables: Vec<TableConfig>,
    /// Table of the items.
    pub item_table: String,
    /// Table of the actions, which are rows of their own between the items; null if there are none.
    #[serde(deserialize_with = "nullable")]
    pub action_table: Option<String>,
    /// Features of the user; a value that is absent takes no row.
    pub contextual: Vec<ContextualConfig>,
    /// Position embedding of the rows.
    pub position: PositionConfig,
    /// MLPs between the tables and the layers: not implemented, null.
    #[serde(deserialize_with = "nullable")]
    pub preprocessing_mlp: Option<Value>,
    /// Time embedding: not implemented, false.
    pub time_encoding: bool,
    /// Most events of a history.
    pub max_history: usize,
    /// Most candidates of a request.
    pub max_candidates: usize,
}

/// Output of NVIDIA's variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NvidiaOutput {
    /// What is done to a candidate's final state.
    pub normalization: Normalization,
    /// Widths of the prediction layers.
    pub head: Vec<usize>,
    /// Whether they have biases.
    pub head_bias: bool,
    /// Activation between the prediction layers.
    pub activation: Activation,
    /// What the outputs are.
    pub prediction: Prediction,
    /// Names of the outputs if each is a task; a single name if they are its classes.
    pub tasks: Vec<String>,
}

/// Activation of the prediction layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// Rectifier, `max(x, 0)`.
    Relu,
    /// `x * Phi(x)`, exact.
    Gelu,
}

/// What the outputs of NVIDIA's head are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// A probability each: the sigmoid.
    Sigmoid,
    /// Classes of one task: the softmax.
    Softmax,
}

impl NvidiaInput {
    pub(super) fn check(&self, output: &NvidiaOutput) -> Result<(), String> {
        size("input.max_history", self.max_history)?;
        size("input.max_candidates", self.max_candidates)?;
        size("input.position.rows", self.position.rows)?;
        self.position.scale.check("input.position.scale")?;
        require(
            self.position.direction == Direction::Forward,
            "input.position.direction \"backward\" is not implemented for nvidia",
        )?;
        require(self.preprocessing_mlp.is_none(), "input.preprocessing_mlp is not implemented")?;
        require(!self.time_encoding, "input.time_encoding is not implemented")?;
        check_contextual(&self.contextual)?;
        require(
            self.contextual.iter().all(|feature| feature.min_tokens == 0),
            "input.contextual: min_tokens is not implemented for nvidia",
        )?;
        let tables = [Some(&self.item_table), self.action_table.as_ref()].into_iter().flatten();
        let used: Vec<&str> =
            tables.map(String::as_str).chain(self.contextual.iter().map(|c| c.table.as_str())).collect();
        check_tables(&self.tables, &used)?;

        output.normalization.check()?;
        require(!output.head.is_empty(), "output.head is empty")?;
        output.head.iter().try_for_each(|&width| size("output.head", width))?;
        let outputs = output.head.last().copied().unwrap_or_default();
        let named = match output.prediction {
            Prediction::Sigmoid => outputs,
            Prediction::Softmax => 1,
        };
        require(
            output.tasks.len() == named,
            &format!("output.tasks holds {} names, expected {named}", output.tasks.len()),
        )
    }
}
