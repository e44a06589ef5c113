//! Requests, and how their JSON is read: unknown fields are refused, and errors name the field.

use std::collections::BTreeMap;
use std::fmt;

use beamline_catalog::{ItemId, SidPart, text};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, DeserializeOwned, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

use super::SidPartSchema;
use super::timestamp::Timestamp;
use super::written::{ItemIdSchema, Whole, read};
use crate::error::Error;

/// Asks for items. Exactly one of `history`, `token_ids` and `prompt` must be given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct RecommendRequest {
    /// The user of this request. It helps to find the user's cached context and has no other
    /// effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default, deserialize_with = "read::<Option<ItemId>, _>")]
    #[schema(value_type = Option<ItemIdSchema>)]
    pub user_id: Option<String>,
    /// The user's events, oldest first: item ids, or objects with more about each event. An empty
    /// list asks for a cold start. Items that the catalog does not have are skipped and listed in
    /// the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<HistoryEntrySchema>>)]
    pub history: Option<Vec<HistoryAction>>,
    /// The context as token ids of the model, used as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default, deserialize_with = "read::<Option<Vec<Whole<u32>>>, _>")]
    pub token_ids: Option<Vec<u32>>,
    /// The context as text, which the model's tokenizer turns into tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Only items whose semantic ID begins with these codes. The codes become part of the context;
    /// scores count what follows them.
    #[schema(value_type = Option<Vec<SidPartSchema>>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sid_prefix: Option<Vec<SidPart>>,
    /// Number of items wanted. Default 10.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default, deserialize_with = "read::<Option<Whole<u64>>, _>")]
    pub num_items: Option<u64>,
    /// Width of the beam, at least `num_items`. Default 50, or `num_items` if that is more.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default, deserialize_with = "read::<Option<Whole<u64>>, _>")]
    pub beam_width: Option<u64>,
    /// Instead of `beam_width`: how many hypotheses survive each generated level of the semantic
    /// ID, first level first. Levels of `sid_prefix` are not generated. The last width is at least
    /// `num_items`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default, deserialize_with = "read::<Option<Vec<Whole<u64>>>, _>")]
    pub beam_widths: Option<Vec<u64>>,
    /// The model: `name` for the version that its label `stable` points at, `name@label`, or
    /// `name@version` with the first 12 digits of the checkpoint's sha256. Default: the name that
    /// the server was started with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What probabilities are relative to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalization: Option<Normalization>,
    /// The items that may be returned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filters: Option<Filters>,
    /// Milliseconds after which the answer is useless, counted from the arrival of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default, deserialize_with = "read::<Option<Whole<u64>>, _>")]
    pub timeout_ms: Option<u64>,
    /// How urgent the request is. Default `interactive`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
    /// Whether the beam may be narrowed, down to `num_items`, to make the deadline. The answer says
    /// so in `degraded`. Widths of `beam_widths` above the narrowed width are lowered to it, and
    /// the others stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_degraded: Option<bool>,
    /// Whether history items that the catalog does not have are an error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict_history: Option<bool>,
    /// Whether tags and items of `filters` that the catalog does not have are an error. If not, the
    /// answer lists them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict_filters: Option<bool>,
    /// Cached contexts are shared within a tenant and never between tenants.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// The time for which the items are recommended, in seconds since 1970. Models that read times
    /// need it; others ignore it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default, deserialize_with = "read::<Option<Timestamp>, _>")]
    pub query_time: Option<i64>,
    /// Features of the user by name, for models that read them: numbers in the model's tables.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default, deserialize_with = "read::<Option<BTreeMap<String, Vec<Whole<u32>>>>, _>")]
    pub features: Option<BTreeMap<String, Vec<u32>>>,
}

/// Asks for predictions for candidates, given a history.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct RankRequest {
    /// The user of this request. It helps to find the user's cached context and has no other
    /// effect.
    #[serde(default, deserialize_with = "read::<Option<ItemId>, _>")]
    #[schema(value_type = Option<ItemIdSchema>)]
    pub user_id: Option<String>,
    /// The user's events, oldest first. Items that the catalog does not have are skipped and listed
    /// in the answer.
    #[serde(default)]
    #[schema(value_type = Vec<HistoryEntrySchema>)]
    pub history: Vec<HistoryAction>,
    /// The items to rank, at most 4096, each once. Items that the catalog does not have are listed
    /// in the answer.
    #[schema(value_type = Vec<CandidateEntrySchema>)]
    pub candidates: Vec<Candidate>,
    /// The time for which the predictions are made, in seconds since 1970. Models that read times
    /// need it; others ignore it.
    #[serde(default, deserialize_with = "read::<Option<Timestamp>, _>")]
    pub query_time: Option<i64>,
    /// Features of the user by name, for models that read them: numbers in the model's tables.
    #[serde(default, deserialize_with = "read::<Option<BTreeMap<String, Vec<Whole<u32>>>>, _>")]
    pub features: Option<BTreeMap<String, Vec<u32>>>,
    /// Weights by task: each candidate's score is the weighted sum of its predictions, and the best
    /// comes first. Tasks without a weight count 0. Without weights, a model of one task orders by
    /// that task; others keep the given order.
    pub task_weights: Option<BTreeMap<String, f64>>,
    /// The model: `name` for the version that its label `stable` points at, `name@label`, or
    /// `name@version` with the first 12 digits of the checkpoint's sha256. Default: the name that
    /// the server was started with.
    pub model: Option<String>,
    /// What the log-probabilities of a model of semantic IDs are relative to.
    pub normalization: Option<Normalization>,
    /// Milliseconds after which the answer is useless.
    #[serde(default, deserialize_with = "read::<Option<Whole<u64>>, _>")]
    pub timeout_ms: Option<u64>,
    /// How urgent the request is. Default `interactive`.
    pub priority: Option<Priority>,
    /// Whether history items that the catalog does not have are an error.
    pub strict_history: Option<bool>,
    /// Cached contexts are shared within a tenant and never between tenants.
    pub tenant: Option<String>,
}

/// An item to rank.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Candidate {
    /// Id of the item.
    #[serde(deserialize_with = "read::<ItemId, _>")]
    #[schema(value_type = ItemIdSchema)]
    pub item_id: String,
    /// Features of the item other than its id, for models that read them: numbers in the model's
    /// tables.
    #[serde(default, deserialize_with = "read::<Option<BTreeMap<String, Whole<u32>>>, _>")]
    pub features: Option<BTreeMap<String, u32>>,
}

/// Asks for a context to be computed and kept, before items are asked for. Exactly one of
/// `history`, `token_ids` and `prompt` must be given.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct WarmRequest {
    /// The user of this context.
    #[serde(default, deserialize_with = "read::<Option<ItemId>, _>")]
    #[schema(value_type = Option<ItemIdSchema>)]
    pub user_id: Option<String>,
    /// The user's events, oldest first.
    #[schema(value_type = Option<Vec<HistoryEntrySchema>>)]
    pub history: Option<Vec<HistoryAction>>,
    /// The context as token ids of the model.
    #[serde(default, deserialize_with = "read::<Option<Vec<Whole<u32>>>, _>")]
    pub token_ids: Option<Vec<u32>>,
    /// The context as text.
    pub prompt: Option<String>,
    /// The model: `name` for the version that its label `stable` points at, `name@label`, or
    /// `name@version` with the first 12 digits of the checkpoint's sha256. Default: the name that
    /// the server was started with.
    pub model: Option<String>,
    /// Milliseconds after which the work is dropped.
    #[serde(default, deserialize_with = "read::<Option<Whole<u64>>, _>")]
    pub timeout_ms: Option<u64>,
    /// How urgent the request is. Default `interactive`.
    pub priority: Option<Priority>,
    /// Whether history items that the catalog does not have are an error.
    pub strict_history: Option<bool>,
    /// Cached contexts are shared within a tenant and never between tenants.
    pub tenant: Option<String>,
    /// The time for which items will be requested, as in a request for items.
    #[serde(default, deserialize_with = "read::<Option<Timestamp>, _>")]
    pub query_time: Option<i64>,
    /// Features of the user, as in a request for items.
    #[serde(default, deserialize_with = "read::<Option<BTreeMap<String, Vec<Whole<u32>>>>, _>")]
    pub features: Option<BTreeMap<String, Vec<u32>>>,
}

/// One event of a user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct HistoryAction {
    /// Id of the item.
    #[serde(deserialize_with = "read::<ItemId, _>")]
    #[schema(value_type = ItemIdSchema)]
    pub item_id: String,
    /// What the user did with the item: the number of the action, for models that read actions.
    /// Others ignore it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default, deserialize_with = "read::<Option<ItemId>, _>")]
    #[schema(value_type = Option<ItemIdSchema>)]
    pub action: Option<String>,
    /// Time of the event, in seconds since 1970. Models that only read items ignore it and use the
    /// order of the list. Times that run backwards are an error in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default, deserialize_with = "read::<Option<Timestamp>, _>")]
    pub timestamp: Option<i64>,
    /// Features of the item other than its id, for models that read them: numbers in the model's
    /// tables.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default, deserialize_with = "read::<Option<BTreeMap<String, Whole<u32>>>, _>")]
    pub features: Option<BTreeMap<String, u32>>,
}

/// The items that may be returned. All conditions hold at once. They are applied inside the search,
/// so they never cost items.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Filters {
    /// Items that are never returned. Unknown ids have no effect and are listed in the answer.
    #[serde(default, deserialize_with = "read::<Vec<ItemId>, _>")]
    #[schema(value_type = Vec<ItemIdSchema>)]
    pub exclude_items: Vec<String>,
    /// Whether items of the history are never returned, including the part that was cut off.
    #[serde(default)]
    pub exclude_seen: bool,
    /// Return only items that have all of these tags. A tag that no item has leaves no items, and
    /// is listed in the answer.
    #[serde(default)]
    pub require_tags: Vec<String>,
    /// Never return items that have one of these tags. A tag that no item has has no effect, and is
    /// listed in the answer.
    #[serde(default)]
    pub forbid_tags: Vec<String>,
    /// Return only these items. Unknown ids have no effect and are listed in the answer; an empty
    /// list allows no items.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default, deserialize_with = "read::<Option<Vec<ItemId>>, _>")]
    #[schema(value_type = Option<Vec<ItemIdSchema>>)]
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

/// How urgent a request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// A client waits for the answer: it should come within the server's objective.
    #[default]
    Interactive,
    /// May wait: it uses what interactive requests leave, and has a share of the machine in any
    /// case.
    Batch,
    /// Served only when no other request wants to be: for trials that users do not see.
    Shadow,
}

/// By default, serde takes an array for an object whose fields have no names. No client means that.
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

objects_only!(RecommendRequest, RankRequest, WarmRequest, Filters);

/// Where the id is the only required field, the id alone is enough: `"a"` means `{"item_id": "a"}`.
macro_rules! objects_or_ids {
    ($($name:ident: $of:expr),*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct EntryVisitor;

                impl EntryVisitor {
                    fn id<'de, E: de::Error>(self, id: impl IntoDeserializer<'de, E>) -> Result<$name, E> {
                        ItemId::deserialize(id.into_deserializer()).map(|ItemId(id)| $of(id))
                    }
                }

                impl<'de> Visitor<'de> for EntryVisitor {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str("an item id, or an object such as {\"item_id\": \"a\"}")
                    }

                    fn visit_str<E: de::Error>(self, id: &str) -> Result<$name, E> {
                        self.id(id)
                    }

                    fn visit_u64<E: de::Error>(self, id: u64) -> Result<$name, E> {
                        self.id(id)
                    }

                    fn visit_i64<E: de::Error>(self, id: i64) -> Result<$name, E> {
                        self.id(id)
                    }

                    fn visit_f64<E: de::Error>(self, id: f64) -> Result<$name, E> {
                        self.id(id)
                    }

                    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<$name, A::Error> {
                        // The function that the derive made, not this trait's.
                        $name::deserialize(MapAccessDeserializer::new(map))
                    }
                }

                deserializer.deserialize_any(EntryVisitor)
            }
        }
    )*};
}

objects_or_ids!(HistoryAction: HistoryAction::of_item, Candidate: Candidate::of_item);

impl HistoryAction {
    /// An event with only an item.
    pub fn of_item(item_id: String) -> Self {
        Self { item_id, action: None, timestamp: None, features: None }
    }
}

impl Candidate {
    /// A candidate without features.
    pub fn of_item(item_id: String) -> Self {
        Self { item_id, features: None }
    }
}

/// An event: an item id, or an object with more about the event.
#[derive(ToSchema)]
#[serde(untagged)]
#[schema(as = HistoryEntry)]
pub enum HistoryEntrySchema {
    /// Id of the item.
    Id(ItemIdSchema),
    /// The item, with what was done with it and when.
    Action(HistoryAction),
}

/// A candidate: an item id, or an object with features.
#[derive(ToSchema)]
#[serde(untagged)]
#[schema(as = CandidateEntry)]
pub enum CandidateEntrySchema {
    /// Id of the item.
    Id(ItemIdSchema),
    /// The item with its features.
    Candidate(Candidate),
}

/// For the request log. Because of `remote`, the derive made functions; these are the traits.
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

/// Reads a body. A byte order mark before it is skipped.
///
/// # Errors
///
/// [`Error::InvalidJson`] when it is not JSON, [`Error::InvalidRequest`] when it is not this
/// request.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    let body = text::skip_mark(body).map_err(|error| Error::InvalidJson(error.to_string()))?;
    if body.trim_ascii().is_empty() {
        return Err(Error::InvalidJson("it is empty; send an object, {...}".into()));
    }
    let mut reader = serde_json::Deserializer::from_slice(body);
    let request = serde_path_to_error::deserialize(&mut reader).map_err(|error| explain(error, body))?;
    reader.end().map_err(|error| Error::InvalidJson(error.to_string()))?;
    Ok(request)
}

/// Like [`parse`], from JSON that was already read.
///
/// # Errors
///
/// [`Error::InvalidRequest`] when it is not this request.
pub fn parse_value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, Error> {
    serde_path_to_error::deserialize(value).map_err(|error| explain(error, &[]))
}

fn explain(error: serde_path_to_error::Error<serde_json::Error>, body: &[u8]) -> Error {
    let path = error.path().to_string();
    let inner = error.into_inner();
    if !inner.is_data() {
        let hint = if names_no_number(body, &inner) {
            "; NaN and Infinity are not JSON, leave them out"
        } else {
            ""
        };
        return Error::InvalidJson(format!("{inner}{hint}"));
    }
    let param = (path != ".").then_some(path);
    let inner = shorten(beamline_wording::plain(&inner.to_string()));
    let message = match &param {
        Some(param) => format!("`{param}`: {inner}"),
        None => inner,
    };
    Error::InvalidRequest { message, param }
}

/// Whether the JSON ends at a `NaN` or `Infinity`, as Python writes.
fn names_no_number(body: &[u8], error: &serde_json::Error) -> bool {
    let line = body.split(|byte| *byte == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    // The column is the last byte that was read: the first of a name, or the one after a sign.
    let rest = line.get(error.column().saturating_sub(1)..).unwrap_or_default();
    rest.starts_with(b"NaN") || rest.starts_with(b"Infinity")
}

/// Leaves out the list of all fields where the message suggests the field that was meant.
fn shorten(message: String) -> String {
    match message.split_once("?), expected ") {
        Some((start, _)) => format!("{start}?); GET /openapi.json lists all fields"),
        None => message,
    }
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
        assert_eq!(error(r#"{"history": [{"item_id": 7.5}]}"#), invalid("history[0].item_id"));
        assert_eq!(error(r#"{"history": ["a", true]}"#), invalid("history[1]"));
        assert_eq!(
            error(r#"{"history": [{"item_id": "a", "timestamp": "now"}]}"#),
            invalid("history[0].timestamp")
        );
        assert_eq!(error(r#"{"history": [{"item_id": "a"}, {}]}"#), invalid("history[1]"));
        assert_eq!(error(r#"{"filters": {"exclude": []}}"#), invalid("filters.exclude"));
        assert_eq!(error(r#"{"token_ids": [1, -2]}"#), invalid("token_ids[1]"));
        assert_eq!(error(r#"{"histroy": []}"#), invalid("histroy"));
    }

    fn message(body: &str) -> String {
        parse::<RecommendRequest>(body.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn ids_are_text_or_integers_at_every_place() {
        let request = |text: &str| parse::<RecommendRequest>(text.as_bytes()).unwrap();
        let numbers = request(
            r#"{"user_id": 9, "history": [3, {"item_id": 4, "action": 1}], "filters": {"exclude_items": [5], "allow_items": [6]}}"#,
        );
        let texts = request(
            r#"{"user_id": "9", "history": [{"item_id": "3"}, {"item_id": "4", "action": "1"}],
                "filters": {"exclude_items": ["5"], "allow_items": ["6"]}}"#,
        );
        assert_eq!(numbers, texts);
        assert_eq!(request(r#"{"history": ["a"]}"#), request(r#"{"history": [{"item_id": "a"}]}"#));
        let rank: RankRequest = parse(br#"{"candidates": [1, "b", {"item_id": 2}]}"#).unwrap();
        let ids: Vec<&str> = rank.candidates.iter().map(|candidate| candidate.item_id.as_str()).collect();
        assert_eq!(ids, ["1", "b", "2"]);
        assert!(message(r#"{"history": [3.0]}"#).contains("3.0 is a float"));
    }

    #[test]
    fn whole_numbers_may_have_a_point() {
        let request: RecommendRequest =
            parse(br#"{"num_items": 5.0, "query_time": 1702254317.0, "token_ids": [1, 2.0]}"#).unwrap();
        assert_eq!((request.num_items, request.query_time), (Some(5), Some(1_702_254_317)));
        assert_eq!(request.token_ids, Some(vec![1, 2]));
        assert!(message(r#"{"num_items": "5"}"#).contains("expected a whole number, 0 or more"));
    }

    #[test]
    fn errors_say_the_next_step() {
        let unknown = message(r#"{"histroy": []}"#);
        assert!(unknown.contains("did you mean `history`?"), "{unknown}");
        assert!(!unknown.contains("tenant"), "the list of fields is left out: {unknown}");
        assert!(message(r#"{"history": [["a"]]}"#).contains(r#"an object such as {"item_id": "a"}"#));
        assert!(message("").contains("it is empty"));
        for text in [r#"{"query_time": NaN}"#, "{\"query_time\":\n -Infinity}", r#"{"query_time": Infinity}"#]
        {
            assert!(message(text).contains("NaN and Infinity are not JSON"), "{}", message(text));
        }
    }

    #[test]
    fn a_byte_order_mark_means_nothing() {
        assert!(parse::<RecommendRequest>("\u{feff}{\"history\": []}\r\n".as_bytes()).is_ok());
        assert!(message("\u{feff}").contains("it is empty"));
        let utf16: Vec<u8> = "\u{feff}{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let error = parse::<RecommendRequest>(&utf16).unwrap_err().to_string();
        assert!(error.contains("save it as UTF-8"), "{error}");
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
