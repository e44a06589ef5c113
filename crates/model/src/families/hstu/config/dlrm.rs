//! The production variant, `DlrmHSTU`: features and actions in, predictions of tasks out.

use serde::Deserialize;

use super::checks::{check_contextual, check_tables, epsilon, positive, require, size};
use super::{ContextualConfig, Direction, PositionConfig, TableConfig};

/// A feature of every event and candidate.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureConfig {
    /// Name of the feature.
    pub name: String,
    /// Table its ids are rows of.
    pub table: String,
}

/// Input of the production variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DlrmInput {
    /// Width of every table, E.
    pub embedding_dim: usize,
    /// Embedding tables of all features.
    pub tables: Vec<TableConfig>,
    /// Features of events and candidates: the first is the item itself, the others are its additional ones.
    pub features: Vec<FeatureConfig>,
    /// Features of the user, in the order of their slots.
    pub contextual: Vec<ContextualConfig>,
    /// Bits of an action, in the order of the action table.
    pub action_weights: Vec<u32>,
    /// Width of an action's embedding.
    pub action_dim: usize,
    /// Inner width of the MLPs.
    pub hidden_dim: usize,
    /// Epsilon of the norms in the MLPs.
    pub norm_eps: f64,
    /// Position embedding of the events.
    pub position: PositionConfig,
    /// Time embedding of the events.
    pub time: DlrmTime,
    /// Most events of a history.
    pub max_history: usize,
    /// Most candidates of a request.
    pub max_candidates: usize,
}

/// Time embedding of the production variant.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DlrmTime {
    /// Rows of the table.
    pub rows: usize,
    /// Seconds that the age of an event is divided by before the square root.
    pub divisor: f64,
    /// The highest bucket.
    pub clamp: TimeClamp,
}

/// The highest bucket of the time embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeClamp {
    /// The last row: what is trained with the reference's GPU kernels.
    Rows,
    /// The model's width less one: what the reference's PyTorch path computes.
    ModelDim,
}

/// Output of the production variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DlrmOutput {
    /// What is done to a candidate's final state.
    pub postprocessor: Postprocessor,
    /// What a candidate itself is turned into.
    pub item_tower: ItemTower,
    /// Inner width of the prediction module.
    pub prediction_hidden_dim: usize,
    /// Epsilon of its norm.
    pub prediction_norm_eps: f64,
    /// Tasks in the order of the outputs.
    pub tasks: Vec<TaskConfig>,
}

/// What is done to a candidate's final state.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Postprocessor {
    /// Time of day and week are appended, then a linear layer and a layer norm.
    TimestampLayerNorm {
        /// Seconds of each period and how many of them make a cycle.
        periods: Vec<(u32, u32)>,
        /// Angle of a cycle: 6.28 in the reference, not two pi.
        cycle: f64,
        /// Epsilon of the norm.
        eps: f64,
    },
    /// Layer norm with weights.
    LayerNorm {
        /// Epsilon of the norm.
        eps: f64,
    },
    /// Division by the length.
    L2 {
        /// Least length to divide by.
        eps: f64,
    },
}

/// The tower of the candidate itself.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ItemTower {
    /// Names of the features it reads, in order.
    pub features: Vec<String>,
    /// Inner width of its MLP.
    pub hidden_dim: usize,
    /// Epsilon of its norms.
    pub norm_eps: f64,
}

/// What is predicted.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskConfig {
    /// Name of the task.
    pub name: String,
    /// Kind of the task.
    pub kind: TaskKind,
}

/// Kind of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// A probability: the sigmoid of the output.
    Binary,
    /// The output itself.
    Regression,
}

impl DlrmInput {
    /// Rows in front of every history.
    pub fn slots(&self) -> usize {
        self.contextual.iter().map(|feature| feature.slots).sum()
    }

    pub(super) fn check(&self, output: &DlrmOutput) -> Result<(), String> {
        size("input.embedding_dim", self.embedding_dim)?;
        size("input.hidden_dim", self.hidden_dim)?;
        size("input.action_dim", self.action_dim)?;
        size("input.max_history", self.max_history)?;
        size("input.max_candidates", self.max_candidates)?;
        size("input.position.rows", self.position.rows)?;
        size("input.time.rows", self.time.rows)?;
        positive("input.time.divisor", self.time.divisor)?;
        epsilon("input.norm_eps", self.norm_eps)?;
        self.position.scale.check("input.position.scale")?;
        require(
            self.position.direction == Direction::Backward,
            "input.position.direction \"forward\" is not implemented for dlrm",
        )?;
        require(!self.features.is_empty(), "input.features is empty; the first is the item")?;
        require(!self.action_weights.is_empty(), "input.action_weights is empty")?;
        check_contextual(&self.contextual)?;
        let features = self.features.iter().map(|feature| feature.table.as_str());
        let used: Vec<&str> = features.chain(self.contextual.iter().map(|c| c.table.as_str())).collect();
        check_tables(&self.tables, &used)?;

        size("output.item_tower.hidden_dim", output.item_tower.hidden_dim)?;
        epsilon("output.item_tower.norm_eps", output.item_tower.norm_eps)?;
        size("output.prediction_hidden_dim", output.prediction_hidden_dim)?;
        epsilon("output.prediction_norm_eps", output.prediction_norm_eps)?;
        require(!output.item_tower.features.is_empty(), "output.item_tower.features is empty")?;
        for name in &output.item_tower.features {
            let known = self.features.iter().any(|feature| &feature.name == name);
            require(known, &format!("output.item_tower.features: {name:?} is not in input.features"))?;
        }
        require(!output.tasks.is_empty(), "output.tasks is empty")?;
        match &output.postprocessor {
            Postprocessor::TimestampLayerNorm { periods, cycle, eps } => {
                positive("output.postprocessor.cycle", *cycle)?;
                epsilon("output.postprocessor.eps", *eps)?;
                let whole =
                    !periods.is_empty() && periods.iter().all(|&(period, units)| period > 0 && units > 0);
                require(whole, "output.postprocessor.periods is empty or holds a zero")
            }
            Postprocessor::LayerNorm { eps } | Postprocessor::L2 { eps } => {
                epsilon("output.postprocessor.eps", *eps)
            }
        }
    }
}
