//! Weight files: opening them without trusting them, and handing out tensors.
//!
//! A safetensors file is `u64 header length | JSON header | data`. Everything in the header is checked before any
//! tensor is touched: its length against the file, every shape multiplied without overflow, every range inside the
//! data and as long as shape and type say, no gaps or overlaps. Names of shards come from the index alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::Deserialize;

use super::read_json;
use crate::error::ModelError;

/// Longest header accepted. The header of an 8-billion-parameter model takes about 50 kB.
const MAX_HEADER_BYTES: u64 = 8 << 20;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;
/// Most shards in an index.
const MAX_SHARDS: usize = 4096;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of a checkpoint, memory mapped.
#[derive(Debug)]
pub struct Tensors {
    files: Vec<String>,
    maps: Vec<Mmap>,
    entries: BTreeMap<String, Entry>,
}

/// Where a tensor lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Sizes of its dimensions.
    pub shape: Vec<usize>,
    /// Type of its values, as the file names it.
    pub dtype: Dtype,
    file: usize,
    start: usize,
    end: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Tensors {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    ///
    /// When a file is missing or anything in it contradicts itself.
    pub fn open(directory: &Path) -> Result<Self, ModelError> {
        let mut tensors = Self { files: Vec::new(), maps: Vec::new(), entries: BTreeMap::new() };
        if !directory.join(INDEX).exists() {
            tensors.add_file(directory, SINGLE)?;
            return Ok(tensors);
        }
        let damaged = |reason: String| ModelError::Tensors { file: INDEX.into(), reason };
        let index: Index =
            serde_json::from_str(&read_json(&directory.join(INDEX))?).map_err(|e| damaged(e.to_string()))?;
        let mut shards: Vec<&String> = index.weight_map.values().collect();
        shards.sort();
        shards.dedup();
        if shards.is_empty() || shards.len() > MAX_SHARDS {
            return Err(damaged(format!("names {} shards, expected 1 to {MAX_SHARDS}", shards.len())));
        }
        for shard in shards {
            // A shard is a file beside the index, never a path to somewhere else.
            if shard.contains(['/', '\\', '\0']) || shard.starts_with('.') || !shard.ends_with(".safetensors")
            {
                return Err(damaged(format!("{shard:?} is not the name of a safetensors file")));
            }
            tensors.add_file(directory, shard)?;
        }
        let mut problems = Vec::new();
        for (name, shard) in &index.weight_map {
            match tensors.entries.get(name) {
                None => problems.push(format!("{name} is in no shard")),
                Some(entry) if &tensors.files[entry.file] != shard => {
                    problems.push(format!("{name} is in {}, not in {shard}", tensors.files[entry.file]));
                }
                Some(_) => {}
            }
        }
        for name in tensors.entries.keys().filter(|name| !index.weight_map.contains_key(*name)) {
            problems.push(format!("{name} is in a shard but not in the index"));
        }
        if problems.is_empty() { Ok(tensors) } else { Err(damaged(problems.join("; "))) }
    }

    fn add_file(&mut self, directory: &Path, name: &str) -> Result<(), ModelError> {
        let path = directory.join(name);
        let read = |source| ModelError::Read { path: path.clone(), source };
        let damaged = |reason: String| ModelError::Tensors { file: name.into(), reason };
        let file = File::open(&path).map_err(read)?;
        let size = file.metadata().map_err(read)?.len();
        if size < 8 {
            return Err(damaged(format!("{size} bytes, too short for a header")));
        }
        // SAFETY: the map is read only. A file that is rewritten in place under a running server would change or
        // fault it; the manual says to replace checkpoints by renaming.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let header = map.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        if header > MAX_HEADER_BYTES {
            return Err(damaged(format!(
                "header of {header} bytes, more than the limit of {MAX_HEADER_BYTES}"
            )));
        }
        if header > size - 8 {
            return Err(damaged(format!(
                "header of {header} bytes in a file of {size}: the file is truncated"
            )));
        }
        // Checks the JSON, that ranges follow each other without gaps and fit shape and type with checked
        // products, and that the file ends where the last tensor does.
        let (_, metadata) = SafeTensors::read_metadata(&map).map_err(|error| {
            damaged(match error {
                SafeTensorError::MetadataIncompleteBuffer => other_length(&map, header, size),
                error => error.to_string(),
            })
        })?;
        let data = 8 + usize::try_from(header).map_err(|error| damaged(error.to_string()))?;
        let number = self.files.len();
        for (tensor, info) in metadata.tensors() {
            if info.shape.len() > MAX_RANK {
                return Err(damaged(format!("tensor {tensor} has {} dimensions", info.shape.len())));
            }
            let (start, end) = info.data_offsets;
            let (start, end) = (data.checked_add(start), data.checked_add(end));
            let (Some(start), Some(end)) = (start, end) else {
                return Err(damaged(format!("tensor {tensor} lies outside of the file")));
            };
            if start > end || end > map.len() {
                return Err(damaged(format!("tensor {tensor} lies outside of the file")));
            }
            let entry = Entry { shape: info.shape.clone(), dtype: info.dtype, file: number, start, end };
            if self.entries.insert(tensor.clone(), entry).is_some() {
                return Err(damaged(format!("tensor {tensor} is in two files")));
            }
        }
        self.files.push(name.to_owned());
        self.maps.push(map);
        Ok(())
    }

    /// Names and shapes without values: for a checkpoint whose weights are made up elsewhere.
    pub(super) fn shapes_only(shapes: BTreeMap<String, Vec<usize>>) -> Self {
        let entry = |shape| Entry { shape, dtype: Dtype::BF16, file: 0, start: 0, end: 0 };
        let entries = shapes.into_iter().map(|(name, shape)| (name, entry(shape))).collect();
        Self { files: Vec::new(), maps: Vec::new(), entries }
    }

    /// Names of the weight files.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// All tensors by name.
    pub fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.end - entry.start).sum()
    }

    /// Values of all tensors.
    pub fn parameters(&self) -> usize {
        self.entries.values().map(|entry| entry.shape.iter().product::<usize>()).sum()
    }

    /// Compares all tensors with the expected names and shapes. `optional` names may be present and are ignored.
    ///
    /// # Errors
    ///
    /// [`ModelError::Mismatch`] with every missing tensor, unknown tensor, wrong shape and wrong type.
    pub fn check(
        &self,
        expected: &BTreeMap<String, Vec<usize>>,
        optional: &[&str],
    ) -> Result<(), ModelError> {
        let mut problems = Vec::new();
        for (name, shape) in expected {
            match self.entries.get(name) {
                None => problems.push(format!("missing {name} {shape:?}")),
                Some(entry) if &entry.shape != shape => {
                    problems.push(format!("{name} has shape {:?}, expected {shape:?}", entry.shape));
                }
                Some(entry) if dtype(entry.dtype).is_none() => {
                    problems.push(format!("{name} has type {:?}, expected F32, BF16 or F16", entry.dtype));
                }
                Some(_) => {}
            }
        }
        for name in self.entries.keys() {
            if !expected.contains_key(name) && !optional.contains(&name.as_str()) {
                problems.push(format!("unknown {name}"));
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(ModelError::Mismatch(problems)) }
    }

    /// A tensor widened to single precision on the host.
    ///
    /// # Errors
    ///
    /// When there is no such tensor, its type is not a float, or a value is NaN or infinite.
    pub fn load(&self, name: &str) -> Result<Tensor, ModelError> {
        let entry =
            self.entries.get(name).ok_or_else(|| ModelError::Mismatch(vec![format!("missing {name}")]))?;
        let dtype = dtype(entry.dtype)
            .ok_or_else(|| ModelError::Mismatch(vec![format!("{name} has type {:?}", entry.dtype)]))?;
        let map = self.maps.get(entry.file);
        let map = map.ok_or_else(|| ModelError::Mismatch(vec![format!("{name} has no values")]))?;
        let bytes = &map[entry.start..entry.end];
        let tensor =
            Tensor::from_raw_buffer(bytes, dtype, &entry.shape, &Device::Cpu)?.to_dtype(DType::F32)?;
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(tensor),
            Some(first) => Err(ModelError::NotFinite {
                name: name.to_owned(),
                count: values.iter().filter(|value| !value.is_finite()).count(),
                first,
            }),
        }
    }
}

impl Tensors {
    /// The values of a tensor of 64-bit integers: a buffer, not a weight. `None` if there is no such tensor.
    ///
    /// # Errors
    ///
    /// When it is of another type.
    pub fn integers(&self, name: &str) -> Result<Option<Vec<i64>>, ModelError> {
        let Some(entry) = self.entries.get(name) else { return Ok(None) };
        if entry.dtype != Dtype::I64 {
            return Err(ModelError::Mismatch(vec![format!(
                "{name} has type {:?}, expected I64",
                entry.dtype
            )]));
        }
        let bytes = self.maps[entry.file][entry.start..entry.end].as_chunks::<8>().0;
        Ok(Some(bytes.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()))
    }
}

/// Says how a file is longer or shorter than its header describes.
fn other_length(file: &[u8], header: u64, size: u64) -> String {
    let end = usize::try_from(header).ok().and_then(|header| file.get(8..8_usize.checked_add(header)?));
    let tensors =
        end.and_then(|json| serde_json::from_slice::<BTreeMap<String, serde_json::Value>>(json).ok());
    let ends = tensors.iter().flatten().filter_map(|(_, info)| info["data_offsets"][1].as_u64());
    match (ends.max(), size.saturating_sub(8).saturating_sub(header)) {
        (Some(described), held) if described > held => {
            format!("the header describes {described} bytes of data, the file holds {held}: it is truncated")
        }
        (Some(described), held) => {
            format!(
                "the header describes {described} bytes of data, the file holds {held}: more than it should"
            )
        }
        (None, held) => format!("the header describes no data, the file holds {held} bytes of it"),
    }
}

/// The types a weight may have.
fn dtype(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F16 => Some(DType::F16),
        _ => None,
    }
}
