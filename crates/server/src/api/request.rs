//! What is asked, and how its JSON is read: unknown fields are refused, and errors name the field.

use std::collections::BTreeMap;
use std::fmt;

use beamline_catalog::SidPart;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

use super::SidPartSchema;
use crate::error::Error;

/// Asks for items. Exactly one of `history`, `token_ids` and `prompt` must be given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct RecommendRequest {
    /// Whose request this is. It finds the user's cached context faster and has no other effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    /// What the user did, oldest first. An empty list asks for a cold start. Items that the catalog does not have are
    /// skipped and listed in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub history: Option<Vec<HistoryAction>>,
    /// The context as token ids of the model, used as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// The context as text, which the model's tokenizer turns into tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Only items whose semantic ID begins with these codes. The codes become part of the context; scores count
    /// what follows them.
    #[schema(value_type = Option<Vec<SidPartSchema>>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sid_prefix: Option<Vec<SidPart>>,
    /// Items wanted. Default 10.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_items: Option<u64>,
    /// Width of the beam, at least `num_items`. Default 50, or `num_items` if that is more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beam_width: Option<u64>,
    /// The model: `name` for the version that its label `stable` points at, `name@label`, or `name@version` with the
    /// first 12 digits of the checkpoint's sha256. Default: the name that the server was started with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What probabilities are relative to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalization: Option<Normalization>,
    /// Which items may be returned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filters: Option<Filters>,
    /// Milliseconds after which the answer is of no more use, counted from when the request has arrived.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Whether the beam may be narrowed, down to `num_items`, to make the deadline. The answer says so in `degraded`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_degraded: Option<bool>,
    /// Whether history items that the catalog does not have are an error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict_history: Option<bool>,
    /// Cached contexts are shared within a tenant and never between tenants.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// When the items are for, in the unit of the timestamps. Models that read times need it; others ignore it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query_time: Option<i64>,
    /// Features of the user by name, for models that read them: numbers in the model's tables.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub features: Option<BTreeMap<String, Vec<u32>>>,
}

/// Asks for predictions for candidates, after a history.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct RankRequest {
    /// Whose request this is. It finds the user's cached context faster and has no other effect.
    pub user_id: Option<String>,
    /// What the user did, oldest first. Items that the catalog does not have are skipped and listed in the answer.
    #[serde(default)]
    pub history: Vec<HistoryAction>,
    /// The items, at most 4096, each once. Those that the catalog does not have are listed in the answer.
    pub candidates: Vec<Candidate>,
    /// When the predictions are for, in the unit of the timestamps. Models that read times need it; others ignore it.
    pub query_time: Option<i64>,
    /// Features of the user by name, for models that read them: numbers in the model's tables.
    pub features: Option<BTreeMap<String, Vec<u32>>>,
    /// Weights by task: each candidate's score is the weighted sum of its predictions, and the best comes first. Tasks that
    /// are not named weigh nothing. Without weights a model of one task is ordered by it, others keep the order given.
    pub task_weights: Option<BTreeMap<String, f64>>,
    /// The model: `name` for the version that its label `stable` points at, `name@label`, or `name@version` with the
    /// first 12 digits of the checkpoint's sha256. Default: the name that the server was started with.
    pub model: Option<String>,
    /// What the log-probabilities of a model of semantic IDs are relative to.
    pub normalization: Option<Normalization>,
    /// Milliseconds after which the answer is of no more use.
    pub timeout_ms: Option<u64>,
    /// Whether history items that the catalog does not have are an error.
    pub strict_history: Option<bool>,
    /// Cached contexts are shared within a tenant and never between tenants.
    pub tenant: Option<String>,
}

/// An item to be ranked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Candidate {
    /// The item.
    pub item_id: String,
    /// Its features beside the item, for models that read them: numbers in the model's tables.
    #[serde(default)]
    pub features: Option<BTreeMap<String, u32>>,
}

/// Asks for a context to be computed and kept, before items are asked for. Exactly one of `history`, `token_ids` and
/// `prompt` must be given.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct WarmRequest {
    /// Whose context this is.
    pub user_id: Option<String>,
    /// What the user did, oldest first.
    pub history: Option<Vec<HistoryAction>>,
    /// The context as token ids of the model.
    pub token_ids: Option<Vec<u32>>,
    /// The context as text.
    pub prompt: Option<String>,
    /// The model: `name` for the version that its label `stable` points at, `name@label`, or `name@version` with the
    /// first 12 digits of the checkpoint's sha256. Default: the name that the server was started with.
    pub model: Option<String>,
    /// Milliseconds after which the work is dropped.
    pub timeout_ms: Option<u64>,
    /// Whether history items that the catalog does not have are an error.
    pub strict_history: Option<bool>,
    /// Cached contexts are shared within a tenant and never between tenants.
    pub tenant: Option<String>,
    /// As in a request for items.
    pub query_time: Option<i64>,
    /// As in a request for items.
    pub features: Option<BTreeMap<String, Vec<u32>>>,
}

/// One event of a user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct HistoryAction {
    /// The item.
    pub item_id: String,
    /// What was done with it; for models that read actions, the number of the action. Others ignore it.
    #[serde(default)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// When, in seconds since 1970. Models that read items only ignore it; the order of the list counts.
    #[serde(default)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<i64>,
    /// Features of the item beside the item itself, for models that read them: numbers in the model's tables.
    #[serde(default)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub features: Option<BTreeMap<String, u32>>,
}

/// Which items may be returned. All conditions hold at once. They are applied inside the search, so they never cost
/// items.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Filters {
    /// Never these items. Unknown ids have no effect.
    #[serde(default)]
    pub exclude_items: Vec<String>,
    /// Never an item of the history, the part of it that was cut off included.
    #[serde(default)]
    pub exclude_seen: bool,
    /// Only items that have all of these tags.
    #[serde(default)]
    pub require_tags: Vec<String>,
    /// Never items that have one of these tags.
    #[serde(default)]
    pub forbid_tags: Vec<String>,
    /// Only these items. Unknown ids have no effect; an empty list allows nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_items: Option<Vec<String>>,
}

/// What the probabilities that make up a score are relative to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// Softmax over the whole vocabulary: what Hugging Face and vLLM compute.
    #[default]
    FullVocab,
    /// Softmax over the continuations that are allowed.
    AllowedSet,
}

/// Left to itself, serde takes an array for an object whose fields have no names. Nobody means that.
macro_rules! objects_only {
    ($($name:ident),*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct ObjectVisitor;

                impl<'de> Visitor<'de> for ObjectVisitor {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str("an object")
                    }

                    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<$name, A::Error> {
                        // The function that the derive made, not this trait's.
                        $name::deserialize(MapAccessDeserializer::new(map))
                    }
                }

                deserializer.deserialize_map(ObjectVisitor)
            }
        }
    )*};
}

objects_only!(RecommendRequest, RankRequest, Candidate, WarmRequest, HistoryAction, Filters);

/// For the request log. The derive made functions, because of `remote`; these are the traits.
macro_rules! written_as_read {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                $name::serialize(self, serializer)
            }
        }
    )*};
}

written_as_read!(RecommendRequest, HistoryAction, Filters);

/// Reads a body.
///
/// # Errors
///
/// [`Error::InvalidJson`] when it is not JSON, [`Error::InvalidRequest`] when it is not this request.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let request = serde_path_to_error::deserialize(&mut reader).map_err(explain)?;
    reader.end().map_err(|error| Error::InvalidJson(error.to_string()))?;
    Ok(request)
}

/// As [`parse`], from JSON that was read already.
///
/// # Errors
///
/// [`Error::InvalidRequest`] when it is not this request.
pub fn parse_value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, Error> {
    serde_path_to_error::deserialize(value).map_err(explain)
}

fn explain(error: serde_path_to_error::Error<serde_json::Error>) -> Error {
    let path = error.path().to_string();
    let inner = error.into_inner();
    if !inner.is_data() {
        return Error::InvalidJson(inner.to_string());
    }
    let param = (path != ".").then_some(path);
    let message = match &param {
        Some(param) => format!("`{param}`: {inner}"),
        None => inner.to_string(),
    };
    Error::InvalidRequest { message, param }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(body: &str) -> (String, Option<String>) {
        let error = parse::<RecommendRequest>(body.as_bytes()).unwrap_err();
        (error.class().kind.to_owned(), error.param().map(str::to_owned))
    }

    #[test]
    fn errors_name_the_field() {
        let invalid = |param: &str| ("invalid_request".to_owned(), Some(param.to_owned()));
        assert_eq!(error(r#"{"num_items": "ten"}"#), invalid("num_items"));
        assert_eq!(error(r#"{"num_items": -1}"#), invalid("num_items"));
        assert_eq!(error(r#"{"num_items": 1e30}"#), invalid("num_items"));
        assert_eq!(error(r#"{"history": [{"item_id": 7}]}"#), invalid("history[0].item_id"));
        assert_eq!(error(r#"{"history": [{"item_id": "a"}, {}]}"#), invalid("history[1]"));
        assert_eq!(error(r#"{"filters": {"exclude": []}}"#), invalid("filters.exclude"));
        assert_eq!(error(r#"{"token_ids": [1, -2]}"#), invalid("token_ids[1]"));
        assert_eq!(error(r#"{"histroy": []}"#), invalid("histroy"));
    }

    #[test]
    fn arrays_are_no_objects() {
        for body in [r#"["u"]"#, "[]", r#"{"history": [["a"]]}"#, r#"{"filters": []}"#] {
            assert_eq!(error(body).0, "invalid_request", "{body}");
        }
    }

    #[test]
    fn broken_json_is_told_apart() {
        for body in ["", "{", "{]", "nonsense", "{} {}", "{\"prompt\": \"\u{1}\"}"] {
            assert_eq!(error(body).0, "invalid_json", "{body}");
        }
        assert_eq!(error("[]").0, "invalid_request");
        assert_eq!(error("7").0, "invalid_request");
    }
}
