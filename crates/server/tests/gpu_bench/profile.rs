//! A device that says where the time goes: on request, every kernel and product is waited for and timed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use beamline_compute::cuda::device::{
    Argument, Device, DeviceError, Direction, HostCopy, Launch, Mark, Product, Queue,
};

#[derive(Debug)]
pub(crate) struct Profile {
    inner: Arc<dyn Device>,
    on: AtomicBool,
    times: Mutex<BTreeMap<String, (usize, f64)>>,
}

impl Profile {
    pub(crate) fn of(inner: Arc<dyn Device>) -> Arc<Self> {
        Arc::new(Self { inner, on: AtomicBool::new(false), times: Mutex::default() })
    }

    /// Times everything from now on.
    pub(crate) fn start(&self) {
        self.times.lock().unwrap().clear();
        self.on.store(true, Ordering::SeqCst);
    }

    /// What was called how often, and for how many milliseconds.
    pub(crate) fn stop(&self) -> BTreeMap<String, (usize, f64)> {
        self.on.store(false, Ordering::SeqCst);
        self.times.lock().unwrap().clone()
    }

    fn timed<T>(
        &self,
        name: impl FnOnce() -> String,
        work: impl FnOnce() -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        if !self.on.load(Ordering::SeqCst) {
            return work();
        }
        self.inner.wait()?;
        let start = Instant::now();
        let done = work()?;
        self.inner.wait()?;
        let took = start.elapsed().as_secs_f64() * 1e3;
        let mut times = self.times.lock().unwrap();
        let entry = times.entry(name()).or_default();
        *entry = (entry.0 + 1, entry.1 + took);
        Ok(done)
    }
}

impl Device for Profile {
    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.inner.allocate(bytes)
    }

    fn release(&self, address: u64, bytes: usize) {
        self.inner.release(address, bytes);
    }

    fn free_bytes(&self) -> usize {
        self.inner.free_bytes()
    }

    fn upload(&self, bytes: &[u8], to: u64) -> Result<(), DeviceError> {
        self.timed(|| "upload".into(), || self.inner.upload(bytes, to))
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.timed(|| "download".into(), || self.inner.download(from, bytes))
    }

    fn wait(&self) -> Result<(), DeviceError> {
        self.inner.wait()
    }

    fn pin(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.inner.pin(bytes)
    }

    fn unpin(&self, address: u64, bytes: usize) {
        self.inner.unpin(address, bytes);
    }

    unsafe fn start_copies(&self, direction: Direction, copies: &[HostCopy]) -> Result<(), DeviceError> {
        // SAFETY: the caller's.
        self.timed(
            || format!("pages {direction:?}"),
            || unsafe { self.inner.start_copies(direction, copies) },
        )
    }

    fn mark(&self, queue: Queue) -> Result<Mark, DeviceError> {
        self.inner.mark(queue)
    }

    fn order(&self, before: Mark, queue: Queue) -> Result<(), DeviceError> {
        self.inner.order(before, queue)
    }

    fn is_over(&self, mark: Mark) -> Result<bool, DeviceError> {
        self.inner.is_over(mark)
    }

    fn keep_pace(&self) -> Result<Mark, DeviceError> {
        self.inner.keep_pace()
    }

    fn zero(&self, address: u64, bytes: usize) -> Result<(), DeviceError> {
        self.inner.zero(address, bytes)
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        launch: Launch,
        arguments: &[Argument],
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's.
        self.timed(|| kernel.to_owned(), || unsafe { self.inner.launch(kernel, launch, arguments) })
    }

    unsafe fn multiply(&self, product: Product) -> Result<(), DeviceError> {
        let name = || format!("product {}x{}", product.inputs, product.outputs);
        // SAFETY: the caller's.
        self.timed(name, || unsafe { self.inner.multiply(product) })
    }

    fn multiprocessors(&self) -> u32 {
        self.inner.multiprocessors()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}
