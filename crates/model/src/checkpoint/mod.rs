//! A checkpoint as a model author brings it: a directory in Hugging Face layout.
//!
//! ```text
//! config.json                   architecture and sizes                          -> config
//! model.safetensors             weights, or shards named by                     -> tensors
//! model.safetensors.index.json
//! tokenizer.json                vocabulary, with a token for every SID code     -> crate::convention
//! generation_config.json        never read: its sampling fields have no meaning for beam search
//! ```
//!
//! Place in the flow: opened once at load, before anything is allocated. What a family builds from it is checked
//! tensor by tensor first, so a checkpoint that does not fit is refused as a whole.
//!
//! The digest over these files is the identity of the checkpoint: it is reported in every answer and keys every
//! cached page.

pub mod config;
pub mod digest;
pub mod tensors;

use std::path::{Path, PathBuf};

use config::Config;
use tensors::Tensors;

use crate::error::ModelError;
use crate::families::qwen::expected_tensors;

/// Most bytes of a JSON file of a checkpoint; the largest real tokenizers are a tenth of this.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// An opened checkpoint: parsed, checked for damage, not yet built. The type of its configuration is that of its
/// family; a decoder's unless another is named.
#[derive(Debug)]
pub struct Checkpoint<C = Config> {
    directory: PathBuf,
    config: C,
    tensors: Tensors,
    digest: String,
}

impl Checkpoint {
    /// Opens the directory of a decoder.
    ///
    /// # Errors
    ///
    /// When a file is missing, damaged, or config.json names an architecture this build does not know.
    pub fn open(directory: &Path) -> Result<Self, ModelError> {
        Self::open_as(directory, Config::parse)
    }

    /// A decoder of this config.json without weights: whoever runs it makes them up. For timing a shape whose checkpoint is not at
    /// hand; what it computes means nothing.
    ///
    /// # Errors
    ///
    /// When the file is missing or names an architecture this build does not know.
    pub fn without_weights(config: &Path) -> Result<Self, ModelError> {
        let directory = config.parent().unwrap_or(Path::new(""));
        let name = config.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let digest = digest::of_files(directory, &[name])?;
        let config = Config::parse(&read_json(config)?)?;
        let tensors = Tensors::shapes_only(expected_tensors(&config));
        Ok(Self { directory: directory.to_owned(), config, tensors, digest })
    }

    /// Whether there are weights.
    pub fn has_weights(&self) -> bool {
        !self.tensors.files().is_empty()
    }
}

impl<C> Checkpoint<C> {
    /// Opens a directory whose config.json `parse` understands.
    ///
    /// # Errors
    ///
    /// When a file is missing or damaged, or what `parse` says of config.json.
    pub fn open_as(
        directory: &Path,
        parse: impl FnOnce(&str) -> Result<C, ModelError>,
    ) -> Result<Self, ModelError> {
        let config = parse(&read_json(&directory.join("config.json"))?)?;
        let tensors = Tensors::open(directory)?;
        let mut files = vec!["config.json".to_owned(), "tokenizer.json".to_owned()];
        files.extend(tensors.files().iter().cloned());
        let digest = digest::of_files(directory, &files)?;
        Ok(Self { directory: directory.to_owned(), config, tensors, digest })
    }

    /// The directory it was opened from.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The parsed config.json.
    pub fn config(&self) -> &C {
        &self.config
    }

    /// The weights.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// sha256 in hexadecimal over config.json, tokenizer.json and every weight file.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

/// Reads a JSON file of bounded size.
pub(crate) fn read_json(path: &Path) -> Result<String, ModelError> {
    let read = |source| ModelError::Read { path: path.to_owned(), source };
    let size = std::fs::metadata(path).map_err(read)?.len();
    if size > MAX_JSON_BYTES {
        return Err(read(std::io::Error::other(format!(
            "{size} bytes, more than the limit of {MAX_JSON_BYTES}"
        ))));
    }
    std::fs::read_to_string(path).map_err(read)
}
