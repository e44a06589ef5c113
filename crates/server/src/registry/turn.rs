//! The right to load, and the progress of the load that has it.
//!
//! Invariant: at most one load has the right, and gives it back in any case.

use std::sync::Mutex;
use std::time::Instant;

use super::lock;
use crate::api::{LoadProgress, LoadStage};
use crate::error::Error;

/// The load in progress, if any.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<Option<Load>>);

#[derive(Debug)]
struct Load {
    name: String,
    began: Instant,
    stage: LoadStage,
}

/// The right to load, given back when dropped.
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Takes the right to load a model of this name.
    ///
    /// # Errors
    ///
    /// While another load has the right.
    pub(super) fn take(&self, name: &str) -> Result<Turn<'_>, Error> {
        let mut current = lock(&self.0);
        if current.is_some() {
            return Err(Error::LoadInProgress);
        }
        *current = Some(Load { name: name.to_owned(), began: Instant::now(), stage: LoadStage::Reading });
        Ok(Turn(self))
    }

    /// Records that the load reached its next stage. Loads at the start of the process have no
    /// record.
    pub(super) fn reach(&self, stage: LoadStage) {
        if let Some(load) = &mut *lock(&self.0) {
            load.stage = stage;
        }
    }

    /// The name of the model that is being loaded, and its progress.
    pub(super) fn now(&self) -> Option<(String, LoadProgress)> {
        let current = lock(&self.0);
        let Load { name, began, stage } = current.as_ref()?;
        let seconds = began.elapsed().as_secs();
        Some((
            name.clone(),
            LoadProgress { stage: *stage, step: stage.step(), steps: LoadStage::STEPS, seconds },
        ))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *lock(&self.0.0) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_load_at_a_time_tells_how_far_it_is() {
        let turns = Turns::default();
        turns.reach(LoadStage::Probing);
        assert!(turns.now().is_none(), "nobody loads");
        let turn = turns.take("shop").unwrap();
        assert!(matches!(turns.take("other"), Err(Error::LoadInProgress)));
        let progress =
            |turns: &Turns| turns.now().map(|(name, progress)| (name, progress.stage, progress.step));
        assert_eq!(progress(&turns), Some(("shop".into(), LoadStage::Reading, 1)));
        turns.reach(LoadStage::Probing);
        assert_eq!(progress(&turns), Some(("shop".into(), LoadStage::Probing, LoadStage::STEPS)));
        drop(turn);
        assert!(turns.now().is_none() && turns.take("other").is_ok());
    }
}
