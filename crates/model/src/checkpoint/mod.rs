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
pub mod note;
pub mod tensors;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use config::Config;
use note::Note;
use tensors::Tensors;

use crate::error::ModelError;
use crate::families::qwen::expected_tensors;

/// Most bytes of a JSON file of a checkpoint; the largest real tokenizers are a tenth of this.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// What a family makes of its config.json.
pub trait Described: Sized {
    /// Reads config.json, and notes what its author should know.
    ///
    /// # Errors
    ///
    /// When a field is missing, contradictory or unknown, or asks for what is not implemented; the message names all.
    fn read(json: &str, notes: &mut Vec<Note>) -> Result<Self, ModelError>;

    /// The tensors that a checkpoint must and may have.
    fn expected(&self) -> Expected;
}

/// The tensors of a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Names and shapes of those it must have.
    pub shapes: BTreeMap<String, Vec<usize>>,
    /// Names of those it may have.
    pub optional: Vec<&'static str>,
}

/// All that was found in a checkpoint's directory: what could be read of it, what is wrong with it, and what is
/// noteworthy. `serve` needs that nothing is wrong; `inspect` prints all.
#[derive(Debug)]
pub struct Examined<C = Config> {
    /// The parsed config.json.
    pub config: Option<C>,
    /// The weights.
    pub tensors: Option<Tensors>,
    /// sha256 in hexadecimal over config.json, tokenizer.json and every weight file.
    pub digest: Option<String>,
    /// Why it cannot be served.
    pub problems: Vec<ModelError>,
    /// What its author should know.
    pub notes: Vec<Note>,
}

/// An opened checkpoint: parsed, checked for damage, not yet built. The type of its configuration is that of its
/// family; a decoder's unless another is named.
#[derive(Debug)]
pub struct Checkpoint<C = Config> {
    directory: PathBuf,
    config: C,
    tensors: Tensors,
    digest: String,
    notes: Vec<Note>,
}

impl Checkpoint {
    /// Opens the directory of a decoder.
    ///
    /// # Errors
    ///
    /// When a file is missing, damaged, or config.json names an architecture this build does not know.
    pub fn open(directory: &Path) -> Result<Self, ModelError> {
        Self::open_as(directory)
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
        let mut notes = Vec::new();
        let config = Config::read(&read_json(config)?, &mut notes)?;
        let tensors = Tensors::shapes_only(expected_tensors(&config));
        Ok(Self { directory: directory.to_owned(), config, tensors, digest, notes })
    }

    /// Whether there are weights.
    pub fn has_weights(&self) -> bool {
        !self.tensors.files().is_empty()
    }
}

impl<C: Described> Checkpoint<C> {
    /// Looks at all of a directory, and goes on after a problem with what does not depend on it.
    pub fn examine(directory: &Path) -> Examined<C> {
        let (mut problems, mut notes) = (Vec::new(), Vec::new());
        let text = read_json(&directory.join("config.json"));
        let config = text.and_then(|text| C::read(&text, &mut notes));
        let config = config.map_err(|error| problems.push(error)).ok();
        let tensors = Tensors::open(directory).map_err(|error| problems.push(error)).ok();
        if let (Some(config), Some(tensors)) = (&config, &tensors) {
            let Expected { shapes, optional } = config.expected();
            problems.extend(tensors.check(&shapes, &optional).err());
        }
        let digest = tensors.as_ref().and_then(|tensors| {
            let mut files = vec!["config.json".to_owned(), "tokenizer.json".to_owned()];
            files.extend(tensors.files().iter().cloned());
            digest::of_files(directory, &files).map_err(|error| problems.push(error)).ok()
        });
        Examined { config, tensors, digest, problems, notes }
    }

    /// Opens a directory whose config.json is of this family.
    ///
    /// # Errors
    ///
    /// The first of what is wrong with it.
    pub fn open_as(directory: &Path) -> Result<Self, ModelError> {
        let Examined { config, tensors, digest, problems, notes } = Self::examine(directory);
        match (config, tensors, digest, problems.into_iter().next()) {
            (Some(config), Some(tensors), Some(digest), None) => {
                Ok(Self { directory: directory.to_owned(), config, tensors, digest, notes })
            }
            (.., problem) => Err(problem.unwrap_or_else(|| {
                ModelError::Internal("a checkpoint without a problem has no parts".into())
            })),
        }
    }
}

impl<C> Checkpoint<C> {
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

    /// What its author should know.
    pub fn notes(&self) -> &[Note] {
        &self.notes
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
