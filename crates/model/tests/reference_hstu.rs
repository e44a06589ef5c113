//! HSTU in the engine beside its reference in candle-nn, beside references that are wrong, and
//! beside what the public code computes. The folder is that of `BEAMLINE_CONFORMANCE`.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "common/hstu.rs"]
mod hstu;
#[path = "common/hstu_fixtures.rs"]
mod hstu_fixtures;
#[path = "common/made.rs"]
#[allow(dead_code, reason = "made for decoders too")]
mod made;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use beamline_compute::cpu::Cpu;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::checkpoint::tensors::Tensors as Opened;
use beamline_model::families::hstu::config::{
    DlrmInput, HstuConfig, ResearchHead, TimeClamp, Variant, VariantConfig,
};
use beamline_model::families::hstu::inputs::Request;
use beamline_model::families::hstu::{Hstu, engine_outputs, verify};
use beamline_model::reference::verify::Verified;
use beamline_model::reference::verify_hstu::verify_hstu;
use beamline_model::reference::{HstuLayers, HstuReference};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use hstu::*;
use hstu_fixtures::*;
use serde_json::{Value, json};

/// How close the reference comes to outputs in double precision, and to those in single.
const DOUBLE: f64 = 1e-9;
const SINGLE: f64 = 1e-5;

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(2).unwrap())
}

fn reference(config: &HstuConfig, tensors: &Opened, dtype: DType) -> HstuReference {
    HstuReference::new(config, tensors, dtype, &Device::Cpu).unwrap()
}

fn largest_difference(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, |a, b| if b <= a { a } else { b })
}

/// Outputs of requests beside those of a fixture, in a type.
fn check(
    checkpoint: &Checkpoint<HstuConfig>,
    cases: &[(Request, Vec<f64>)],
    dtype: DType,
    tolerance: f64,
    what: &str,
) {
    let reference = reference(checkpoint.config(), checkpoint.tensors(), dtype);
    let of = |(request, expected): &(Request, Vec<f64>)| {
        let request = checkpoint.config().prepare(request.clone()).unwrap();
        largest_difference(&reference.outputs(&request).unwrap(), expected)
    };
    let difference = cases.iter().map(of).fold(0.0, f64::max);
    eprintln!("{what}, {dtype:?}: {difference:.1e}");
    assert!(!cases.is_empty() && difference <= tolerance, "{what}: {difference}");
}

/// Scores of all items, in the double precision of the fixture.
#[test]
fn the_research_variant_is_that_of_the_public_code() {
    for (name, stages) in [("hstu-research", &[""][..]), ("hstu-research-append", &["a.", "b.", "c."])] {
        let Some(folder) = folder::find(name) else { continue };
        let config = research_of(&folder::read_json(&folder.join("config.json")));
        let [single, double] =
            ["fp32", "fp64"].map(|file| tensors_of(&folder.join(format!("{file}.safetensors"))));
        let directory = checkpoint(&config, &state(&single, ""));
        let checkpoint = Hstu::open(directory.path()).unwrap();
        for stage in stages {
            let scores = double[&format!("out.{stage}scores")].clone();
            let scores = (0..).map(|user| values(&scores.get(user).unwrap()));
            let cases: Vec<_> = requests(&single, stage).into_iter().zip(scores).collect();
            let what = format!("{name} {stage}");
            check(&checkpoint, &cases, DType::F64, DOUBLE, &what);
            check(&checkpoint, &cases, DType::F32, SINGLE, &what);
        }
    }
}

/// Predictions of all tasks, in the single precision of the fixture.
#[test]
fn the_production_variant_is_that_of_the_public_code() {
    let Some(folder) = folder::find("hstu-stu") else { return };
    let config = folder::read_json(&folder.join("dlrm_config.json"));
    let file = tensors_of(&folder.join("dlrm_hstu_fp32.safetensors"));
    for (clamp, outputs) in [("model_dim", "dlrm_hstu_fp32"), ("rows", "dlrm_hstu_clamp_rows_fp32")] {
        let predictions = tensors_of(&folder.join(format!("{outputs}.safetensors")))["out.preds"].clone();
        let directory = checkpoint(&ranking_config(&config, &file, clamp), &state(&file, ""));
        let mut first = 0;
        let cases = requests_of(&config, &file).into_iter().map(|request| {
            let candidates = request.candidates.items.len();
            let own = predictions.narrow(1, first, candidates).unwrap().t().unwrap();
            first += candidates;
            (request, values(&own.contiguous().unwrap()))
        });
        let cases: Vec<_> = cases.collect();
        let checkpoint = Hstu::open(directory.path()).unwrap();
        for dtype in [DType::F64, DType::F32] {
            check(&checkpoint, &cases, dtype, SINGLE, outputs);
        }
    }
}

/// All layers with windows, contextual rows and group norms, in the single precision of the
/// fixture.
#[test]
fn the_layers_are_those_of_the_public_code() {
    let Some(folder) = folder::find("hstu-stu") else { return };
    let config = folder::read_json(&folder.join("config.json"));
    for case in config["cases"].as_object().unwrap().keys() {
        let file = tensors_of(&folder.join(format!("stu_{case}_fp32.safetensors")));
        let (stack, _, targets) = layers_of(&config, case, &file);
        let own = file.iter().filter_map(|(name, tensor)| {
            Some((name.strip_prefix("state._stu_layers.")?.to_owned(), tensor.clone()))
        });
        let vb = VarBuilder::from_tensors(own.collect(), DType::F64, &Device::Cpu);
        let layers = HstuLayers::new(&stack, Variant::Dlrm, &vb).unwrap();
        let (mut first, mut difference) = (0, 0.0_f64);
        for (user, len) in integers(&file["in.lengths"]).into_iter().enumerate() {
            let len = len as usize;
            let after = if targets { integers(&file["in.num_targets"])[user] as usize } else { 0 };
            let own = |name: &str| file[name].narrow(0, first, len).unwrap().to_dtype(DType::F64).unwrap();
            let found = layers.forward(&own("in.x"), len - after, &[]).unwrap();
            difference = difference.max(largest_difference(&values(&found), &values(&own("out.y"))));
            first += len;
        }
        eprintln!("stu_{case}: {difference:.1e}");
        assert!(first > 0 && difference <= SINGLE, "{case}: {difference}");
    }
}

/// A configuration with other values in some places, by JSON pointer.
fn changed(mut config: Value, changes: &[(&str, Value)]) -> Value {
    for (place, value) in changes {
        *config.pointer_mut(place).unwrap() = value.clone();
    }
    config
}

/// Configurations of what no fixture has.
fn made_up() -> Vec<Value> {
    let sizes = || ResearchSizes {
        items: 40,
        most: 70,
        positions: 74,
        width: 14,
        layers: 3,
        heads: 2,
        key: 5,
        value: 6,
    };
    let mask = json!({"contextual_len": 3, "max_attention_len": 5, "min_full_attention_len": 2});
    let group = json!({"kind": "group", "affine": true, "eps": 1e-6});
    vec![
        token_head(&sizes(), "add", true),
        token_head(&sizes(), "concat", false),
        changed(research(&sizes()), &[("/input/padding_id", Value::Null), ("/stack/silu", json!("none"))]),
        changed(research(&sizes()), &[("/stack/output_parts", json!("concat_normed"))]),
        nvidia("in_out", true, "sigmoid", true),
        nvidia("out_in", false, "sigmoid", true),
        nvidia("in_out", false, "softmax", false),
        changed(nvidia("in_out", true, "sigmoid", true), &[("/input/position/rows", json!(9))]),
        changed(dlrm("rows"), &[("/stack/mask", mask), ("/stack/output_norm", group)]),
        changed(
            dlrm("model_dim"),
            &[
                ("/input/features", json!([{"name": "video_id", "table": "video_id"}])),
                (
                    "/input/tables",
                    json!([
                        {"name": "video_id", "rows": 50, "unknown_ids": "refuse"},
                        {"name": "user_id", "rows": 10, "unknown_ids": "refuse"},
                        {"name": "country", "rows": 6, "unknown_ids": "clamp"}
                    ]),
                ),
                ("/output/item_tower/features", json!(["video_id"])),
                ("/output/postprocessor", json!({"kind": "l2", "eps": 1e-6})),
            ],
        ),
        changed(
            dlrm("rows"),
            &[
                ("/output/postprocessor", json!({"kind": "layer_norm", "eps": 1e-5})),
                ("/input/contextual", json!([])),
                (
                    "/input/tables",
                    json!([
                        {"name": "video_id", "rows": 50, "unknown_ids": "refuse"},
                        {"name": "owner_id", "rows": 20, "unknown_ids": "clamp"}
                    ]),
                ),
            ],
        ),
    ]
}

/// Checkpoints of the fixtures, each with its name; those in folders of their own are kept by the
/// folders.
fn checkpoints() -> Vec<(String, tempfile::TempDir)> {
    let research = |name: &str| {
        let folder = folder::repository().join(name);
        let config = research_of(&folder::read_json(&folder.join("config.json")));
        checkpoint(&config, &state(&tensors_of(&folder.join("fp32.safetensors")), ""))
    };
    let mut all: Vec<_> = ["hstu-research", "hstu-research-append"]
        .map(|name| (name.to_owned(), research(name)))
        .into_iter()
        .collect();
    let (config, file) = (fixture_json("stu/dlrm_config.json"), fixture("stu/dlrm_hstu_fp32.safetensors"));
    for clamp in ["model_dim", "rows"] {
        let directory = checkpoint(&ranking_config(&config, &file, clamp), &state(&file, ""));
        all.push((format!("dlrm, clamp {clamp}"), directory));
    }
    for (number, config) in made_up().into_iter().enumerate() {
        all.push((format!("made up {number}"), checkpoint(&config, &random_tensors(&config, 7))));
    }
    all
}

fn served() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/tests/fixtures/hstu-semantic-ids")
}

#[test]
fn every_hstu_model_agrees_with_its_reference() {
    let made = checkpoints();
    let served = ("semantic IDs".to_owned(), served());
    let made = made.iter().map(|(name, directory)| (name.clone(), directory.path().to_owned()));
    for (name, directory) in made.chain([served]) {
        let verified = verify(&Hstu::open(&directory).unwrap(), &cpu()).unwrap();
        eprintln!("{name}: {verified}");
        assert!(verified.agrees() && verified.largest_output > 0.1, "{name}: {verified}");
    }
}

/// What the comparison says of an engine that computes a checkpoint beside a reference of other
/// constants, or with two of its tensors exchanged.
fn compared(directory: &Path, config: &HstuConfig, exchanged: Option<[&str; 2]>) -> Verified {
    let right = Hstu::open(directory).unwrap();
    let other = tempfile::tempdir().unwrap();
    let mut tensors = tensors_of(&directory.join("model.safetensors"));
    if let Some([one, two]) = exchanged {
        let (first, second) = (tensors.remove(one).unwrap(), tensors.remove(two).unwrap());
        assert_eq!(first.dims(), second.dims());
        tensors.extend([(one.to_owned(), second), (two.to_owned(), first)]);
    }
    candle_core::safetensors::save(&tensors, other.path().join("model.safetensors")).unwrap();
    let wrong = reference(config, &Opened::open(other.path()).unwrap(), DType::F64);
    verify_hstu(&mut *engine_outputs(&right, &cpu()).unwrap(), &wrong, right.config()).unwrap()
}

fn config_of(directory: &Path) -> HstuConfig {
    Hstu::open(directory).unwrap().config().clone()
}

/// Changes a configuration in one place.
type Fault = fn(&mut HstuConfig);

/// Asserts that each fault of the constants is found, and that without one there is none.
fn assert_found(directory: &Path, faults: &[(&str, Fault)]) {
    let right = config_of(directory);
    assert!(compared(directory, &right, None).agrees());
    for (what, fault) in faults {
        let mut config = right.clone();
        fault(&mut config);
        assert_ne!(config, right, "{what}");
        let verified = compared(directory, &config, None);
        eprintln!("{what}: {verified}");
        assert!(!verified.agrees(), "{what}: {verified}");
    }
}

#[test]
fn wrong_constants_of_the_research_variant_are_found() {
    let config = research_config("research-append");
    let directory = checkpoint(&config, &state(&fixture("research-append/fp32.safetensors"), ""));
    assert_found(
        directory.path(),
        &[
            ("epsilon of the input norm", |config| config.stack.input_norm.eps = 1e-2),
            ("epsilon of the output norm", |config| config.stack.output_norm.eps = 1e-3),
            ("divisor of the attention", |config| config.stack.attention_divisor *= 100.0),
            ("time constant", |config| {
                config.stack.relative_bias.as_mut().unwrap().time_divisor = 0.31;
            }),
        ],
    );
}

#[test]
fn wrong_constants_of_the_token_head_are_found() {
    assert_found(
        &served(),
        &[
            ("epsilon", |config| config.stack.output_norm.eps = 1e-2),
            ("factor of the logits", |config| {
                let VariantConfig::Research(_, output) = &mut config.variant else { panic!("research") };
                let ResearchHead::Tokens { logit_scale, .. } = &mut output.head else { panic!("tokens") };
                *logit_scale *= 1.01;
            }),
        ],
    );
}

#[test]
fn wrong_constants_of_the_ranking_variants_are_found() {
    let (config, file) = (fixture_json("stu/dlrm_config.json"), fixture("stu/dlrm_hstu_fp32.safetensors"));
    let directory = checkpoint(&ranking_config(&config, &file, "rows"), &state(&file, ""));
    fn dlrm_input(config: &mut HstuConfig) -> &mut DlrmInput {
        let VariantConfig::Dlrm(input, _) = &mut config.variant else { panic!("dlrm") };
        input
    }
    assert_found(
        directory.path(),
        &[
            ("epsilon of the MLPs", |config| dlrm_input(config).norm_eps = 1e-2),
            ("divisor of ages", |config| dlrm_input(config).time.divisor = 61.0),
            ("highest time bucket", |config| {
                dlrm_input(config).time.clamp = TimeClamp::ModelDim;
            }),
            ("order of action bits", |config| dlrm_input(config).action_weights.reverse()),
            ("mask", |config| config.stack.mask.max_attention_len = 3),
        ],
    );
    let config = nvidia("in_out", true, "sigmoid", true);
    let directory = checkpoint(&config, &random_tensors(&config, 7));
    assert_found(
        directory.path(),
        &[
            ("epsilon", |config| config.stack.output_norm.eps = 1e-3),
            ("divisor", |config| config.stack.attention_divisor = 80.0),
        ],
    );
}

/// Checkpoints, each with two tensors of one shape and its table of positions.
fn with_tensors() -> Vec<(tempfile::TempDir, [&'static str; 2], &'static str)> {
    let (config, file) = (fixture_json("stu/dlrm_config.json"), fixture("stu/dlrm_hstu_fp32.safetensors"));
    let research = state(&fixture("research/fp32.safetensors"), "");
    let nvidia = nvidia("out_in", true, "sigmoid", true);
    vec![
        (
            checkpoint(&research_config("research"), &research),
            ["_hstu._attention_layers.0._uvqk", "_hstu._attention_layers.1._uvqk"],
            "_input_features_preproc._pos_emb.weight",
        ),
        (
            checkpoint(&ranking_config(&config, &file, "rows"), &state(&file, "")),
            [
                "_hstu_transducer._stu_module._stu_layers.0._output_norm_weight",
                "_hstu_transducer._stu_module._stu_layers.0._output_norm_bias",
            ],
            "_hstu_transducer._positional_encoder._position_embeddings_weight",
        ),
        (
            checkpoint(&nvidia, &random_tensors(&nvidia, 7)),
            [
                "_hstu_block._attention_layers.0._linear_proj.weight",
                "_hstu_block._attention_layers.1._linear_proj.weight",
            ],
            "_hstu_block._preprocessor._positional_encoder._position_embeddings_weight",
        ),
    ]
}

/// Two tensors of one shape exchanged, and a table of positions that begins with its second row.
#[test]
fn wrong_tensors_are_found() {
    for (directory, exchanged, positions) in with_tensors() {
        let (path, config) = (directory.path(), config_of(directory.path()));
        assert!(compared(path, &config, None).agrees());
        let verified = compared(path, &config, Some(exchanged));
        eprintln!("{exchanged:?}: {verified}");
        assert!(!verified.agrees(), "{exchanged:?}: {verified}");

        let mut engine = engine_outputs(&Hstu::open(path).unwrap(), &cpu()).unwrap();
        let mut tensors: HashMap<String, Tensor> = tensors_of(&path.join("model.safetensors"));
        let table = tensors.remove(positions).unwrap();
        let rows = table.dim(0).unwrap();
        let shifted = [table.narrow(0, 1, rows - 1).unwrap(), table.narrow(0, 0, 1).unwrap()];
        tensors.insert(positions.to_owned(), Tensor::cat(&shifted, 0).unwrap());
        let other = tempfile::tempdir().unwrap();
        candle_core::safetensors::save(&tensors, other.path().join("model.safetensors")).unwrap();
        let wrong = reference(&config, &Opened::open(other.path()).unwrap(), DType::F64);
        let verified = verify_hstu(&mut *engine, &wrong, &config).unwrap();
        eprintln!("shifted {positions}: {verified}");
        assert!(!verified.agrees(), "{positions}: {verified}");
    }
}
