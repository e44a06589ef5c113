//! Rotary embedding: what config.json says of it.
//!
//! Newer libraries write one block, `rope_parameters`; older ones write `rope_theta` and `rope_scaling`.
//! Both are read. Where both are present, or a value is given in two places, they must agree: libraries
//! differ in which one they take.

use beamline_wording::did_you_mean;
use serde_json::{Map, Value};

use super::fields::{Bounds, Fields, shown};
use super::read::default_note;
use super::{MAX_SIZE, Rope, RopeScaling};
use crate::checkpoint::note::Note;

/// Base where none is given, as in transformers.
const DEFAULT_THETA: f64 = 10_000.0;
const THETA: Bounds = Bounds { above: 1.0, most: 1e12 };
const FACTOR: Bounds = Bounds { above: 0.0, most: 1e6 };
/// The `mscale` fields may be zero, which says that they are not used.
const MSCALE: Bounds = Bounds { above: -f64::MIN_POSITIVE, most: 1e3 };

/// All fields of a block.
pub(super) const FIELDS: [&str; 14] = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
    "partial_rotary_factor",
];
/// A field of a block that records how a model was trained.
const FINETUNED: &str = "finetuned";

/// What the fields outside of the block say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outside {
    /// `rope_theta`: base of the frequencies.
    pub(super) theta: Option<f64>,
    /// `original_max_position_embeddings`: context length before scaling.
    pub(super) original: Option<usize>,
    /// `max_position_embeddings`: longest context of the model.
    pub(super) positions: usize,
}

/// Reads the rotary embedding from the fields of config.json.
pub(super) fn read(fields: &mut Fields<'_>, positions: usize, notes: &mut Vec<Note>) -> Option<Rope> {
    let outside = Outside {
        theta: fields.number("rope_theta", THETA),
        original: fields.nullable_size("original_max_position_embeddings", MAX_SIZE),
        positions,
    };
    let mut block = |name: &'static str, path: &'static str| {
        let object = match fields.get(name) {
            None | Some(Value::Null) => return None,
            Some(Value::Object(object)) => object,
            Some(other) => {
                fields.problem(format!("{name} is {}, expected an object", shown(other)));
                return None;
            }
        };
        // An empty block says as much as none.
        if object.is_empty() {
            return None;
        }
        let (rope, problems) = read_block(path, object, outside, notes);
        problems.into_iter().for_each(|problem| fields.problem(problem));
        Some(rope)
    };
    let scaling = block("rope_scaling", "rope_scaling.");
    let parameters = block("rope_parameters", "rope_parameters.");
    match (parameters, scaling) {
        (Some(parameters), Some(scaling)) => {
            if parameters != scaling {
                fields.problem(
                    "rope_parameters and rope_scaling are both there and say different things (transformers takes \
                     rope_scaling, and its rope_theta from outside of both); keep one of them",
                );
            }
            parameters
        }
        (Some(rope), None) | (None, Some(rope)) => rope,
        (None, None) => {
            Some(Rope { theta: theta_or_default(outside.theta, notes), scaling: RopeScaling::Default })
        }
    }
}

fn theta_or_default(theta: Option<f64>, notes: &mut Vec<Note>) -> f64 {
    theta.unwrap_or_else(|| {
        notes.push(default_note("rope_theta", DEFAULT_THETA));
        DEFAULT_THETA
    })
}

/// One block, and what is wrong with it.
fn read_block(
    path: &'static str,
    object: &Map<String, Value>,
    outside: Outside,
    notes: &mut Vec<Note>,
) -> (Option<Rope>, Vec<String>) {
    let mut block = Fields::of(path, object);
    if object.values().any(Value::is_object) {
        block.problem("parameters per layer type are not implemented");
        return (None, block.problems());
    }
    for name in block.names().filter(|name| !FIELDS.contains(name) && *name != FINETUNED) {
        block.problem(format!("{name} is not known{}", did_you_mean(name, FIELDS)));
    }
    let theta = agreed_theta(&mut block, outside.theta, notes);
    block.nullable_number("partial_rotary_factor", FACTOR).filter(|&part| part != 1.0).inspect(|part| {
        block
            .problem(format!("partial_rotary_factor is {part}: heads that turn in part are not implemented"));
    });
    let kind = kind(&mut block);
    let scaling = kind.and_then(|kind| scaling(kind, &mut block, outside, notes));
    let rope = theta.zip(scaling).map(|(theta, scaling)| Rope { theta, scaling });
    (rope, block.problems())
}

/// The base, which may be in the block, outside of it, or equal in both.
fn agreed_theta(block: &mut Fields<'_>, outside: Option<f64>, notes: &mut Vec<Note>) -> Option<f64> {
    match (block.number("rope_theta", THETA), outside) {
        (Some(inside), Some(outside)) if inside != outside => {
            block.problem(format!(
                "rope_theta is {inside}, but {outside} outside of the block; keep one of the two"
            ));
            None
        }
        (None, _) if block.has("rope_theta") => None,
        (inside, outside) => Some(theta_or_default(inside.or(outside), notes)),
    }
}

/// The type, by either of its names.
fn kind<'a>(block: &mut Fields<'a>) -> Option<&'a str> {
    match (block.text("rope_type"), block.text("type")) {
        (Some(new), Some(old)) if new != old => {
            block.problem(format!("rope_type is {new:?}, but type is {old:?}; keep one of the two"));
            None
        }
        (None, None) if block.has("rope_type") || block.has("type") => None,
        (new, old) => Some(new.or(old).unwrap_or("default")),
    }
}

fn scaling(
    kind: &str,
    block: &mut Fields<'_>,
    outside: Outside,
    notes: &mut Vec<Note>,
) -> Option<RopeScaling> {
    let used: &[&str] = match kind {
        "default" => &[],
        "linear" | "dynamic" => &["factor"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
        "yarn" => &[
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ],
        other => {
            block.problem(format!(
                "rope_type {other:?} is not served; known are default, linear, dynamic, llama3 and yarn. Types whose \
                 frequencies change with the length of the request (longrope) cannot share cached keys"
            ));
            return None;
        }
    };
    check_unused(kind, used, block, notes);
    match kind {
        "default" => Some(RopeScaling::Default),
        "linear" => required(block, "factor").map(|factor| RopeScaling::Linear { factor }),
        "dynamic" => {
            required(block, "factor")?;
            notes.push(note(
                "dynamic scales nothing within max_position_embeddings, and no context is longer here",
            ));
            Some(RopeScaling::Default)
        }
        "llama3" => llama3(block, outside),
        _ => yarn(block, outside, notes),
    }
}

fn note(what: &str) -> Note {
    Note::Field { file: "config.json", field: "rope_type".into(), what: what.to_owned() }
}

/// Fields of another type: a factor without a type that takes one is a type that was forgotten.
fn check_unused(kind: &str, used: &[&str], block: &mut Fields<'_>, notes: &mut Vec<Note>) {
    let always = ["rope_type", "type", "rope_theta", "partial_rotary_factor", FINETUNED];
    let unused = block.names().filter(|name| FIELDS.contains(name));
    for name in unused.filter(|name| !used.contains(name) && !always.contains(name)) {
        if name == "factor" {
            block.problem(format!(
                "factor means nothing for rope_type {kind:?}; name the type that it scales"
            ));
        } else {
            notes.push(note(&format!("{name} means nothing for {kind}, so it is not read")));
        }
    }
}

/// A factor that the type needs.
fn required(block: &mut Fields<'_>, name: &str) -> Option<f64> {
    if !block.has(name) {
        block.problem(format!("{name} is missing"));
    }
    block.number(name, FACTOR)
}

/// Positions before scaling, which may be in the block, outside of it, or equal in both.
fn original(block: &mut Fields<'_>, outside: Outside) -> Option<f64> {
    const NAME: &str = "original_max_position_embeddings";
    let inside = block.size(NAME, MAX_SIZE);
    match (inside, outside.original) {
        (Some(inside), Some(outside)) if inside != outside => {
            block.problem(format!(
                "{NAME} is {inside}, but {outside} outside of the block; keep one of the two"
            ));
            None
        }
        (None, _) if block.has(NAME) => None,
        (inside, original) => Some(inside.or(original).unwrap_or(outside.positions) as f64),
    }
}

fn llama3(block: &mut Fields<'_>, outside: Outside) -> Option<RopeScaling> {
    let factor = required(block, "factor");
    let (low, high) = (required(block, "low_freq_factor"), required(block, "high_freq_factor"));
    let original = original(block, outside);
    let (factor, low, high, original) = (factor?, low?, high?, original?);
    if high <= low {
        block.problem(format!(
            "high_freq_factor is {high}, expected more than low_freq_factor, which is {low}"
        ));
        return None;
    }
    Some(RopeScaling::Llama3 { factor, low, high, original })
}

fn yarn(block: &mut Fields<'_>, outside: Outside, notes: &mut Vec<Note>) -> Option<RopeScaling> {
    let original = original(block, outside);
    let ratio = outside.positions as f64 / original?;
    // Null, and nothing else, asks for the ratio of the positions.
    let factor = match block.get("factor") {
        Some(Value::Null) => Some(ratio),
        _ => required(block, "factor"),
    };
    let factor = factor?;
    if factor != ratio && ratio != 1.0 {
        notes.push(note(&format!(
            "factor is {factor}, though max_position_embeddings is {ratio} times original_max_position_embeddings; factor counts, \
             as in transformers 5"
        )));
    }
    let beta_fast = block.nullable_number("beta_fast", FACTOR).unwrap_or(32.0);
    let beta_slow = block.nullable_number("beta_slow", FACTOR).unwrap_or(1.0);
    if beta_fast < beta_slow {
        block.problem(format!("beta_fast is {beta_fast}, expected at least beta_slow, which is {beta_slow}"));
    }
    let given = block.nullable_number("attention_factor", FACTOR);
    let scales = [block.nullable_number("mscale", MSCALE), block.nullable_number("mscale_all_dim", MSCALE)];
    let truncate = block.flag_or("truncate", true);
    let attention_factor = given.unwrap_or_else(|| attention_factor(factor, scales));
    Some(RopeScaling::Yarn { factor, original: original?, beta_fast, beta_slow, attention_factor, truncate })
}

/// YaRN's factor on cosine and sine, from the extension and the `mscale` fields.
fn attention_factor(factor: f64, scales: [Option<f64>; 2]) -> f64 {
    let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    match scales {
        [Some(scale), Some(all)] if scale != 0.0 && all != 0.0 => mscale(scale) / mscale(all),
        _ => mscale(1.0),
    }
}
