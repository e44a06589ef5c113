//! Panels in vector registers, one file per instruction set.

pub(super) mod avx2;
pub(super) mod avx512;
