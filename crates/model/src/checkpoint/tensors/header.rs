//! The header of a safetensors file: `u64 header length | JSON header | data`.
//!
//! Everything in it is checked before any tensor is touched: its length against the file, every shape
//! multiplied without overflow, every range inside the data and as long as shape and type say. There are
//! no gaps, no overlaps and no name twice.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::tensor::Metadata;
use serde_json::Value;

use super::super::{file, json};
use crate::error::ModelError;

/// Longest header accepted. The header of an 8-billion-parameter model takes about 50 kB.
const MAX_HEADER_BYTES: u64 = 8 << 20;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;

/// A weight file that was opened. It stays open while it is loaded, so that a new file under its name is
/// not read instead.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) name: String,
    pub(super) file: File,
    pub(super) size: u64,
    /// All before the data, as it was read.
    pub(super) head: Vec<u8>,
}

impl Shard {
    /// Opens a file and reads its header.
    pub(super) fn open(directory: &Path, name: &str) -> Result<(Self, Metadata), ModelError> {
        let path = directory.join(name);
        let read = |source| ModelError::Read { path: path.clone(), source };
        let damaged = |reason: String| ModelError::Tensors { file: name.into(), reason };
        let file = file::open(&path)?;
        let size = file.metadata().map_err(read)?.len();
        if size < 8 {
            return Err(damaged(format!("{size} bytes, too short for a header")));
        }
        let mut start = [0; 24];
        let known = start.len().min(usize::try_from(size).unwrap_or(usize::MAX));
        file.read_exact_at(&mut start[..known], 0).map_err(read)?;
        if let Some(reason) = file::lfs_pointer(&start) {
            return Err(damaged(reason.into()));
        }
        let header = start.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        if header > MAX_HEADER_BYTES {
            let reason = format!("header of {header} bytes, more than the limit of {MAX_HEADER_BYTES}");
            return Err(damaged(reason));
        }
        if header > size - 8 {
            let reason = format!("header of {header} bytes in a file of {size}: the file is truncated");
            return Err(damaged(reason));
        }
        let mut head = vec![0; 8 + header as usize];
        file.read_exact_at(&mut head, 0).map_err(read)?;
        // The length was looked at before; it is the one that is hashed.
        if head[..8] != start[..8] {
            return Err(ModelError::Changed {
                file: name.into(),
                reason: "its header has another length".into(),
            });
        }
        let metadata = parse(&head[8..], size - 8 - header).map_err(damaged)?;
        Ok((Self { name: name.to_owned(), file, size, head }, metadata))
    }

    /// Where the data begins.
    pub(super) fn data(&self) -> u64 {
        self.head.len() as u64
    }
}

fn parse(header: &[u8], held: u64) -> Result<Metadata, String> {
    let text = std::str::from_utf8(header).map_err(|error| format!("the header is not UTF-8: {error}"))?;
    let value = json::parse(text).map_err(|error| format!("header: {error}"))?;
    let described = described(&value);
    // Checks that ranges follow each other without gaps and fit shape and type, with checked products.
    let metadata: Metadata = serde_json::from_value(value).map_err(|error| {
        // A range beyond the end is told as what it most likely is.
        match described {
            Some(described) if described != held => other_length(Some(described), held),
            _ => format!("header: {error}"),
        }
    })?;
    if metadata.data_len() as u64 != held {
        return Err(other_length(described, held));
    }
    match metadata.tensors().iter().find(|(_, info)| info.shape.len() > MAX_RANK) {
        Some((name, info)) => Err(format!("tensor {name} has {} dimensions", info.shape.len())),
        None => Ok(metadata),
    }
}

/// Bytes of data that a header describes.
fn described(header: &Value) -> Option<u64> {
    let tensors = header.as_object().into_iter().flatten();
    tensors.filter_map(|(_, info)| info["data_offsets"][1].as_u64()).max()
}

/// Says how a file is longer or shorter than its header describes.
fn other_length(described: Option<u64>, held: u64) -> String {
    match described {
        Some(described) if described > held => {
            format!("the header describes {described} bytes of data, the file holds {held}: it is truncated")
        }
        Some(described) => {
            format!(
                "the header describes {described} bytes of data, the file holds {held}: more than it should"
            )
        }
        None => format!("the header describes no data, the file holds {held} bytes of it"),
    }
}
