//! What is asked of a device: memory, copies, kernels by name, and matrix products.
//!
//! Place in the flow: everything above this file is plain data and order of work, and knows addresses but no hardware. A
//! graphics processor is one implementation ([`gpu`](super::gpu)); the tests have another, which runs the same kernel
//! sources on the CPU, thread for thread, so that all of this is tested where there is no graphics processor.
//!
//! Invariants: work is done in the order in which it is asked for, as on one stream; nothing but
//! [`Device::download`], [`Device::wait`] and [`Device::keep_pace`] waits for it. Memory is released only after the work that was asked for before.

use std::fmt;
use std::sync::Arc;

/// Why the device did not do what it was asked. What it computed since the last success is worth nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub struct DeviceError {
    /// What was asked.
    pub what: String,
    /// What the driver said.
    pub why: String,
}

impl DeviceError {
    /// What was asked, and what was said.
    pub fn new(what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { what: what.into(), why: why.to_string() }
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Argument {
    /// An address, or a number of 64 bits.
    U64(u64),
    /// A number of 32 bits, with or without sign.
    U32(u32),
    /// A number in single precision.
    F32(f32),
}

impl From<u64> for Argument {
    fn from(value: u64) -> Self {
        Self::U64(value)
    }
}

impl From<u32> for Argument {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of shared memory of a block beyond what the kernel declares.
    pub shared: u32,
}

/// What a product is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// Rounded to bf16.
    Bf16,
    /// In single precision.
    F32,
}

/// `out[rows, outputs] = x[rows, inputs] * weight[outputs, inputs]^T`, bf16 in, accumulated in single precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// bf16 `[rows, inputs]`.
    pub x: u64,
    /// bf16 `[outputs, inputs]`.
    pub weight: u64,
    /// `[rows, outputs]`.
    pub out: u64,
    /// Rows.
    pub rows: usize,
    /// Width of a row of `x`.
    pub inputs: usize,
    /// Width of a row of `out`.
    pub outputs: usize,
    /// Format of `out`.
    pub written: Written,
}

/// A device with its memory.
pub trait Device: fmt::Debug + Send + Sync {
    /// Memory of so many bytes, more than none; its contents are undefined. At least 256-byte aligned.
    ///
    /// # Errors
    ///
    /// When there is not so much.
    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError>;

    /// Gives memory back that was had from [`Device::allocate`].
    fn release(&self, address: u64, bytes: usize);

    /// Bytes that may still be allocated.
    fn free_bytes(&self) -> usize;

    /// Copies to the device. Returns when the bytes may change again, which is not when they have arrived.
    ///
    /// # Errors
    ///
    /// When the device fails.
    fn upload(&self, bytes: &[u8], to: u64) -> Result<(), DeviceError>;

    /// Copies from the device, after all work that was asked for.
    ///
    /// # Errors
    ///
    /// When the device fails, or failed in work that was asked for before.
    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), DeviceError>;

    /// Copies parts of the device's memory, each its address and bytes, one after the other.
    ///
    /// # Errors
    ///
    /// When the device fails, or failed in work that was asked for before.
    fn gather(&self, parts: &[(u64, usize)], mut to: &mut [u8]) -> Result<(), DeviceError> {
        for &(from, bytes) in parts {
            let (now, later) = to.split_at_mut(bytes);
            self.download(from, now)?;
            to = later;
        }
        Ok(())
    }

    /// Copies to parts of the device's memory. Returns when the bytes may change again.
    ///
    /// # Errors
    ///
    /// When the device fails.
    fn scatter(&self, mut from: &[u8], parts: &[(u64, usize)]) -> Result<(), DeviceError> {
        for &(to, bytes) in parts {
            let (now, later) = from.split_at(bytes);
            self.upload(now, to)?;
            from = later;
        }
        Ok(())
    }

    /// Waits for all work that was asked for.
    ///
    /// # Errors
    ///
    /// When the device failed in it.
    fn wait(&self) -> Result<(), DeviceError>;

    /// Waits for what was asked for before the last call of this. Called after every step, it keeps one step on its way while
    /// the next is planned, and no more; and the time of a step, as whoever asks for it sees it, is that of the step before.
    ///
    /// # Errors
    ///
    /// When the device failed in it.
    fn keep_pace(&self) -> Result<(), DeviceError>;

    /// Fills memory with zeros.
    ///
    /// # Errors
    ///
    /// When the device fails.
    fn zero(&self, address: u64, bytes: usize) -> Result<(), DeviceError>;

    /// Runs a kernel.
    ///
    /// # Errors
    ///
    /// When there is no such kernel, or it cannot be launched like this.
    ///
    /// # Safety
    ///
    /// The kernel takes exactly these arguments, and its addresses lead to memory of this device that holds what it reads and
    /// takes what it writes.
    unsafe fn launch(
        &self,
        kernel: &'static str,
        launch: Launch,
        arguments: &[Argument],
    ) -> Result<(), DeviceError>;

    /// Multiplies.
    ///
    /// # Errors
    ///
    /// When the device fails.
    ///
    /// # Safety
    ///
    /// The addresses lead to memory of this device of the sizes that the product has.
    unsafe fn multiply(&self, product: Product) -> Result<(), DeviceError>;

    /// Multiprocessors: how many blocks keep it busy.
    fn multiprocessors(&self) -> u32;

    /// What it is called.
    fn name(&self) -> &str;
}

/// Memory of a device, released when it is dropped.
#[derive(Debug)]
pub struct Memory {
    device: Arc<dyn Device>,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// Memory of so many bytes, all zero.
    ///
    /// # Errors
    ///
    /// When there is not so much.
    pub fn zeroed(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, DeviceError> {
        // No device gives out nothing.
        let bytes = bytes.max(16);
        let address = device.allocate(bytes)?;
        let memory = Self { device: Arc::clone(device), address, bytes };
        device.zero(address, bytes)?;
        Ok(memory)
    }

    /// Memory that holds these values.
    ///
    /// # Errors
    ///
    /// When there is not so much, or the device fails.
    pub fn of<T: bytemuck::NoUninit>(device: &Arc<dyn Device>, values: &[T]) -> Result<Self, DeviceError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let memory = Self::zeroed(device, bytes.len())?;
        if !bytes.is_empty() {
            device.upload(bytes, memory.address)?;
        }
        Ok(memory)
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How large it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device it is of.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.device.release(self.address, self.bytes);
    }
}

/// Memory that grows to the largest size it was asked for; its contents are scratch.
#[derive(Debug)]
pub struct Scratch {
    memory: Memory,
}

impl Scratch {
    /// So much to begin with.
    ///
    /// # Errors
    ///
    /// When there is not so much.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, DeviceError> {
        Ok(Self { memory: Memory::zeroed(device, bytes)? })
    }

    /// At least so many bytes. What they hold is undefined.
    ///
    /// # Errors
    ///
    /// When there is not so much.
    pub fn at_least(&mut self, bytes: usize) -> Result<u64, DeviceError> {
        if self.memory.bytes < bytes {
            let device = Arc::clone(&self.memory.device);
            self.memory = Memory::zeroed(&device, bytes.next_power_of_two())?;
        }
        Ok(self.memory.address)
    }
}
