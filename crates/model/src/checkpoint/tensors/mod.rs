//! Weight files: opening them without trusting them, and handing out tensors.
//!
//! ```text
//! index    which shard holds which tensor
//! header   names, shapes, types and ranges of one file, checked
//! values   bytes, read once for the digest and again for the model
//! ```
//!
//! Names of shards come from the index alone.

mod header;
mod index;
mod values;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::Dtype;

use self::header::Shard;
use self::index::{INDEX, Index};
use self::values::{Buffer, Part, Seen};
use super::digest::FileDigests;
use super::note::Note;
use crate::error::ModelError;

const SINGLE: &str = "model.safetensors";

/// A note is due when one row in this number is all zeros. One or two padding rows are not worth it.
const ZERO_SHARE: usize = 16;
const LEAST_ZERO_ROWS: usize = 3;
/// Values of the shortest row that is looked at.
const LEAST_WIDTH: usize = 8;
/// Tensors that a note names.
const NAMED: usize = 5;

/// The tensors of a checkpoint, in files that are open.
#[derive(Debug)]
pub struct Tensors {
    files: Vec<String>,
    shards: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
    notes: Vec<Note>,
}

/// Where a tensor lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Sizes of its dimensions.
    pub shape: Vec<usize>,
    /// Type of its values, as the file names it.
    pub dtype: Dtype,
    shard: usize,
    range: Range<u64>,
    /// Once all bytes were read.
    seen: Option<Seen>,
}

impl Tensors {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names, and reads
    /// them from end to end.
    ///
    /// # Errors
    ///
    /// When a file is missing or anything in it contradicts itself.
    pub fn open(directory: &Path) -> Result<Self, ModelError> {
        let mut tensors = Self::headers(directory)?;
        tensors.read(&mut FileDigests::default())?;
        Ok(tensors)
    }

    /// Opens the same files, and reads their headers.
    pub(super) fn headers(directory: &Path) -> Result<Self, ModelError> {
        let (files, shards, entries, notes) = (Vec::new(), Vec::new(), BTreeMap::new(), Vec::new());
        let mut tensors = Self { files, shards, entries, notes };
        if !directory.join(INDEX).exists() {
            tensors.add_shard(directory, SINGLE)?;
            return Ok(tensors);
        }
        let damaged = |reason: String| ModelError::Tensors { file: INDEX.into(), reason };
        let index = Index::read(directory, &mut tensors.notes)?;
        let shards = index.shards().map_err(damaged)?;
        if directory.join(SINGLE).exists() && !shards.iter().any(|shard| *shard == SINGLE) {
            return Err(ModelError::Directory(format!(
                "there are two sets of weights, {SINGLE} and the shards of {INDEX}, and nothing says which one is meant: \
                 remove one of them"
            )));
        }
        for shard in shards {
            tensors.add_shard(directory, shard)?;
        }
        let problems = tensors.compare(&index);
        if problems.is_empty() { Ok(tensors) } else { Err(damaged(problems.join("; "))) }
    }

    /// What index and headers say differently.
    fn compare(&mut self, index: &Index) -> Vec<String> {
        let mut problems = Vec::new();
        for (name, shard) in &index.weight_map {
            match self.entries.get(name) {
                None => problems.push(format!("{name} is in no shard")),
                Some(entry) if &self.files[entry.shard] != shard => {
                    problems.push(format!("{name} is in {}, not in {shard}", self.files[entry.shard]));
                }
                Some(_) => {}
            }
        }
        for name in self.entries.keys().filter(|name| !index.weight_map.contains_key(*name)) {
            problems.push(format!("{name} is in a shard but not in the index"));
        }
        let held = self.bytes() as u64;
        if let Some(total) = index.total_size.filter(|&total| total != held) {
            self.notes.push(Note::Field {
                file: INDEX,
                field: "metadata.total_size".into(),
                what: format!("it says {total} bytes, the shards hold {held}; the shards count"),
            });
        }
        problems
    }

    fn add_shard(&mut self, directory: &Path, name: &str) -> Result<(), ModelError> {
        let (shard, metadata) = Shard::open(directory, name)?;
        for (tensor, info) in metadata.tensors() {
            let range = info.data_offsets.0 as u64..info.data_offsets.1 as u64;
            let (shape, dtype) = (info.shape.clone(), info.dtype);
            let entry = Entry { shape, dtype, shard: self.shards.len(), range, seen: None };
            if self.entries.insert(tensor.clone(), entry).is_some() {
                let reason = format!("tensor {tensor} is in two files");
                return Err(ModelError::Tensors { file: name.into(), reason });
            }
        }
        self.files.push(name.to_owned());
        self.shards.push(shard);
        Ok(())
    }

    /// Names and shapes without values: for a checkpoint whose weights are made up elsewhere.
    pub(super) fn shapes_only(shapes: BTreeMap<String, Vec<usize>>) -> Self {
        let entry = |shape| Entry { shape, dtype: Dtype::BF16, shard: 0, range: 0..0, seen: None };
        let entries = shapes.into_iter().map(|(name, shape)| (name, entry(shape))).collect();
        Self { files: Vec::new(), shards: Vec::new(), entries, notes: Vec::new() }
    }

    /// Reads every file from end to end, adds it to the digest, and remembers what each tensor held.
    pub(super) fn read(&mut self, digests: &mut FileDigests) -> Result<(), ModelError> {
        let mut buffer = Buffer::new();
        for (number, shard) in self.shards.iter().enumerate() {
            let mut entries: Vec<&mut Entry> =
                self.entries.values_mut().filter(|entry| entry.shard == number).collect();
            // An empty tensor begins where the next one does.
            entries.sort_by_key(|entry| (entry.range.start, entry.range.end));
            let parts: Vec<Part> = entries.iter().map(|entry| entry.part()).collect();
            let (hash, seen) = shard.read(&parts, &mut buffer)?;
            digests.add_hash(&shard.name, &hash);
            entries.iter_mut().zip(seen).for_each(|(entry, seen)| entry.seen = Some(seen));
        }
        Ok(())
    }

    /// Gives tensors other names, as far as `name` has one for them.
    pub(super) fn rename(&mut self, name: impl Fn(&str) -> Option<String>) {
        let entries = std::mem::take(&mut self.entries).into_iter();
        self.entries = entries.map(|(old, entry)| (name(&old).unwrap_or(old), entry)).collect();
    }

    /// Takes what was noticed on opening.
    pub(super) fn take_notes(&mut self) -> Vec<Note> {
        std::mem::take(&mut self.notes)
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
        let bytes = self.entries.values().map(|entry| entry.range.end - entry.range.start);
        usize::try_from(bytes.fold(0_u64, u64::saturating_add)).unwrap_or(usize::MAX)
    }

    /// Values of all tensors.
    pub fn parameters(&self) -> usize {
        self.entries.values().map(Entry::values).fold(0, usize::saturating_add)
    }

    /// Bytes of the largest tensor in single precision: what is held of it while it is packed.
    pub fn largest_bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.values().saturating_mul(4)).max().unwrap_or(0)
    }

    /// Compares all tensors with the expected names and shapes. `optional` names may be present and are
    /// ignored.
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
                Some(entry) if !is_weight(entry.dtype) => {
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
    /// When there is no such tensor, its type is not a float, a value is NaN or infinite, or its bytes
    /// differ from those that were hashed for the digest.
    pub fn load(&self, name: &str) -> Result<Tensor, ModelError> {
        let (entry, shard, seen) = self.values(name)?;
        if !is_weight(entry.dtype) {
            return Err(ModelError::Mismatch(vec![format!("{name} has type {:?}", entry.dtype)]));
        }
        if let Some((count, first)) = seen.not_finite {
            return Err(ModelError::NotFinite { name: name.to_owned(), count, first });
        }
        let values = shard.load(name, entry.range.clone(), entry.dtype, seen)?;
        Ok(Tensor::from_vec(values, entry.shape.as_slice(), &Device::Cpu)?)
    }

    /// The values of a tensor of 64-bit integers: a buffer, not a weight. `None` if there is no such tensor.
    ///
    /// # Errors
    ///
    /// When it is of another type, or cannot be read.
    pub fn integers(&self, name: &str) -> Result<Option<Vec<i64>>, ModelError> {
        if !self.entries.contains_key(name) {
            return Ok(None);
        }
        let (entry, shard, seen) = self.values(name)?;
        if entry.dtype != Dtype::I64 {
            let problem = format!("{name} has type {:?}, expected I64", entry.dtype);
            return Err(ModelError::Mismatch(vec![problem]));
        }
        let bytes = shard.raw(name, entry.range.clone(), seen)?;
        Ok(Some(bytes.as_chunks::<8>().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()))
    }

    /// Finds what is wrong with the values of the tensors in use: NaN, infinity, and zeros where
    /// `trained` says that a trained model has other values.
    pub(super) fn check_values(
        &self,
        used: &BTreeMap<String, Vec<usize>>,
        trained: impl Fn(&str) -> bool,
    ) -> Vec<ModelError> {
        let seen = |name: &String| self.entries.get(name).and_then(|entry| entry.seen.as_ref());
        let not_finite = used.keys().filter_map(|name| {
            let (count, first) = seen(name)?.not_finite?;
            Some(ModelError::NotFinite { name: name.clone(), count, first })
        });
        let zeros: Vec<String> = used
            .keys()
            .filter(|name| seen(name).is_some_and(|seen| seen.zeros) && trained(name))
            .cloned()
            .collect();
        not_finite.chain((!zeros.is_empty()).then_some(ModelError::Zeros(zeros))).collect()
    }

    /// Notes matrices of which a good part holds only zeros, though `trained` says that a trained model
    /// has other values there. A matrix of zeros alone is an error of [`Self::check_values`].
    pub(super) fn note_zero_rows(
        &self,
        used: &BTreeMap<String, Vec<usize>>,
        trained: impl Fn(&str) -> bool,
    ) -> Option<Note> {
        let described = used.keys().filter(|name| trained(name)).filter_map(|name| {
            let entry = self.entries.get(name)?;
            let (rows, seen) = (entry.rows(), entry.seen.as_ref()?);
            let many = seen.zero_rows >= LEAST_ZERO_ROWS && seen.zero_rows >= rows / ZERO_SHARE;
            (many && !seen.zeros).then(|| format!("{} of the {rows} rows of {name}", seen.zero_rows))
        });
        let described: Vec<String> = described.collect();
        let more = match described.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(", and of {more} more tensors"),
        };
        (!described.is_empty()).then(|| {
            Note::Tensors(format!(
                "nothing but zeros is in {}{more}: if the model was not trained so, a copy was interrupted; compare the files \
                 with their source",
                described[..described.len().min(NAMED)].join(", ")
            ))
        })
    }

    /// Whether two tensors have the same shape and values, each in its own type.
    pub(crate) fn are_equal(&self, one: &str, other: &str) -> Result<bool, ModelError> {
        let ((a, _, seen_a), (b, _, seen_b)) = (self.values(one)?, self.values(other)?);
        if a.shape != b.shape || a.dtype == b.dtype {
            return Ok(a.shape == b.shape && seen_a == seen_b);
        }
        let values =
            |name| -> Result<Vec<f32>, ModelError> { Ok(self.load(name)?.flatten_all()?.to_vec1()?) };
        Ok(values(one)? == values(other)?)
    }

    /// A tensor with its file and what was seen of it.
    fn values(&self, name: &str) -> Result<(&Entry, &Shard, &Seen), ModelError> {
        let missing = |what: &str| ModelError::Mismatch(vec![format!("{what} {name}")]);
        let entry = self.entries.get(name).ok_or_else(|| missing("missing"))?;
        match (self.shards.get(entry.shard), &entry.seen) {
            (Some(shard), Some(seen)) => Ok((entry, shard, seen)),
            _ => Err(missing("there are no values of")),
        }
    }
}

impl Entry {
    /// Rows of a matrix.
    fn rows(&self) -> usize {
        let width = self.shape.last().copied().unwrap_or(0);
        self.values().checked_div(width).unwrap_or(0)
    }

    /// Its place in its file. A tensor of one dimension, or of short rows, has no rows to look at: zeros
    /// are common there.
    fn part(&self) -> Part {
        let width = self.shape.last().copied().unwrap_or(0);
        let has_rows = self.shape.len() > 1 && width >= LEAST_WIDTH;
        let row = if has_rows { width.saturating_mul(self.dtype.bitsize()) / 8 } else { 0 };
        Part { range: self.range.clone(), dtype: self.dtype, row }
    }

    /// How many values it has.
    pub fn values(&self) -> usize {
        self.shape.iter().fold(1, |values: usize, size| values.saturating_mul(*size))
    }
}

/// Whether a weight may have this type.
fn is_weight(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16)
}
