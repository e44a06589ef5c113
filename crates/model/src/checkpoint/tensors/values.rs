//! Values of tensors: read once for the digest, and again for the model.
//!
//! The first pass hashes every byte of a file, and every tensor on its own. When a tensor is loaded, its
//! bytes are hashed again and compared. So the model computes with what the digest names, even if a file
//! changes meanwhile, and at most one tensor is in memory at a time.
//!
//! Nothing is memory mapped: a file that is truncated under a map ends the process.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;
use sha2::{Digest, Sha256};

use super::header::Shard;
use crate::error::ModelError;

/// Bytes that are read at a time.
const CHUNK: usize = 1 << 20;

/// What was seen of a tensor's values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    hash: [u8; 32],
    /// Whether there are values, all of which are zero.
    pub(super) zeros: bool,
    /// How many are NaN or infinite, and the index of the first.
    pub(super) not_finite: Option<(usize, usize)>,
    /// How many rows of a matrix hold nothing but zeros.
    pub(super) zero_rows: usize,
}

/// A tensor's place in a file, and what its bytes are.
pub(super) struct Part {
    pub(super) range: Range<u64>,
    pub(super) dtype: Dtype,
    /// Bytes of a row; 0 for what has no rows.
    pub(super) row: usize,
}

/// A buffer that holds values of any type at their alignment.
pub(super) struct Buffer(Vec<u64>);

impl Buffer {
    pub(super) fn new() -> Self {
        Self(vec![0; CHUNK / size_of::<u64>()])
    }

    fn bytes(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

impl Shard {
    /// Reads the whole file. Returns its sha256 and what was seen in each part of the data. The parts
    /// follow each other without gaps.
    pub(super) fn read(
        &self,
        parts: &[Part],
        buffer: &mut Buffer,
    ) -> Result<([u8; 32], Vec<Seen>), ModelError> {
        let mut whole = Sha256::new();
        whole.update(&self.head);
        let seen = parts.iter().map(|part| {
            let mut watch = Watch::new(part);
            self.each_chunk(part.range.clone(), buffer, |chunk| {
                whole.update(chunk);
                watch.update(chunk);
            })?;
            Ok(watch.finish())
        });
        let seen = seen.collect::<Result<Vec<_>, ModelError>>()?;
        let mut more = [0];
        match self.file.read_at(&mut more, self.size) {
            Ok(0) => Ok((whole.finalize().into(), seen)),
            Ok(_) => Err(self.changed("it is longer than when it was opened")),
            Err(source) => Err(self.unreadable(source)),
        }
    }

    /// Reads a tensor's values in single precision, and checks that they are those that were seen.
    pub(super) fn load(&self, name: &str, range: Range<u64>, dtype: Dtype, seen: &Seen) -> Loaded {
        let size =
            usize::try_from((range.end - range.start) / (dtype.bitsize() as u64 / 8)).unwrap_or(usize::MAX);
        let mut values: Vec<f32> = Vec::new();
        let room = values.try_reserve_exact(size);
        room.map_err(|_| ModelError::Limit(format!("no memory for the {size} values of tensor {name}")))?;
        let mut hasher = blake3::Hasher::new();
        self.each_chunk(range, &mut Buffer::new(), |chunk| {
            hasher.update(chunk);
            widen(dtype, chunk, &mut values);
        })?;
        self.same(name, hasher, seen).map(|()| values)
    }

    /// Reads a tensor's bytes as they are, and checks that they are those that were seen.
    pub(super) fn raw(&self, name: &str, range: Range<u64>, seen: &Seen) -> Result<Vec<u8>, ModelError> {
        let mut bytes = Vec::new();
        let mut hasher = blake3::Hasher::new();
        self.each_chunk(range, &mut Buffer::new(), |chunk| {
            hasher.update(chunk);
            bytes.extend_from_slice(chunk);
        })?;
        self.same(name, hasher, seen).map(|()| bytes)
    }

    fn same(&self, name: &str, hasher: blake3::Hasher, seen: &Seen) -> Result<(), ModelError> {
        match hasher.finalize().as_bytes() == &seen.hash {
            true => Ok(()),
            false => Err(self.changed(&format!("tensor {name} holds other values than when it was opened"))),
        }
    }

    /// Calls `take` with the bytes of a range of the data, a chunk at a time.
    fn each_chunk(
        &self,
        range: Range<u64>,
        buffer: &mut Buffer,
        mut take: impl FnMut(&[u8]),
    ) -> Result<(), ModelError> {
        let mut at = range.start;
        while at < range.end {
            let left = usize::try_from(range.end - at).unwrap_or(usize::MAX);
            let chunk = &mut buffer.bytes()[..left.min(CHUNK)];
            match self.file.read_exact_at(chunk, self.data() + at) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(self.changed("it is shorter than when it was opened"));
                }
                Err(source) => return Err(self.unreadable(source)),
            }
            take(chunk);
            at += chunk.len() as u64;
        }
        Ok(())
    }

    fn changed(&self, reason: &str) -> ModelError {
        ModelError::Changed { file: self.name.clone(), reason: reason.to_owned() }
    }

    fn unreadable(&self, source: io::Error) -> ModelError {
        ModelError::Read { path: self.name.clone().into(), source }
    }
}

type Loaded = Result<Vec<f32>, ModelError>;

/// Looks at the values of one tensor as they pass.
struct Watch {
    dtype: Dtype,
    hasher: blake3::Hasher,
    values: usize,
    zeros: bool,
    not_finite: Option<(usize, usize)>,
    rows: Rows,
}

impl Watch {
    fn new(part: &Part) -> Self {
        let rows = Rows { bytes: part.row, seen: 0, zeros: true, zero_rows: 0 };
        let hasher = blake3::Hasher::new();
        Self { dtype: part.dtype, hasher, values: 0, zeros: true, not_finite: None, rows }
    }

    fn update(&mut self, chunk: &[u8]) {
        self.hasher.update(chunk);
        self.zeros = self.zeros && is_zero(chunk);
        self.rows.update(chunk);
        let exponents = match self.dtype {
            Dtype::F32 => full_exponents(bytemuck::cast_slice::<u8, u32>(chunk), |&x| {
                u32::from_le(x) & 0x7f80_0000 == 0x7f80_0000
            }),
            Dtype::BF16 => full_exponents(bytemuck::cast_slice::<u8, u16>(chunk), |&x| {
                u16::from_le(x) & 0x7f80 == 0x7f80
            }),
            Dtype::F16 => full_exponents(bytemuck::cast_slice::<u8, u16>(chunk), |&x| {
                u16::from_le(x) & 0x7c00 == 0x7c00
            }),
            _ => None,
        };
        if let Some((count, first)) = exponents {
            let (before, at) = self.not_finite.unwrap_or((0, self.values + first));
            self.not_finite = Some((before + count, at));
        }
        self.values += chunk.len() * 8 / self.dtype.bitsize();
    }

    fn finish(self) -> Seen {
        Seen {
            hash: self.hasher.finalize().into(),
            zeros: self.zeros && self.values > 0,
            not_finite: self.not_finite,
            zero_rows: self.rows.zero_rows,
        }
    }
}

/// Counts rows that hold nothing but zeros. Chunks end where they like.
struct Rows {
    /// Bytes of a row; 0 for what has no rows.
    bytes: usize,
    /// Those of the row at hand that have passed, and whether they are zero.
    seen: usize,
    zeros: bool,
    zero_rows: usize,
}

impl Rows {
    fn update(&mut self, mut chunk: &[u8]) {
        while self.bytes > 0 && !chunk.is_empty() {
            let (part, rest) = chunk.split_at(chunk.len().min(self.bytes - self.seen));
            self.seen += part.len();
            self.zeros = self.zeros && is_zero(part);
            if self.seen == self.bytes {
                self.zero_rows += usize::from(self.zeros);
                (self.seen, self.zeros) = (0, true);
            }
            chunk = rest;
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

/// How many values are NaN or infinite, and the first of them.
fn full_exponents<T>(values: &[T], full: impl Fn(&T) -> bool) -> Option<(usize, usize)> {
    // Nearly always there are none: this pass has no branches.
    let count = values.iter().filter(|value| full(value)).count();
    match count {
        0 => None,
        count => Some((count, values.iter().position(full).unwrap_or_default())),
    }
}

/// Appends values in single precision. Their type was checked before.
fn widen(dtype: Dtype, chunk: &[u8], values: &mut Vec<f32>) {
    match dtype {
        Dtype::F32 => values
            .extend(bytemuck::cast_slice::<u8, u32>(chunk).iter().map(|&x| f32::from_bits(u32::from_le(x)))),
        Dtype::BF16 => {
            let wide = |&x: &u16| f32::from_bits(u32::from(u16::from_le(x)) << 16);
            values.extend(bytemuck::cast_slice::<u8, u16>(chunk).iter().map(wide));
        }
        Dtype::F16 => {
            let bits: &[u16] = bytemuck::cast_slice(chunk);
            let halves: Vec<half::f16> =
                bits.iter().map(|&x| half::f16::from_bits(u16::from_le(x))).collect();
            let begin = values.len();
            values.resize(begin + halves.len(), 0.0);
            halves.convert_to_f32_slice(&mut values[begin..]);
        }
        _ => {}
    }
}
