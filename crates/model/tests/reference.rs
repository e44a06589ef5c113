//! The engine beside its reference in candle-nn, and beside references that are wrong.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use beamline_compute::cpu::Cpu;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::checkpoint::config::Config;
use beamline_model::checkpoint::tensors::Tensors;
use beamline_model::families::t5::config::T5Config;
use beamline_model::loaded;
use beamline_model::reference::verify::{Referenced, Verified, verify};
use beamline_model::reference::{DecoderReference, Reference, T5Reference};
use candle_core::{DType, Device, Tensor};
use common::{fixture, folder};

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(2).unwrap())
}

#[test]
fn every_token_model_agrees_with_its_reference() {
    let variants = folder::variants().into_iter().filter(|path| loaded::open(path).is_ok());
    let cases: Vec<_> = folder::token_models().into_iter().chain(variants).collect();
    assert!(cases.len() > 10, "{}", cases.len());
    for case in cases {
        let verified = loaded::open(&case).unwrap().verify(&cpu()).unwrap();
        assert!(verified.agrees() && verified.largest_output > 0.1, "{}: {verified}", case.display());
    }
}

/// Last logits of a decoder in double precision are those of the fixture.
#[test]
fn references_are_those_of_transformers() {
    for case in folder::token_models() {
        let record = folder::read_json(&case.join("cases.json"));
        let tensors = candle_core::safetensors::load(case.join("cases.safetensors"), &Device::Cpu).unwrap();
        let loaded::Facts::Tokens(facts) = loaded::open(&case).unwrap().facts() else {
            panic!("{} reads tokens", case.display())
        };
        let start = facts.decoder.map(|decoder| decoder.start_token.unwrap());
        let reference = reference(&case);
        for prompt in record["prompts"].as_array().unwrap().iter().take(4) {
            let name = prompt["name"].as_str().unwrap();
            let ids: Vec<i64> = tensors[&format!("{name}.input_ids")].to_vec1().unwrap();
            let mut tokens: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
            tokens.extend(start);
            if tokens.is_empty() {
                continue;
            }
            let expected: Vec<f64> = tensors[&format!("{name}.logits.f64")].to_vec1().unwrap();
            let found = reference.logits(&tokens).unwrap();
            for (found, expected) in found.iter().zip(&expected) {
                let difference = (found - expected).abs();
                assert!(difference < 1e-5, "{} {name}: {found} against {expected}", case.display());
            }
        }
    }
}

fn reference(case: &Path) -> Box<dyn Reference> {
    match folder::architecture(case).as_str() {
        "T5ForConditionalGeneration" => {
            T5Config::reference(&Checkpoint::<T5Config>::open_as(case).unwrap()).unwrap()
        }
        _ => Config::reference(&Checkpoint::open(case).unwrap()).unwrap(),
    }
}

/// What the comparison says of an engine that computes this checkpoint beside a reference of another.
fn compared<C: Referenced>(
    checkpoint: &Checkpoint<C>,
    reference: &dyn Reference,
    vocab_size: usize,
    start: Option<u32>,
) -> Verified {
    let mut engine = C::engine_logits(checkpoint, &cpu()).unwrap();
    verify(&mut *engine, reference, vocab_size, start).unwrap()
}

/// The tensors of a checkpoint in another directory, two of them exchanged.
fn exchanged(case: &Path, one: &str, other: &str) -> (tempfile::TempDir, Vec<String>) {
    let directory = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(case.join(name), directory.path().join(name)).unwrap();
    }
    let mut tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(case.join("model.safetensors"), &Device::Cpu).unwrap();
    let (first, second) = (tensors.remove(one).unwrap(), tensors.remove(other).unwrap());
    tensors.insert(one.to_owned(), second);
    tensors.insert(other.to_owned(), first);
    candle_core::safetensors::save(&tensors, directory.path().join("model.safetensors")).unwrap();
    (directory, tensors.into_keys().collect())
}

#[test]
fn a_swapped_tensor_and_a_wrong_epsilon_are_found() {
    let case = fixture("qwen3-untied");
    let right = Checkpoint::open(&case).unwrap();
    let (config, tensors): (&Config, &Tensors) = (right.config(), right.tensors());
    let vocab = config.vocab_size;
    let epsilon = Config { rms_norm_eps: 1e-2, ..config.clone() };
    let wrong = DecoderReference::new(&epsilon, tensors, DType::F64, &Device::Cpu).unwrap();
    assert!(!compared(&right, &wrong, vocab, None).agrees());
    let layer = "model.layers.1.self_attn";
    let (swapped, _) = exchanged(&case, &format!("{layer}.k_proj.weight"), &format!("{layer}.v_proj.weight"));
    let swapped = Checkpoint::open(swapped.path()).unwrap();
    let wrong = DecoderReference::new(config, swapped.tensors(), DType::F64, &Device::Cpu).unwrap();
    assert!(!compared(&right, &wrong, vocab, None).agrees());

    let right = Checkpoint::<T5Config>::open_as(&fixture("t5-tiger")).unwrap();
    let config = right.config();
    let distance = T5Config { max_distance: 20, ..config.clone() };
    let wrong = T5Reference::new(&distance, right.tensors(), DType::F64, &Device::Cpu).unwrap();
    assert!(!compared(&right, &wrong, config.vocab_size, Some(0)).agrees());
}
