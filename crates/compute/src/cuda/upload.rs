//! Arrays of a step, packed into one piece of memory and copied at once.
//!
//! Place in the flow: an executor pushes the arrays of its layout and sends them. The result of a push,
//! added to the address that sending returns, is the array's address on the device.

use super::device::{Device, DeviceError, Scratch};

/// Arrays of a step.
#[derive(Debug, Default)]
pub struct Upload {
    bytes: Vec<u8>,
}

impl Upload {
    /// Alignment of every array.
    const ALIGNMENT: usize = 16;

    /// Makes it empty and keeps its memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Adds an array; returns where it begins.
    pub fn push<T: bytemuck::NoUninit>(&mut self, array: &[T]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(Self::ALIGNMENT), 0);
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytemuck::cast_slice(array));
        start as u64
    }

    /// Copies all of it into `memory`, and behind it an array of `count` values that hold addresses of
    /// this very memory. Returns the addresses of the beginning and of that array.
    ///
    /// # Errors
    ///
    /// When the device has less memory, or `last` fails.
    pub fn send<T: bytemuck::NoUninit, E: From<DeviceError>>(
        &mut self,
        device: &dyn Device,
        memory: &mut Scratch,
        count: usize,
        last: impl FnOnce(u64) -> Result<Vec<T>, E>,
    ) -> Result<(u64, u64), E> {
        // The address is known only when the memory is large enough.
        let base = memory.at_least(self.bytes.len() + count * size_of::<T>() + 2 * Self::ALIGNMENT)?;
        let values = last(base)?;
        assert!(values.len() <= count, "as many as were announced");
        let at = self.push(&values);
        device.upload(&self.bytes, base)?;
        Ok((base, base + at))
    }
}
