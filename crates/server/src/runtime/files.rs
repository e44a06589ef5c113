//! Which files make up what is served: the checkpoint's directory, and files beside it unless the
//! settings name others.

use std::path::{Path, PathBuf};

use beamline_catalog::SymbolTable;
use beamline_model::checkpoint::file::{MAX_CONFIG_BYTES, MAX_CONVENTION_BYTES, read_text};
use beamline_model::convention::Convention;
use beamline_model::convention::format::Format;
use beamline_model::error::ModelError;
use beamline_model::families::hstu::symbols::HstuSymbols;
use beamline_model::loaded::{self, Facts};

use super::{LoadError, layout};
use crate::settings::{ModelSettings, SettingsError};

/// What is meant to be served: used by subcommands that look at a checkpoint without running it, too.
#[derive(Clone, Debug)]
pub struct Files {
    /// The checkpoint directory.
    pub checkpoint: PathBuf,
    /// A config.json in it whose weights are made up.
    pub random_weights: Option<PathBuf>,
    /// Path of the catalog.
    pub catalog: Option<PathBuf>,
    /// A file or a preset.
    pub convention: Option<String>,
}

impl Files {
    /// As the settings say.
    ///
    /// # Errors
    ///
    /// When they name no checkpoint.
    pub fn of(settings: &ModelSettings) -> Result<Self, SettingsError> {
        Ok(Self {
            checkpoint: settings.checkpoint()?.to_owned(),
            random_weights: settings.random_weights.clone(),
            catalog: settings.catalog.clone(),
            convention: settings.convention.clone(),
        })
    }

    /// How histories and items are written.
    ///
    /// # Errors
    ///
    /// When there is none, or it is malformed.
    pub fn format(&self) -> Result<Format, LoadError> {
        let beside = self.checkpoint.join("convention.json");
        let file = match &self.convention {
            // A preset wins over a file of its name. So a client's name is never looked up in the
            // directory in which the server happens to run. A name that is no file and looks like a
            // preset's is meant as one, too.
            Some(name) if !name.contains(['/', '.']) => match Format::preset(name) {
                Ok(format) => return Ok(format),
                Err(source) if !Path::new(name).exists() => return Err(self.blame(source)),
                Err(_) => PathBuf::from(name),
            },
            Some(file) => PathBuf::from(file),
            None if beside.exists() => beside,
            None => return Err(LoadError::NoConvention(self.checkpoint.clone())),
        };
        let text = read_text(&file, MAX_CONVENTION_BYTES).map_err(|source| self.blame(source))?;
        Format::parse(&text).map_err(|source| self.blame(source))
    }

    /// The catalog's file.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn catalog(&self) -> Result<PathBuf, LoadError> {
        if let Some(file) = &self.catalog {
            return Ok(file.clone());
        }
        let beside = ["catalog.jsonl", "catalog.parquet"].map(|name| self.checkpoint.join(name));
        beside.into_iter().find(|file| file.exists()).ok_or_else(|| LoadError::NoCatalog {
            path: self.checkpoint.clone(),
            likely: layout::likely_catalog(&self.checkpoint),
        })
    }

    /// Checks that the directory holds what a checkpoint must, and that there are a convention and a
    /// catalog. Random weights need only a config.json.
    ///
    /// # Errors
    ///
    /// When it does not, with all that is wrong.
    pub fn check_layout(&self) -> Result<(), LoadError> {
        if self.random_weights.is_some() {
            return Ok(());
        }
        let problems = layout::problems(&self.checkpoint);
        if !problems.is_empty() {
            return Err(LoadError::Layout { path: self.checkpoint.clone(), problems });
        }
        // Both are small and are read again when they are needed: weights may take minutes until then.
        if layout::reads_tokens(&self.checkpoint) {
            self.format()?;
        }
        self.catalog().map(drop)
    }

    /// What the codes of semantic IDs mean to this checkpoint. Its weights are not read.
    ///
    /// # Errors
    ///
    /// When config.json, the convention or the tokenizer cannot be used.
    pub fn symbols(&self) -> Result<Box<dyn SymbolTable>, LoadError> {
        let text = read_text(&self.checkpoint.join("config.json"), MAX_CONFIG_BYTES);
        let text = text.map_err(|source| self.blame(source))?;
        let facts = match loaded::facts(&text).map_err(|source| self.blame(source))? {
            Facts::Tokens(facts) => facts,
            Facts::Events(config) => return Ok(Box::new(HstuSymbols::new(&config))),
        };
        let convention = Convention::bind(self.format()?, &self.checkpoint, facts.vocab_size);
        Ok(Box::new(convention.map_err(|source| self.blame(source))?))
    }

    /// An error of the checkpoint.
    pub fn blame(&self, source: ModelError) -> LoadError {
        LoadError::Model { path: self.checkpoint.clone(), source }
    }
}
