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
//! Place in the flow: opened once at load, before anything is allocated. A family checks it tensor by
//! tensor before it builds anything, so a checkpoint that does not fit is refused as a whole.
//!
//! The digest over these files is the identity of the checkpoint: every answer reports it, and it keys
//! every cached page.

pub mod config;
mod decoder;
pub mod described;
mod digest;
pub mod file;
mod folder;
pub(crate) mod json;
pub mod note;
pub mod tensors;
mod tokenizer_config;

use std::path::{Path, PathBuf};

use config::Config;
use described::Described;
use digest::FileDigests;
use note::Note;
use tensors::Tensors;

use crate::error::ModelError;
use crate::families::decoder::expected_tensors;

/// All that was found in a checkpoint's directory: what could be read, what is wrong, and what is
/// noteworthy. `serve` needs a checkpoint without problems; `inspect` prints everything.
#[derive(Debug)]
pub struct Examined<C = Config> {
    /// The parsed config.json.
    pub config: Option<C>,
    /// Headers and digests of the weight files, if they could be read.
    pub tensors: Option<Tensors>,
    /// tokenizer.json as it was read, where there is one.
    pub tokenizer: Option<String>,
    /// sha256 in hexadecimal over config.json, tokenizer.json and every weight file.
    pub digest: Option<String>,
    /// Why it cannot be served.
    pub problems: Vec<ModelError>,
    /// What its author should know.
    pub notes: Vec<Note>,
    digests: FileDigests,
}

/// An opened checkpoint: parsed, checked for damage, not yet built. `C` is the configuration of its
/// family; it defaults to a decoder's.
#[derive(Debug)]
pub struct Checkpoint<C = Config> {
    directory: PathBuf,
    config: C,
    tensors: Tensors,
    tokenizer: Option<String>,
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

    /// A decoder of this config.json without weights: the model makes up random ones. It serves to time
    /// a shape without a checkpoint at hand; its answers mean nothing.
    ///
    /// # Errors
    ///
    /// When the file is missing or names an architecture this build does not know.
    pub fn without_weights(config: &Path) -> Result<Self, ModelError> {
        let directory = config.parent().unwrap_or(Path::new(""));
        let text = file::read_text(config, file::MAX_CONFIG_BYTES)?;
        let (mut digests, mut notes) = (FileDigests::default(), Vec::new());
        digests.add(&config.file_name().unwrap_or_default().to_string_lossy(), text.as_bytes());
        let config = Config::read(&text, &mut notes)?;
        let tensors = Tensors::shapes_only(expected_tensors(&config));
        let (directory, digest) = (directory.to_owned(), digests.digest());
        Ok(Self { directory, config, tensors, tokenizer: None, digest, notes })
    }

    /// Whether there are weights.
    pub fn has_weights(&self) -> bool {
        !self.tensors.files().is_empty()
    }
}

impl<C: Described> Checkpoint<C> {
    /// Looks at all of a directory, and goes on after a problem with what does not depend on it.
    pub fn examine(directory: &Path) -> Examined<C> {
        let mut examined = Examined::headers(directory);
        examined.read_weights();
        examined
    }

    /// Opens a directory whose config.json is of this family. A directory with a problem is refused
    /// before anything large is read.
    ///
    /// # Errors
    ///
    /// The first of what is wrong with it.
    pub fn open_as(directory: &Path) -> Result<Self, ModelError> {
        let mut examined = Examined::headers(directory);
        if examined.problems.is_empty() {
            examined.read_weights();
        }
        let Examined { config, tensors, tokenizer, digest, problems, notes, .. } = examined;
        let directory = directory.to_owned();
        match (config, tensors, digest, problems.into_iter().next()) {
            (Some(config), Some(tensors), Some(digest), None) => {
                Ok(Self { directory, config, tensors, tokenizer, digest, notes })
            }
            (.., problem) => Err(problem.unwrap_or_else(|| {
                ModelError::Internal("a checkpoint without a problem has no parts".into())
            })),
        }
    }
}

impl<C> Examined<C> {
    /// The same with something else made of the configuration.
    pub fn map_config<D>(self, make: impl FnOnce(C) -> D) -> Examined<D> {
        let Self { config, tensors, tokenizer, digest, problems, notes, digests } = self;
        Examined { config: config.map(make), tensors, tokenizer, digest, problems, notes, digests }
    }
}

impl<C: Described> Examined<C> {
    /// Reads all but the weights: their headers only.
    fn headers(directory: &Path) -> Self {
        let mut found = Self {
            config: None,
            tensors: None,
            tokenizer: None,
            digest: None,
            problems: Vec::new(),
            notes: Vec::new(),
            digests: FileDigests::default(),
        };
        found.read_config(directory);
        found.read_tokenizer(directory);
        found.tensors = Tensors::headers(directory).map_err(|error| found.problems.push(error)).ok();
        if let Some(tensors) = &mut found.tensors {
            found.notes.extend(tensors.take_notes());
            found.notes.extend(folder::unread_weights(directory, tensors.files()));
        }
        found.check_headers();
        found
    }

    fn read_config(&mut self, directory: &Path) {
        let text = file::read_text(&directory.join("config.json"), file::MAX_CONFIG_BYTES);
        let config = text.and_then(|text| {
            self.digests.add("config.json", text.as_bytes());
            C::read(&text, &mut self.notes)
        });
        self.config = config.map_err(|error| self.problems.push(error)).ok();
    }

    /// A family without a tokenizer may have one all the same; it is a part of the checkpoint's identity.
    fn read_tokenizer(&mut self, directory: &Path) {
        let path = directory.join("tokenizer.json");
        if path.exists() {
            match file::read_text(&path, file::MAX_TOKENIZER_BYTES) {
                Ok(text) => {
                    self.digests.add("tokenizer.json", text.as_bytes());
                    self.notes.extend(tokenizer_config::differences(directory, &text));
                    self.tokenizer = Some(text);
                }
                Err(error) => self.problems.push(error),
            }
        }
    }

    /// Compares config.json with the names, shapes and types in the headers.
    fn check_headers(&mut self) {
        let (Some(config), Some(tensors)) = (&self.config, &mut self.tensors) else { return };
        let (layers, held) = (config.layers(), tensors.entries().len());
        if layers > held {
            let problem = format!("config.json has {layers} layers, the files hold {held} tensors in all");
            self.problems.push(ModelError::Mismatch(vec![problem]));
            return;
        }
        let fits = config.rename(tensors).and_then(|()| config.expected(tensors).check(tensors));
        self.problems.extend(fits.err());
    }

    /// Reads every byte of the weights: for the digest, and to look at the values.
    fn read_weights(&mut self) {
        let Some(tensors) = &mut self.tensors else { return };
        match tensors.read(&mut self.digests) {
            Ok(()) => self.digest = Some(self.digests.digest()),
            Err(error) => {
                self.problems.push(error);
                return;
            }
        }
        let Some(config) = &self.config else { return };
        if self.problems.iter().any(|problem| matches!(problem, ModelError::Mismatch(_))) {
            return;
        }
        let used = config.expected(tensors).shapes;
        let trained = |name: &str| used.get(name).is_some_and(|shape| config.is_trained(name, shape));
        self.problems.extend(tensors.check_values(&used, trained));
        self.notes.extend(tensors.note_zero_rows(&used, trained));
        self.problems.extend(config.check_values(tensors));
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

    /// Tensors of the weight files.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// sha256 in hexadecimal over config.json, tokenizer.json and every weight file.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// tokenizer.json as it was read for the digest.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn tokenizer(&self) -> Result<&str, ModelError> {
        let missing = || ModelError::Tokenizer("it is missing; save the tokenizer beside the model".into());
        self.tokenizer.as_deref().ok_or_else(missing)
    }

    /// What its author should know.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }
}
