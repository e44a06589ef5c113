//! Copies between the device and any memory of the host, in the order of the computing. They go through
//! pieces of page-locked memory, used in turn, so that the host need not wait for the arrival of what it
//! handed over.

use std::sync::Arc;

use cudarc::driver::{CudaContext, PinnedHostSlice, result};

use super::queue::GpuQueue;

/// Bytes of a piece; what is larger is copied piece by piece.
const PIECE: usize = 4 << 20;
/// Pieces: how many copies may be on their way.
const PIECES: usize = 4;

/// Page-locked memory that copies go through.
#[derive(Debug)]
pub(super) struct Staging {
    pieces: Vec<Piece>,
    next: usize,
}

#[derive(Debug)]
struct Piece {
    memory: PinnedHostSlice<u8>,
    /// The end of the last copy that used it.
    copied: u64,
}

impl Staging {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self, result::DriverError> {
        let piece = |_| -> Result<Piece, result::DriverError> {
            // SAFETY: a piece is written before it is read.
            let memory = unsafe { context.alloc_pinned_with_flags(PIECE, 0) }?;
            Ok(Piece { memory, copied: 0 })
        };
        Ok(Self { pieces: (0..PIECES).map(piece).collect::<Result<_, _>>()?, next: 0 })
    }

    /// The piece that was used longest ago, once the host may touch it.
    fn next(&mut self, queue: &GpuQueue) -> Result<&mut Piece, result::DriverError> {
        let next = self.next;
        self.next = (next + 1) % PIECES;
        let piece = &mut self.pieces[next];
        queue.wait_for(piece.copied)?;
        Ok(piece)
    }

    /// Copies to the device. Returns when the bytes may change again.
    pub(super) fn upload(
        &mut self,
        queue: &GpuQueue,
        bytes: &[u8],
        to: u64,
    ) -> Result<(), result::DriverError> {
        for (bytes, at) in bytes.chunks(PIECE).zip((to..).step_by(PIECE)) {
            let piece = self.next(queue)?;
            let memory = &mut piece.memory.as_mut_slice()?[..bytes.len()];
            memory.copy_from_slice(bytes);
            // SAFETY: the caller's memory is that large; the piece is not written before the copy is over.
            unsafe { result::memcpy_htod_async(at, memory, queue.stream().cu_stream()) }?;
            piece.copied = queue.mark()?;
        }
        Ok(())
    }

    /// Copies from the device, and waits for it.
    pub(super) fn download(
        &mut self,
        queue: &GpuQueue,
        from: u64,
        bytes: &mut [u8],
    ) -> Result<(), result::DriverError> {
        for (bytes, at) in bytes.chunks_mut(PIECE).zip((from..).step_by(PIECE)) {
            let piece = self.next(queue)?;
            let memory = &mut piece.memory.as_mut_slice()?[..bytes.len()];
            // SAFETY: the caller's memory is that large; the piece is read after the copy is over.
            unsafe { result::memcpy_dtoh_async(memory, at, queue.stream().cu_stream()) }?;
            piece.copied = queue.mark()?;
            queue.wait_for(piece.copied)?;
            bytes.copy_from_slice(memory);
        }
        Ok(())
    }
}
