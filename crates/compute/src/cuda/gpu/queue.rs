//! A queue of work on a GPU: a stream, and points in it that can be waited for.
//!
//! Place in the flow: [`Gpu`](super::Gpu) has one for computing and one for transfers.
//!
//! Invariant: marks are numbered in the order of the stream, so the finished ones are a prefix of them.
//! An event is used again only when it is over.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result};

use super::lock;

/// A stream and its marks.
#[derive(Debug)]
pub(super) struct GpuQueue {
    stream: Arc<CudaStream>,
    marks: Mutex<Marks>,
}

#[derive(Debug, Default)]
struct Marks {
    /// The last one.
    number: u64,
    /// Recorded and not known to be over, in order.
    recorded: VecDeque<(u64, CudaEvent)>,
    /// Events to be used again.
    free: Vec<CudaEvent>,
}

impl Marks {
    /// Drops the marks that are over.
    fn settle(&mut self) -> Result<(), result::DriverError> {
        while let Some((_, event)) = self.recorded.front()
            && event.try_is_complete()?
        {
            self.free.extend(self.recorded.pop_front().map(|(_, event)| event));
        }
        Ok(())
    }

    /// The event of a mark, or nothing if it is over.
    fn event(&self, number: u64) -> Option<&CudaEvent> {
        let first = self.recorded.front()?.0;
        let (_, event) = self.recorded.get(usize::try_from(number.checked_sub(first)?).ok()?)?;
        Some(event)
    }
}

impl GpuQueue {
    /// An empty queue.
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self, result::DriverError> {
        Ok(Self { stream: context.new_stream()?, marks: Mutex::default() })
    }

    /// Stream of the queue.
    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The end of what was asked for until now.
    pub(super) fn mark(&self) -> Result<u64, result::DriverError> {
        let mut marks = lock(&self.marks);
        marks.settle()?;
        let event = match marks.free.pop() {
            Some(event) => event,
            None => self.stream.context().new_event(None)?,
        };
        event.record(&self.stream)?;
        marks.number += 1;
        let number = marks.number;
        marks.recorded.push_back((number, event));
        Ok(number)
    }

    /// What is asked of `later` from now on is done after a mark of this queue.
    pub(super) fn order(&self, number: u64, later: &Self) -> Result<(), result::DriverError> {
        lock(&self.marks).event(number).map_or(Ok(()), |event| later.stream.wait(event))
    }

    /// Whether everything up to a mark is done.
    pub(super) fn is_over(&self, number: u64) -> Result<bool, result::DriverError> {
        let mut marks = lock(&self.marks);
        marks.settle()?;
        Ok(marks.event(number).is_none())
    }

    /// Waits for everything up to a mark.
    pub(super) fn wait_for(&self, number: u64) -> Result<(), result::DriverError> {
        lock(&self.marks).event(number).map_or(Ok(()), CudaEvent::synchronize)
    }
}
