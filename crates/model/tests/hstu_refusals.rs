//! HSTU: what is missing, contradictory or out of range is refused before anything is computed, by name.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "common/hstu.rs"]
mod hstu;
#[path = "common/made.rs"]
#[allow(dead_code, reason = "made for decoders too")]
mod made;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_kv_cache::ReuseClass;
use beamline_model::error::ModelError;
use beamline_model::families::hstu::Hstu;
use beamline_model::families::hstu::batch::HstuBatch;
use beamline_model::families::hstu::config::HstuConfig;
use beamline_model::families::hstu::inputs::{Candidates, InputError, Request};
use beamline_model::rows::ContextPart;
use hstu::*;
use serde_json::{Value, json};

fn sizes() -> ResearchSizes {
    ResearchSizes { items: 9, most: 6, positions: 8, width: 6, layers: 1, heads: 2, key: 3, value: 2 }
}

fn configs() -> Vec<Value> {
    vec![
        research(&sizes()),
        token_head(&sizes(), "concat", false),
        nvidia("in_out", true, "sigmoid", true),
        dlrm("rows"),
    ]
}

fn parse(config: &Value) -> Result<HstuConfig, String> {
    HstuConfig::parse(&config.to_string()).map_err(|error| error.to_string())
}

/// Paths of all fields, those within lists too.
fn fields(value: &Value, path: &str, out: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                let path = format!("{path}/{name}");
                fields(value, &path, out);
                out.push(path);
            }
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(index, item)| fields(item, &format!("{path}/{index}"), out));
        }
        _ => {}
    }
}

#[test]
fn every_constant_that_is_missing_is_named() {
    for config in configs() {
        parse(&config).unwrap();
        let mut paths = Vec::new();
        fields(&config, "", &mut paths);
        assert!(paths.len() > 30);
        for path in paths {
            let (parent, name) = path.rsplit_once('/').unwrap();
            let mut damaged = config.clone();
            damaged.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(name);
            let error = parse(&damaged).unwrap_err();
            assert!(error.contains(&format!("missing field `{name}`")), "{path}: {error}");
            // A misspelled field is not ignored.
            let mut damaged = config.clone();
            let object = damaged.pointer_mut(parent).unwrap().as_object_mut().unwrap();
            object.insert(format!("{name}_"), Value::Null);
            let error = parse(&damaged).unwrap_err();
            assert!(error.contains(&format!("unknown field `{name}_`")), "{path}: {error}");
        }
    }
}

#[test]
fn contradictions_and_nonsense_are_refused() {
    let cases: [(usize, &str, Value, &str); 28] = [
        (0, "/model_type", json!("qwen3"), "model_type is \"qwen3\""),
        (0, "/hstu_variant", json!("meta"), "hstu_variant: unknown variant `meta`"),
        (0, "/stack/model_dim", json!(0), "stack.model_dim is 0"),
        (0, "/stack/layers", json!(5000), "stack.layers is 5000"),
        (0, "/stack/logit_scale", json!(-1.0), "stack.logit_scale is -1"),
        (2, "/stack/attention_divisor", json!(-1), "constant of the checkpoint"),
        (0, "/stack/attention_divisor", json!("batch_max"), "stack.attention_divisor"),
        (0, "/stack/relative_bias/time_divisor", json!(0.3), "only 0.301 is implemented"),
        (0, "/stack/relative_bias/time_buckets", json!(129), "time_buckets is 129"),
        (0, "/stack/mask/contextual_len", json!(1), "relative_bias needs a causal mask"),
        (0, "/stack/uvqk_layout", json!("out_in"), "uvqk_layout"),
        (0, "/stack/input_norm/affine", json!(true), "no tensors for affine norms"),
        (0, "/stack/uvqk_layout", json!("per_head"), "unknown variant `per_head`"),
        (0, "/input/max_sequence_length", json!(9), "input.max_sequence_length exceeds"),
        (0, "/input/position/direction", json!("backward"), "not implemented for research"),
        (1, "/input/actions/generated", json!(4), "input.actions.generated is no action"),
        (1, "/output/head/tied", json!(true), "only an untied token head fits"),
        (1, "/output/head/vocab_size", json!(11), "output.head.vocab_size is 11"),
        (2, "/input/preprocessing_mlp", json!({}), "input.preprocessing_mlp is not implemented"),
        (2, "/input/item_table", json!("items"), "input.tables has no table \"items\""),
        (2, "/output/tasks", json!(["one"]), "output.tasks holds 1 names, expected 3"),
        (0, "/stack/input_norm/eps", json!(1e30), "stack.input_norm.eps is 1000"),
        (0, "/stack/input_norm/eps", json!("1e-6"), "expected a number"),
        (0, "/stack/logit_scale", json!("sqrt"), "expected a number, \"sqrt_model_dim\""),
        (0, "/stack/layers", json!("1"), "expected a whole number"),
        (0, "/stack/attention_divisor", json!(1e300), "stack.attention_divisor is"),
        (3, "/output/item_tower/features/0", json!("author"), "\"author\" is not in input.features"),
        (3, "/input/time/clamp", json!("columns"), "input.time.clamp: unknown variant"),
    ];
    for (config, path, value, expected) in cases {
        let mut config = configs()[config].clone();
        *config.pointer_mut(path).unwrap() = value;
        let error = parse(&config).unwrap_err();
        assert!(error.contains(expected), "{path}: {error}");
    }
    assert!(parse(&json!([])).is_err() && HstuConfig::parse("{").is_err());
    let twice = research(&sizes()).to_string().replacen("\"layers\":1", "\"layers\":1,\"layers\":2", 1);
    assert!(HstuConfig::parse(&twice).unwrap_err().to_string().contains("\"layers\" is given twice"));
    let misspelt = research(&sizes()).to_string().replacen("\"model_dim\"", "\"model_dims\"", 1);
    assert!(HstuConfig::parse(&misspelt).unwrap_err().to_string().contains("did you mean `model_dim`?"));
    assert!(HstuConfig::is_hstu(&research(&sizes()).to_string()) && !HstuConfig::is_hstu("{}"));
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let cpu = Cpu::new(1).unwrap();
    let open = |config: &Value, tensors: &Tensors| {
        let directory = checkpoint(config, tensors);
        Hstu::open(directory.path())
            .and_then(|opened| Hstu::load(&opened, &cpu, WeightFormat::F32))
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    for config in configs() {
        let tensors = random_tensors(&config, 1);
        for name in tensors.keys() {
            let mut missing = tensors.clone();
            missing.remove(name);
            assert!(open(&config, &missing).contains(&format!("missing {name}")), "{name}");
            let mut other = tensors.clone();
            let (shape, values) = other.get_mut(name).unwrap();
            shape.push(1);
            let expected = if values.is_empty() { "has shape" } else { name };
            assert!(open(&config, &other).contains(expected), "{name}");
        }
        let mut unknown = tensors.clone();
        unknown.insert("module._item_emb".into(), (vec![1], vec![0.0]));
        assert!(open(&config, &unknown).contains("unknown module._item_emb"));
        let mut poisoned = tensors.clone();
        let name = tensors.keys().next_back().unwrap();
        *poisoned.get_mut(name).unwrap().1.last_mut().unwrap() = f32::NAN;
        assert!(open(&config, &poisoned).contains("NaN"), "{name}");
    }
    // A buffer that says something else than the configuration.
    let config = dlrm("rows");
    let mut tensors = random_tensors(&config, 1);
    let name = "_hstu_transducer._output_postprocessor._period_units";
    tensors.insert(name.into(), (vec![1, 2], vec![3600.0, 604_800.0]));
    assert!(open(&config, &tensors).contains(name));
}

fn error(model: &Hstu, request: Request) -> InputError {
    model.prepare(request).unwrap_err()
}

#[test]
fn requests_that_cannot_be_computed_are_refused() {
    let cpu = Cpu::new(1).unwrap();
    let models: Vec<Hstu> = configs()
        .iter()
        .map(|config| load(config, &random_tensors(config, 1), &cpu, WeightFormat::F32))
        .collect();
    let [research, tokens, nvidia, dlrm] = &models[..] else { panic!("four models") };
    assert_eq!(error(research, history(&[], &[], &[], 0)), InputError::NoEvents);
    assert_eq!(
        error(research, history(&[1; 7], &[], &[0; 7], 0)),
        InputError::TooManyEvents { events: 7, most: 6 }
    );
    assert_eq!(
        error(research, history(&[1, 10], &[], &[0; 2], 0)),
        InputError::UnknownId { what: "item".into(), index: 1, id: 10, rows: 10 }
    );
    assert_eq!(
        error(research, history(&[1, 2, 3], &[], &[5, 9, 8], 9)),
        InputError::TimesRunBackwards { index: 2, time: 8, previous: 9 }
    );
    assert_eq!(
        error(research, history(&[1, 2], &[], &[5], 9)),
        InputError::Count { what: "times".into(), got: 1, expected: 2 }
    );
    for time in [i64::MAX, i64::MIN] {
        assert_eq!(error(research, history(&[1], &[], &[time], 9)), InputError::TimeOutOfRange(time));
        assert_eq!(error(research, history(&[1], &[], &[0], time)), InputError::TimeOutOfRange(time));
    }
    let mut ranked = history(&[1], &[], &[0], 9);
    ranked.candidates.items = vec![1];
    assert_eq!(error(research, ranked), InputError::NoRanking);
    assert_eq!(
        error(tokens, history(&[1], &[], &[0], 9)),
        InputError::Count { what: "actions".into(), got: 0, expected: 1 }
    );
    assert_eq!(
        error(tokens, history(&[1], &[4], &[0], 9)),
        InputError::UnknownId { what: "action".into(), index: 0, id: 4, rows: 4 }
    );

    let mut request = history(&[1], &[0], &[], 0);
    assert_eq!(
        error(nvidia, request.clone()),
        InputError::Count { what: "contextual features".into(), got: 0, expected: 1 }
    );
    request.contextual = vec![vec![1, 2, 3]];
    assert_eq!(
        error(nvidia, request.clone()),
        InputError::Count { what: "user_id".into(), got: 3, expected: 2 }
    );
    request.contextual = vec![vec![1]];
    request.candidates = Candidates { items: vec![1; 101], additional: Vec::new() };
    assert_eq!(error(nvidia, request.clone()), InputError::TooManyCandidates { candidates: 101, most: 100 });
    request.candidates.items = vec![60];
    assert_eq!(
        error(nvidia, request),
        InputError::UnknownId { what: "candidate item".into(), index: 0, id: 60, rows: 60 }
    );

    let mut request = history(&[1, 2], &[0, 1], &[3, 4], 5);
    request.contextual = vec![vec![1], vec![]];
    assert_eq!(
        error(dlrm, request.clone()),
        InputError::Count { what: "additional features of events".into(), got: 0, expected: 1 }
    );
    request.events.additional = vec![vec![1]];
    assert_eq!(
        error(dlrm, request.clone()),
        InputError::Count { what: "owner_id".into(), got: 1, expected: 2 }
    );
    // Owners clamp, by configuration; users do not.
    request.events.additional = vec![vec![1, 4_000_000_000]];
    dlrm.prepare(request.clone()).unwrap();
    request.contextual[0] = vec![10];
    assert_eq!(
        error(dlrm, request),
        InputError::UnknownId { what: "user_id".into(), index: 0, id: 10, rows: 10 }
    );
}

#[test]
fn a_context_with_contextual_rows_in_the_mask_is_computed_at_once() {
    let cpu = Cpu::new(1).unwrap();
    let mut config = nvidia("in_out", true, "sigmoid", true);
    config["stack"]["mask"]["contextual_len"] = 1.into();
    let model = load(&config, &random_tensors(&config, 1), &cpu, WeightFormat::F32);
    assert_eq!(model.reuse(), ReuseClass::WithinRequest);
    let mut request = history(&[1, 2], &[0, 1], &[], 0);
    request.contextual = vec![vec![3]];
    let prepared = model.prepare(request).unwrap();
    let mut batch = HstuBatch::default();
    let pages = table(0, 5);
    let rows = ContextPart { owner: 0, positions: 0..3, cached: 0, pages: &pages, wanted: 1 };
    let error = model.push_context(&cpu, &mut batch, &prepared, rows.clone()).unwrap_err();
    assert_eq!(error, InputError::NeedsWholeContext);
    model.push_context(&cpu, &mut batch, &prepared, ContextPart { positions: 0..5, ..rows }).unwrap();
}

#[test]
fn errors_of_config_json_are_config_errors() {
    assert!(matches!(HstuConfig::parse("{}"), Err(ModelError::Config(_))));
}
