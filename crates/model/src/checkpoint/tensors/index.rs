//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::BTreeMap;
use std::path::Path;

use beamline_wording::did_you_mean;
use serde_json::Value;

use super::super::note::Note;
use super::super::{file, json};
use crate::error::ModelError;

pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Most shards in an index.
const MAX_SHARDS: usize = 4096;
/// All fields it may have.
const FIELDS: [&str; 2] = ["metadata", "weight_map"];

/// The index as written.
#[derive(Debug)]
pub(super) struct Index {
    /// Shard of each tensor.
    pub(super) weight_map: BTreeMap<String, String>,
    /// Bytes of all tensors, as the index says.
    pub(super) total_size: Option<u64>,
}

impl Index {
    pub(super) fn read(directory: &Path, notes: &mut Vec<Note>) -> Result<Self, ModelError> {
        let damaged = |reason: String| ModelError::Tensors { file: INDEX.into(), reason };
        let value =
            json::parse(&file::read_text(&directory.join(INDEX), file::MAX_INDEX_BYTES)?).map_err(damaged)?;
        let Value::Object(mut object) = value else { return Err(damaged("is not a JSON object".into())) };
        let map = object.remove("weight_map").ok_or_else(|| {
            let near = object.keys().map(|key| did_you_mean(key, FIELDS)).find(|hint| !hint.is_empty());
            damaged(format!("`weight_map` is missing{}", near.unwrap_or_default()))
        })?;
        let Value::Object(map) = map else { return Err(damaged("`weight_map` is not an object".into())) };
        let shard = |(name, shard): (String, Value)| match shard {
            Value::String(shard) => Ok((name, shard)),
            other => Err(damaged(format!("weight_map: {name} is {other}, expected the name of a file"))),
        };
        let weight_map = map.into_iter().map(shard).collect::<Result<BTreeMap<_, _>, _>>()?;
        let total_size = object.get("metadata").and_then(|metadata| metadata["total_size"].as_u64());
        let unknown = object.keys().filter(|key| !FIELDS.contains(&key.as_str()));
        notes.extend(unknown.map(|field| Note::UnknownField { file: INDEX, field: field.clone() }));
        Ok(Self { weight_map, total_size })
    }

    /// Names of all shards, each a file beside the index and never a path to somewhere else.
    pub(super) fn shards(&self) -> Result<Vec<&String>, String> {
        let mut shards: Vec<&String> = self.weight_map.values().collect();
        shards.sort();
        shards.dedup();
        if shards.is_empty() || shards.len() > MAX_SHARDS {
            return Err(format!("names {} shards, expected 1 to {MAX_SHARDS}", shards.len()));
        }
        let elsewhere = |shard: &&&String| {
            shard.contains(['/', '\\', '\0']) || shard.starts_with('.') || !shard.ends_with(".safetensors")
        };
        match shards.iter().find(elsewhere) {
            Some(shard) => Err(format!("{shard:?} is not the name of a safetensors file")),
            None => Ok(shards),
        }
    }
}
