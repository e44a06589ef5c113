//! Files of encoder-decoders: which tensors may be there beside those that are read, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;

use std::collections::HashMap;
use std::path::Path;

use beamline_compute::cpu::linear::WeightFormat;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::families::t5::T5;
use beamline_model::families::t5::config::T5Config;
use candle_core::{Device, Tensor};

type Tensors = HashMap<String, Tensor>;

/// Opens and loads a fixture after its tensors were changed.
fn load(name: &str, change: impl FnOnce(&mut Tensors)) -> Result<T5, String> {
    let (directory, source) = (tempfile::tempdir().unwrap(), common::fixture(name));
    let mut tensors = candle_core::safetensors::load(source.join("model.safetensors"), &Device::Cpu).unwrap();
    change(&mut tensors);
    std::fs::copy(source.join("config.json"), directory.path().join("config.json")).unwrap();
    candle_core::safetensors::save(&tensors, directory.path().join("model.safetensors")).unwrap();
    let open = |path: &Path| T5::load(&Checkpoint::<T5Config>::open_as(path)?, WeightFormat::F32);
    open(directory.path()).map_err(|error| error.to_string())
}

fn copy(tensors: &mut Tensors, to: &str) {
    tensors.insert(to.to_owned(), tensors["shared.weight"].copy().unwrap());
}

fn other(tensors: &mut Tensors, to: &str) {
    tensors.insert(to.to_owned(), (&tensors["shared.weight"] * 2.0).unwrap());
}

const COPIES: [&str; 3] = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"];

#[test]
fn copies_of_the_embedding_are_ignored() {
    load("t5-tiger", |tensors| COPIES.iter().for_each(|name| copy(tensors, name))).unwrap();
    load("t5-tiger-gated", |tensors| COPIES[..2].iter().for_each(|name| copy(tensors, name))).unwrap();
    // The first T5 had a table there that nothing reads.
    load("t5-tiger", |tensors| {
        let table = tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].clone();
        let name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight";
        tensors.insert(name.to_owned(), table);
    })
    .unwrap();
}

#[test]
fn what_only_looks_like_a_copy_is_refused_by_name() {
    for name in COPIES {
        let error = load("t5-tiger", |tensors| other(tensors, name)).unwrap_err();
        assert!(error.contains(&format!("{name} is not shared.weight")), "{error}");
    }
    // Its own output matrix is what this one has.
    load("t5-tiger-gated", |tensors| other(tensors, "lm_head.weight")).unwrap();
}

#[test]
fn tensors_that_are_missing_unknown_or_of_another_shape_are_named() {
    let missing = "decoder.block.1.layer.1.EncDecAttention.k.weight";
    let wrong = "encoder.block.0.layer.1.DenseReluDense.wo.weight";
    let error = load("t5-tiger", |tensors| {
        tensors.remove(missing);
        copy(tensors, wrong);
        copy(tensors, "encoder.block.2.layer.0.layer_norm.weight");
    })
    .unwrap_err();
    assert!(error.contains(&format!("missing {missing}")), "{error}");
    assert!(error.contains(&format!("{wrong} has shape")), "{error}");
    assert!(error.contains("unknown encoder.block.2"), "{error}");
}
