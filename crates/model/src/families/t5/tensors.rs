//! What the files of a T5 hold: names as transformers saves them, and copies of the embedding.
//!
//! Place in the flow: the headers are compared with these names and shapes before anything is loaded.
//! The memory that the weights will take follows from them alone.
//!
//! Invariant: a checkpoint is refused where a copy of the embedding differs from it: libraries differ in
//! which one they take.

use std::collections::BTreeMap;

use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::tile::PANEL;

use super::config::T5Config;
use crate::checkpoint::described::{Described, Expected};
use crate::checkpoint::note::Note;
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;

pub(super) const EMBEDDING: &str = "shared.weight";
pub(super) const HEAD: &str = "lm_head.weight";
/// Names under which older libraries saved the embedding again.
const COPIES: [&str; 2] = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"];
/// A table that the first T5 had and that nothing reads; transformers skips it.
const UNUSED: &str = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight";
const BIAS: &str = "relative_attention_bias.weight";

impl Described for T5Config {
    fn read(json: &str, notes: &mut Vec<Note>) -> Result<Self, ModelError> {
        Self::parse_with(json, notes)
    }

    fn layers(&self) -> usize {
        self.encoder_layers + self.decoder_layers
    }

    fn expected(&self, _tensors: &Tensors) -> Expected {
        let head = self.tied_head.then_some(HEAD);
        let optional = COPIES.into_iter().chain(head).chain([UNUSED]).map(str::to_owned).collect();
        Expected { shapes: expected_tensors(self), optional }
    }

    fn is_trained(&self, name: &str, shape: &[usize]) -> bool {
        // A model may have learnt that distance does not matter.
        shape.len() > 1 && !name.ends_with(BIAS)
    }

    fn check_values(&self, tensors: &Tensors) -> Vec<ModelError> {
        let head = self.tied_head.then_some(HEAD);
        let copies = COPIES.into_iter().chain(head);
        copies.filter_map(|name| check_copy(tensors, name).err()).collect()
    }
}

fn check_copy(tensors: &Tensors, name: &str) -> Result<(), ModelError> {
    if !tensors.entries().contains_key(name) || tensors.are_equal(name, EMBEDDING)? {
        return Ok(());
    }
    let advice = match name {
        HEAD => {
            "set tie_word_embeddings to false to serve it, or remove it from the file to serve the embedding"
        }
        _ => "transformers does not read it; remove it from the file",
    };
    let because = if name == HEAD { "tie_word_embeddings is true, but " } else { "" };
    Err(ModelError::Mismatch(vec![format!("{because}{name} is not {EMBEDDING}: {advice}")]))
}

/// A stack of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stack {
    Encoder,
    Decoder,
}

impl Stack {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Encoder => "encoder",
            Self::Decoder => "decoder",
        }
    }

    /// The sublayer of a block that is the feed-forward layer.
    pub(super) fn feed_forward(self) -> usize {
        match self {
            Self::Encoder => 1,
            Self::Decoder => 2,
        }
    }

    /// The name of the table of relative biases.
    pub(super) fn bias(self) -> String {
        format!("{}.block.0.layer.0.SelfAttention.{BIAS}", self.name())
    }
}

/// Names and shapes that a checkpoint of this configuration must have.
pub fn expected_tensors(config: &T5Config) -> BTreeMap<String, Vec<usize>> {
    let matrix = vec![config.vocab_size, config.d_model];
    let mut expected = BTreeMap::from([(EMBEDDING.to_owned(), matrix.clone())]);
    if !config.tied_head {
        expected.insert(HEAD.to_owned(), matrix);
    }
    for (stack, layers) in [(Stack::Encoder, config.encoder_layers), (Stack::Decoder, config.decoder_layers)]
    {
        expected.insert(stack.bias(), vec![config.buckets, config.num_heads]);
        expected.insert(format!("{}.final_layer_norm.weight", stack.name()), vec![config.d_model]);
        for block in 0..layers {
            add_block(config, stack, block, &mut expected);
        }
    }
    expected
}

fn add_block(config: &T5Config, stack: Stack, block: usize, expected: &mut BTreeMap<String, Vec<usize>>) {
    let (width, inner, feed) = (config.d_model, config.inner(), config.d_ff);
    let mut add = |name: String, shape: Vec<usize>| {
        expected.insert(format!("{}.block.{block}.layer.{name}.weight", stack.name()), shape);
    };
    let attentions: &[(usize, &str)] = match stack {
        Stack::Encoder => &[(0, "SelfAttention")],
        Stack::Decoder => &[(0, "SelfAttention"), (1, "EncDecAttention")],
    };
    for (layer, attention) in attentions {
        for product in ["q", "k", "v"] {
            add(format!("{layer}.{attention}.{product}"), vec![inner, width]);
        }
        add(format!("{layer}.{attention}.o"), vec![width, inner]);
        add(format!("{layer}.layer_norm"), vec![width]);
    }
    let layer = stack.feed_forward();
    add(format!("{layer}.layer_norm"), vec![width]);
    let first: &[&str] = if config.gated { &["wi_0", "wi_1"] } else { &["wi"] };
    for name in first {
        add(format!("{layer}.DenseReluDense.{name}"), vec![feed, width]);
    }
    add(format!("{layer}.DenseReluDense.wo"), vec![width, feed]);
}

/// Bytes of the weights once they are loaded: an upper bound, from the configuration alone.
pub fn memory(config: &T5Config, format: WeightFormat) -> usize {
    let embedding = config.vocab_size.saturating_mul(config.d_model).saturating_mul(4);
    // Matrices are packed in panels, and their inputs in blocks that are no larger. The last of each may
    // be half empty.
    let packed = |shape: &[usize]| {
        let sides = shape.iter().map(|side| side.next_multiple_of(PANEL));
        let values = sides.fold(1_usize, usize::saturating_mul);
        match format {
            WeightFormat::F32 => values.saturating_mul(4),
            WeightFormat::Bf16 => values.saturating_mul(2),
            // A byte and an eighth of one.
            WeightFormat::Q8_0 => values.saturating_add(values.div_ceil(8)),
        }
    };
    let expected = expected_tensors(config);
    let tied = config.tied_head.then(|| packed(&[config.vocab_size, config.d_model]));
    let all = expected.iter().map(|(name, shape)| match shape.as_slice() {
        _ if name == EMBEDDING || name.ends_with(BIAS) => 0,
        [norm] => norm.saturating_mul(4),
        shape => packed(shape),
    });
    let tables = 2 * config.relative().table_bytes();
    // The norm before the output matrix is kept twice.
    let norms = 4 * config.d_model;
    all.chain(tied).fold(embedding.saturating_add(tables + norms), usize::saturating_add)
}
