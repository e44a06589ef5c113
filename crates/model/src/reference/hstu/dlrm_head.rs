//! The head of the production variant: from final states of candidates to predictions of tasks.
//!
//! ```text
//! user        = postprocessor(state)
//! prediction  = MLP(user * MLP(embeddings of the candidate)), through a sigmoid for a binary task
//! ```

use candle_core::{Module as _, Result, Tensor};
use candle_nn::ops::sigmoid;
use candle_nn::{Linear, VarBuilder, linear};

use super::parts::{Norm, SwishMlp, unit};
use crate::families::hstu::config::{DlrmOutput, Postprocessor, TaskKind};

/// Towers of users and items, and what predicts from both.
#[derive(Debug)]
pub(super) struct DlrmHead {
    config: DlrmOutput,
    /// Reads a state and the time of the query.
    combiner: Option<Linear>,
    norm: Option<Norm>,
    item_tower: SwishMlp,
    prediction: SwishMlp,
}

impl DlrmHead {
    /// For states `[.., width]` and embeddings `[.., embedding]` of each feature.
    pub(super) fn new(
        config: &DlrmOutput,
        [width, embedding]: [usize; 2],
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let after = vb.pp("_hstu_transducer._output_postprocessor");
        let (combiner, norm) = match &config.postprocessor {
            Postprocessor::TimestampLayerNorm { periods, eps, .. } => {
                let combiner = linear(width + 2 * periods.len(), width, after.pp("_time_feature_combiner"))?;
                (Some(combiner), Some(*eps))
            }
            Postprocessor::LayerNorm { eps } => (None, Some(*eps)),
            Postprocessor::L2 { .. } => (None, None),
        };
        let tower = &config.item_tower;
        let tower_sizes = [embedding * tower.features.len(), tower.hidden_dim, width];
        let sizes = [width, config.prediction_hidden_dim, config.tasks.len()];
        let prediction = vb.pp("_multitask_module._prediction_module");
        Ok(Self {
            combiner,
            norm: norm.map(|eps| Norm::affine(width, eps, &after, "_layer_norm.")).transpose()?,
            item_tower: SwishMlp::new(tower_sizes, tower.norm_eps, true, &vb.pp("_item_embedding_mlp"))?,
            prediction: SwishMlp::new(sizes, config.prediction_norm_eps, false, &prediction)?,
            config: config.clone(),
        })
    }

    /// Predictions `[candidates, tasks]` from final states and embeddings of all features, for a
    /// query at `time`.
    pub(super) fn forward(&self, states: &Tensor, items: &Tensor, time: i64) -> Result<Tensor> {
        let users = self.users(states, time)?;
        let outputs = self.prediction.forward(&(users * self.item_tower.forward(items)?)?)?;
        let tasks = self.config.tasks.iter().enumerate().map(|(index, task)| {
            let output = outputs.narrow(1, index, 1)?;
            if task.kind == TaskKind::Binary { sigmoid(&output) } else { Ok(output) }
        });
        Tensor::cat(&tasks.collect::<Result<Vec<_>>>()?, 1)
    }

    /// Final states of candidates as vectors of the user, `[candidates, model_dim]`, for a query at
    /// `time`.
    fn users(&self, states: &Tensor, time: i64) -> Result<Tensor> {
        let mut x = states.clone();
        if let (Some(combiner), Postprocessor::TimestampLayerNorm { periods, cycle, .. }) =
            (&self.combiner, &self.config.postprocessor)
        {
            // Which part of a day or week it is, on a circle. In single precision up to the angle,
            // as trained.
            let angles = periods.iter().map(|&(period, units)| {
                let unit = (time as f32 / period as f32).floor().rem_euclid(units as f32);
                f64::from(unit / units as f32 * *cycle as f32)
            });
            let features = Tensor::from_iter(angles.flat_map(|at| [at.cos(), at.sin()]), x.device())?;
            let features = features.to_dtype(x.dtype())?.unsqueeze(0)?.repeat((x.dim(0)?, 1))?;
            x = combiner.forward(&Tensor::cat(&[x, features], 1)?)?;
        }
        match (&self.norm, &self.config.postprocessor) {
            (Some(norm), _) => norm.forward(&x),
            (None, Postprocessor::L2 { eps }) => unit(&x, *eps),
            (None, _) => Ok(x),
        }
    }
}
