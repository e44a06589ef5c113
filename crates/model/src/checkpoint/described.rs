//! What a family says of its checkpoints: how config.json is read, and which tensors it must hold.

use std::collections::BTreeMap;

use super::note::Note;
use super::tensors::Tensors;
use crate::error::ModelError;

/// What a family makes of its config.json.
pub trait Described: Sized {
    /// Reads config.json, and notes what its author should know.
    ///
    /// # Errors
    ///
    /// When a field is missing, contradictory or unknown, or asks for something that is not implemented.
    /// The message names every such field.
    fn read(json: &str, notes: &mut Vec<Note>) -> Result<Self, ModelError>;

    /// Number of layers. Each has at least one tensor of its own. So a number above that of the tensors
    /// is a mistake, found before any name is made.
    fn layers(&self) -> usize;

    /// Gives tensors the names that this build knows them by.
    ///
    /// # Errors
    ///
    /// When the names are those of something else, such as a model within a wrapper.
    fn rename(&self, _tensors: &mut Tensors) -> Result<(), ModelError> {
        Ok(())
    }

    /// The tensors that a checkpoint must and may have.
    fn expected(&self, tensors: &Tensors) -> Expected;

    /// Whether a tensor of zeros only shows that the weights are not those of a trained model.
    fn is_trained(&self, name: &str, shape: &[usize]) -> bool {
        shape.len() > 1 && !name.ends_with("bias")
    }

    /// What else is wrong with the values of the tensors.
    fn check_values(&self, _tensors: &Tensors) -> Vec<ModelError> {
        Vec::new()
    }
}

/// The tensors of a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Names and shapes of those it must have.
    pub shapes: BTreeMap<String, Vec<usize>>,
    /// Names of those it may have.
    pub optional: Vec<String>,
}

impl Expected {
    /// Compares all tensors with what is expected.
    ///
    /// # Errors
    ///
    /// As [`Tensors::check`].
    pub fn check(&self, tensors: &Tensors) -> Result<(), ModelError> {
        let optional: Vec<&str> = self.optional.iter().map(String::as_str).collect();
        tensors.check(&self.shapes, &optional)
    }
}
