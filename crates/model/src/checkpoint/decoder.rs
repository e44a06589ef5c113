//! What the files of a decoder hold: names, derived buffers, and an output matrix that may be the
//! embedding.

use super::config::Config;
use super::described::{Described, Expected};
use super::note::Note;
use super::tensors::Tensors;
use crate::error::ModelError;
use crate::families::decoder::expected_tensors;

/// In front of all names but the head's, unless the model was saved without its head.
const PREFIX: &str = "model.";
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// Frequencies that older libraries saved beside the weights.
const FREQUENCIES: &str = "rotary_emb.inv_freq";
/// How far stored frequencies may be from those of config.json: they may have been stored in 16 bits.
const TOLERANCE: f64 = 1.0 / 128.0;

impl Described for Config {
    fn read(json: &str, notes: &mut Vec<Note>) -> Result<Self, ModelError> {
        Self::parse_with(json, notes)
    }

    fn layers(&self) -> usize {
        self.layers
    }

    fn rename(&self, tensors: &mut Tensors) -> Result<(), ModelError> {
        let embedding = EMBEDDING.strip_prefix(PREFIX).unwrap_or(EMBEDDING);
        let mut prefixes = tensors.entries().keys().filter_map(|name| name.strip_suffix(embedding));
        match prefixes.next() {
            Some("") => {
                let named = |name: &str| (!name.starts_with("lm_head.")).then(|| format!("{PREFIX}{name}"));
                tensors.rename(named);
                Ok(())
            }
            // Without an embedding it is told what is missing.
            Some(PREFIX) | None => Ok(()),
            Some(prefix) => Err(ModelError::Mismatch(vec![format!(
                "the names of all tensors begin with {prefix}: {}",
                unwrap(prefix)
            )])),
        }
    }

    fn expected(&self, tensors: &Tensors) -> Expected {
        let buffers = tensors.entries().keys().filter(|name| name.ends_with(FREQUENCIES)).cloned();
        let head = self.tied_head.then(|| HEAD.to_owned());
        Expected { shapes: expected_tensors(self), optional: head.into_iter().chain(buffers).collect() }
    }

    fn is_trained(&self, name: &str, _shape: &[usize]) -> bool {
        // Blocks that were added to a model begin with projections of zeros, which change nothing.
        !name.ends_with("bias") && !name.ends_with("o_proj.weight") && !name.ends_with("down_proj.weight")
    }

    fn check_values(&self, tensors: &Tensors) -> Vec<ModelError> {
        let head = self.tied_head.then(|| check_head(tensors)).and_then(Result::err);
        let buffers = tensors.entries().keys().filter(|name| name.ends_with(FREQUENCIES));
        head.into_iter()
            .chain(buffers.filter_map(|name| self.check_frequencies(tensors, name).err()))
            .collect()
    }
}

/// What to do about names that a wrapper has given.
fn unwrap(prefix: &str) -> &'static str {
    if prefix.contains("base_model") {
        "this is a model within an adapter; merge it first (merge_and_unload, then save_pretrained)"
    } else if prefix.contains("module.") || prefix.contains("_orig_mod.") {
        "the model was saved within a wrapper; save the model inside of it with save_pretrained"
    } else {
        "the model is a part of another one; save that part alone with save_pretrained"
    }
}

/// An output matrix must equal the embedding where the file stores it although `tie_word_embeddings` is
/// set: libraries differ in which of the two they take.
fn check_head(tensors: &Tensors) -> Result<(), ModelError> {
    if !tensors.entries().contains_key(HEAD) || tensors.are_equal(HEAD, EMBEDDING)? {
        return Ok(());
    }
    Err(ModelError::Mismatch(vec![format!(
        "tie_word_embeddings is true, but {HEAD} is not the embedding: set tie_word_embeddings to false to serve it \
         (transformers 5 does), or remove it from the file to serve the embedding (older versions do)"
    )]))
}

impl Config {
    /// Stored frequencies must be those of config.json, scaled or not.
    fn check_frequencies(&self, tensors: &Tensors, name: &str) -> Result<(), ModelError> {
        let values: Vec<f32> = tensors.load(name)?.flatten_all()?.to_vec1()?;
        let (scaled, _) = self.rope.frequencies(self.head_dim);
        let plain = self.rope.unscaled_frequencies(self.head_dim);
        let near = |expected: &[f64]| {
            let pairs = values.iter().zip(expected);
            values.len() == expected.len()
                && pairs.into_iter().all(|(&found, &expected)| {
                    // A frequency that 16 bits round to zero is as good as zero.
                    (f64::from(found) - expected).abs() <= TOLERANCE * expected + 1e-6
                })
        };
        if near(&scaled) || near(&plain) {
            return Ok(());
        }
        Err(ModelError::Mismatch(vec![format!(
            "{name} holds other frequencies than rope_theta and head_dim of config.json give: correct config.json, or \
             remove the buffer, which transformers ignores"
        )]))
    }
}
