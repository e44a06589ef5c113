//! A checkpoint of any family, opened: the only face that the rest of the system sees.
//!
//! Place in the flow: the runtime opens a directory here, asks for its sizes, and gets an executor. It
//! learns what the model reads ([`Facts`]), and never which family it holds.
//!
//! A family is a type of configuration that implements [`FamilyConfig`], and one entry of [`FAMILIES`].
//!
//! Invariant: memory that is counted ([`Loaded::bytes`]) is at least the memory that is taken.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use beamline_catalog::Catalog;
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::pages::PageShape;
use beamline_compute::cuda::device::Device;
use beamline_kv_cache::ReuseClass;
use serde_json::Value;

use crate::checkpoint::config::Config;
use crate::checkpoint::described::Described;
use crate::checkpoint::file::{MAX_CONFIG_BYTES, read_text};
use crate::checkpoint::note::Note;
use crate::checkpoint::tensors::Tensors;
use crate::checkpoint::{Checkpoint, Examined, json};
use crate::error::ModelError;
use crate::executor::ModelExecutor;
use crate::families::hstu::config::HstuConfig;
use crate::families::t5::config::T5Config;
use crate::reference::verify::Verified;
use crate::step::ContextShape;

pub use beamline_compute::cpu::kv_format::KvFormat;
pub use beamline_compute::cpu::linear::WeightFormat;
pub use beamline_compute::cpu::pages::PAGE_SIZE;

/// The families. A checkpoint that names none of them is read as the last, which says what is known.
const FAMILIES: [Registered; 3] =
    [registered::<T5Config>(), registered::<HstuConfig>(), registered::<Config>()];

/// What the rest of the system needs to know of a checkpoint.
#[derive(Clone, Debug)]
pub enum Facts {
    /// It reads tokens and generates semantic IDs.
    Tokens(TokenFacts),
    /// It reads events: items, actions, times and features.
    Events(Arc<HstuConfig>),
}

/// What the rest of the system needs to know of a model that reads tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenFacts {
    /// Name of the family.
    pub family: &'static str,
    /// Architecture that config.json names.
    pub architecture: String,
    /// Rows of the output matrix.
    pub vocab_size: usize,
    /// Most rows of context and generated tokens together.
    pub max_positions: usize,
    /// Whether a context may be computed in parts.
    pub shape: ContextShape,
    /// What of a context another request may use.
    pub reuse: ReuseClass,
    /// Positions that a row attends to in the time that the rest of it takes.
    pub pairs_per_row: u64,
    /// Of an encoder-decoder.
    pub decoder: Option<DecoderFacts>,
}

impl Facts {
    /// Architecture that config.json names.
    pub fn architecture(&self) -> String {
        match self {
            Self::Tokens(facts) => facts.architecture.clone(),
            Self::Events(config) => config.architecture(),
        }
    }

    /// Words that a position is addressed by in the prefix index.
    pub fn words_per_position(&self) -> usize {
        match self {
            Self::Tokens(_) => 1,
            Self::Events(config) => config.words_per_position(),
        }
    }

    /// Positions that a row attends to in the time that the rest of it takes.
    pub fn pairs_per_row(&self) -> u64 {
        match self {
            Self::Tokens(facts) => facts.pairs_per_row,
            Self::Events(config) => config.stack.pairs_per_row(),
        }
    }
}

/// Facts of a model that reads a history with an encoder. Its context is the tokens of the history, then
/// one start token of the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderFacts {
    /// Token that config.json names for the start of the decoder.
    pub start_token: Option<u32>,
}

/// Bytes that a model takes where it runs, at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes {
    /// Bytes of one page.
    pub page: usize,
    /// The weights, where the model runs.
    pub weights: usize,
    /// Weights in the host's memory, beside those on a graphics processor.
    pub beside: usize,
}

/// How a model is to be loaded.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Positions that can be computed: of the largest context and what is generated after it.
    pub positions: usize,
    /// Format of the weights.
    pub weight_format: WeightFormat,
    /// Format of keys and values.
    pub kv_format: KvFormat,
    /// Pages to allocate.
    pub pages: usize,
}

/// A model that is to run on a graphics processor.
#[derive(Clone, Copy, Debug)]
pub struct DeviceLimits {
    /// Positions that can be computed.
    pub positions: usize,
    /// Most tokens generated for a request.
    pub steps: usize,
    /// Width of the widest beam.
    pub beams: usize,
}

/// What a family says of its configuration.
pub trait FamilyConfig: Described + fmt::Debug + Send + Sync + 'static {
    /// Whether a config.json is of this family.
    fn reads(config: &Value) -> bool;

    /// What the rest of the system needs to know.
    fn facts(&self) -> Facts;

    /// What a page holds on the CPU.
    fn page_shape(&self, format: KvFormat) -> PageShape;

    /// Bytes of the weights once they are loaded on the CPU, at most. Told from the header alone.
    fn weight_bytes(&self, tensors: &Tensors, positions: usize, format: WeightFormat) -> usize;

    /// Lines for people: what config.json says.
    fn describe(&self) -> Vec<(&'static str, String)>;

    /// Loads weights and allocates pages on the CPU. Returns the bytes of the weights as well.
    ///
    /// # Errors
    ///
    /// When tensors cannot be used, or memory cannot be had.
    fn load(
        checkpoint: &Checkpoint<Self>,
        cpu: &Arc<Cpu>,
        options: LoadOptions,
    ) -> Result<(Box<dyn ModelExecutor>, usize), ModelError>;

    /// Compares the engine with a second implementation on random requests.
    ///
    /// # Errors
    ///
    /// When tensors cannot be used.
    fn verify(checkpoint: &Checkpoint<Self>, cpu: &Arc<Cpu>) -> Result<Verified, ModelError>;

    /// Bytes on a graphics processor, at most.
    ///
    /// # Errors
    ///
    /// When the family, or a model of these sizes, does not run there.
    fn device_bytes(&self, _tensors: &Tensors, _limits: DeviceLimits) -> Result<Bytes, ModelError> {
        Err(self.not_on_device())
    }

    /// Copies weights and trie to a graphics processor, and allocates pages there.
    ///
    /// # Errors
    ///
    /// When the family does not run there, or the device fails.
    fn load_on_device(
        checkpoint: &Checkpoint<Self>,
        _device: &Arc<dyn Device>,
        _cpu: &Arc<Cpu>,
        _positions: usize,
        _pages: usize,
        _catalog: &Arc<Catalog>,
    ) -> Result<Box<dyn ModelExecutor>, ModelError> {
        Err(checkpoint.config().not_on_device())
    }

    /// That the family runs on the CPU only.
    fn not_on_device(&self) -> ModelError {
        ModelError::Config(format!(
            "{} does not run on CUDA; serve it with --device cpu",
            self.facts().architecture()
        ))
    }
}

/// A checkpoint that was opened and found undamaged.
pub trait Loaded: fmt::Debug + Send + Sync {
    /// What the rest of the system needs to know.
    fn facts(&self) -> Facts;
    /// Tensors of the weight files.
    fn tensors(&self) -> &Tensors;
    /// What its author should know.
    fn notes(&self) -> &[Note];
    /// sha256 of the checkpoint.
    fn digest(&self) -> &str;
    /// Whether there are weights.
    fn has_weights(&self) -> bool;
    /// tokenizer.json.
    ///
    /// # Errors
    ///
    /// When there is none.
    fn tokenizer(&self) -> Result<&str, ModelError>;
    /// Bytes on the CPU, at most.
    fn bytes(&self, positions: usize, weights: WeightFormat, keys: KvFormat) -> Bytes;
    /// As [`FamilyConfig::load`].
    ///
    /// # Errors
    ///
    /// When tensors cannot be used, or memory cannot be had.
    fn load(
        &self,
        cpu: &Arc<Cpu>,
        options: LoadOptions,
    ) -> Result<(Box<dyn ModelExecutor>, usize), ModelError>;
    /// Compares the engine with a second implementation on random prompts.
    ///
    /// # Errors
    ///
    /// When tensors cannot be used.
    fn verify(&self, cpu: &Arc<Cpu>) -> Result<Verified, ModelError>;
    /// As [`FamilyConfig::device_bytes`].
    ///
    /// # Errors
    ///
    /// When the family, or a model of these sizes, does not run there.
    fn device_bytes(&self, limits: DeviceLimits) -> Result<Bytes, ModelError>;
    /// As [`FamilyConfig::load_on_device`].
    ///
    /// # Errors
    ///
    /// When the family does not run there, or the device fails.
    fn load_on_device(
        &self,
        device: &Arc<dyn Device>,
        cpu: &Arc<Cpu>,
        positions: usize,
        pages: usize,
        catalog: &Arc<Catalog>,
    ) -> Result<Box<dyn ModelExecutor>, ModelError>;
}

impl<C: FamilyConfig> Loaded for Checkpoint<C> {
    fn facts(&self) -> Facts {
        self.config().facts()
    }

    fn tensors(&self) -> &Tensors {
        self.tensors()
    }

    fn notes(&self) -> &[Note] {
        self.notes()
    }

    fn digest(&self) -> &str {
        self.digest()
    }

    fn has_weights(&self) -> bool {
        !self.tensors().files().is_empty()
    }

    fn tokenizer(&self) -> Result<&str, ModelError> {
        self.tokenizer()
    }

    fn bytes(&self, positions: usize, weights: WeightFormat, keys: KvFormat) -> Bytes {
        Bytes {
            page: self.config().page_shape(keys).page_bytes(),
            weights: self.config().weight_bytes(self.tensors(), positions, weights),
            beside: 0,
        }
    }

    fn load(
        &self,
        cpu: &Arc<Cpu>,
        options: LoadOptions,
    ) -> Result<(Box<dyn ModelExecutor>, usize), ModelError> {
        C::load(self, cpu, options)
    }

    fn verify(&self, cpu: &Arc<Cpu>) -> Result<Verified, ModelError> {
        C::verify(self, cpu)
    }

    fn device_bytes(&self, limits: DeviceLimits) -> Result<Bytes, ModelError> {
        self.config().device_bytes(self.tensors(), limits)
    }

    fn load_on_device(
        &self,
        device: &Arc<dyn Device>,
        cpu: &Arc<Cpu>,
        positions: usize,
        pages: usize,
        catalog: &Arc<Catalog>,
    ) -> Result<Box<dyn ModelExecutor>, ModelError> {
        C::load_on_device(self, device, cpu, positions, pages, catalog)
    }
}

/// A configuration without its type.
#[derive(Clone, Debug)]
pub struct Summary {
    /// What the rest of the system needs to know.
    pub facts: Facts,
    /// Lines for people.
    pub lines: Vec<(&'static str, String)>,
    /// Bytes of a page, in a format.
    pub page_bytes: usize,
}

/// The functions of one family.
struct Registered {
    reads: fn(&Value) -> bool,
    open: fn(&Path) -> Result<Box<dyn Loaded>, ModelError>,
    examine: fn(&Path, KvFormat) -> Examined<Summary>,
    facts: fn(&str) -> Result<Facts, ModelError>,
}

const fn registered<C: FamilyConfig>() -> Registered {
    Registered {
        reads: C::reads,
        open: |directory| Ok(Box::new(Checkpoint::<C>::open_as(directory)?)),
        examine: |directory, format| {
            Checkpoint::<C>::examine(directory).map_config(|config| Summary {
                facts: config.facts(),
                lines: config.describe(),
                page_bytes: config.page_shape(format).page_bytes(),
            })
        },
        facts: |text| Ok(C::read(text, &mut Vec::new())?.facts()),
    }
}

/// Opens the directory of a checkpoint.
///
/// # Errors
///
/// When a file is missing or damaged, or config.json names an architecture that this build does not know.
pub fn open(directory: &Path) -> Result<Box<dyn Loaded>, ModelError> {
    (family_in(directory).open)(directory)
}

/// Looks at all of a directory, and goes on after a problem with what does not depend on it.
pub fn examine(directory: &Path, format: KvFormat) -> Examined<Summary> {
    (family_in(directory).examine)(directory, format)
}

/// What config.json says; its text is given.
///
/// # Errors
///
/// When it cannot be used.
pub fn facts(config: &str) -> Result<Facts, ModelError> {
    (family_of(config).facts)(config)
}

/// Whether a config.json is of a family that reads events. Nothing else of it is looked at.
pub fn reads_events(config: &str) -> bool {
    json::parse(config).is_ok_and(|config| <HstuConfig as FamilyConfig>::reads(&config))
}

fn family_in(directory: &Path) -> &'static Registered {
    family_of(&read_text(&directory.join("config.json"), MAX_CONFIG_BYTES).unwrap_or_default())
}

fn family_of(config: &str) -> &'static Registered {
    let config = json::parse(config).unwrap_or_default();
    let [.., last] = &FAMILIES;
    FAMILIES.iter().find(|family| (family.reads)(&config)).unwrap_or(last)
}
