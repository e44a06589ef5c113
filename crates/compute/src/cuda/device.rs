//! What is asked of a device: memory, copies, kernels by name, and matrix products.
//!
//! Place in the flow: everything above this file is plain data and order of work, and knows addresses
//! but no hardware. A graphics processor is one implementation (`gpu`). The tests have another, which
//! runs the same kernel sources on the CPU, thread for thread. So all of this is tested without a
//! graphics processor.
//!
//! There are two queues of work: computing and transfers. Computing is everything that names no queue.
//! Transfers are copies between the device and memory of the host that [`Device::pin`] gave. Each queue
//! does its work in the order of the calls. Between the two, only [`Device::order`] orders anything.
//!
//! Invariants: only [`Device::download`], [`Device::wait`] and [`Device::keep_pace`] wait for work.
//! Memory is released after all computing that was launched before; its owner sees to it that no
//! transfer uses it. Once work has failed, in either queue, every call fails that waits for work or asks
//! whether it is over.

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
    /// Blocks in each of three dimensions.
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

/// `out[rows, outputs] = x[rows, inputs] * weight[outputs, inputs]^T`, bf16 in, accumulated in single
/// precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// bf16 `[rows, inputs]`.
    pub x: u64,
    /// bf16 `[outputs, inputs]`.
    pub weight: u64,
    /// Result `[rows, outputs]`, in the format of `written`.
    pub out: u64,
    /// Rows of `x` and `out`.
    pub rows: usize,
    /// Width of a row of `x`.
    pub inputs: usize,
    /// Width of a row of `out`.
    pub outputs: usize,
    /// Format of `out`.
    pub written: Written,
}

/// A queue of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Kernels, products, uploads and downloads.
    Compute,
    /// Copies beside them.
    Transfer,
}

/// A point in a queue: the end of everything that was asked of it before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Queue of the work.
    pub queue: Queue,
    /// Grows within a queue.
    pub number: u64,
}

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Out of the device.
    ToHost,
    /// Into the device.
    ToDevice,
}

/// A copy between the device and memory that [`Device::pin`] gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostCopy {
    /// Address on the device.
    pub device: u64,
    /// Address on the host.
    pub host: u64,
    /// Bytes to copy.
    pub bytes: usize,
}

/// A device with its memory.
pub trait Device: fmt::Debug + Send + Sync {
    /// Memory of this number of bytes, more than none; its contents are undefined. At least 256-byte
    /// aligned.
    ///
    /// # Errors
    ///
    /// When the device has less memory.
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

    /// Memory of the host for transfers, page-locked where there is such. Its contents are undefined.
    ///
    /// # Errors
    ///
    /// When no more memory can be had.
    fn pin(&self, bytes: usize) -> Result<u64, DeviceError>;

    /// Gives memory back that was had from [`Device::pin`]. No transfer uses it any more.
    fn unpin(&self, address: u64, bytes: usize);

    /// Asks the transfer queue for copies.
    ///
    /// # Errors
    ///
    /// When the device fails.
    ///
    /// # Safety
    ///
    /// The memory on both sides is that large, and stays until the copies are over. All other work that
    /// writes what they read, or touches what they write, is ordered before or after them.
    unsafe fn start_copies(&self, direction: Direction, copies: &[HostCopy]) -> Result<(), DeviceError>;

    /// The end of what was asked of a queue until now.
    ///
    /// # Errors
    ///
    /// When the device fails.
    fn mark(&self, queue: Queue) -> Result<Mark, DeviceError>;

    /// What is asked of a queue from now on is done after this point of another.
    ///
    /// # Errors
    ///
    /// When the device fails.
    fn order(&self, before: Mark, queue: Queue) -> Result<(), DeviceError>;

    /// Whether everything up to this point was done. Waits for nothing; may be asked from any thread.
    ///
    /// # Errors
    ///
    /// When the device failed.
    fn is_over(&self, mark: Mark) -> Result<bool, DeviceError>;

    /// Waits for all work that was asked for, in both queues.
    ///
    /// # Errors
    ///
    /// When the device failed in it.
    fn wait(&self) -> Result<(), DeviceError>;

    /// Waits for the computing that was launched before the last call of this; returns the end of what
    /// was launched before this one. Called after every step, it keeps exactly one step on its way while
    /// the next is planned. The caller measures the time of the step before.
    ///
    /// # Errors
    ///
    /// When the device failed in it.
    fn keep_pace(&self) -> Result<Mark, DeviceError>;

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
    /// The kernel takes exactly these arguments. Its addresses lead to memory of this device that holds
    /// what it reads and takes what it writes.
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
    /// Memory of this number of bytes, all zero.
    ///
    /// # Errors
    ///
    /// When the device has less memory.
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
    /// When the device has less memory, or fails.
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
    /// Memory of this number of bytes to begin with.
    ///
    /// # Errors
    ///
    /// When the device has less memory.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, DeviceError> {
        Ok(Self { memory: Memory::zeroed(device, bytes)? })
    }

    /// At least this number of bytes. Their contents are undefined.
    ///
    /// # Errors
    ///
    /// When the device has less memory.
    pub fn at_least(&mut self, bytes: usize) -> Result<u64, DeviceError> {
        if self.memory.bytes < bytes {
            let device = Arc::clone(&self.memory.device);
            self.memory = Memory::zeroed(&device, bytes.next_power_of_two())?;
        }
        Ok(self.memory.address)
    }
}
