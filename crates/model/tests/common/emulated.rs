//! A device that is the CPU: the sources of the CUDA kernels, compiled by a C++ compiler and run thread
//! for thread, and matrix products in plain loops. So the whole CUDA path is tested here, except the
//! hardware and cuBLAS.
//!
//! Memory is filled with NaN when it is given out; a sanitizer finds reads beyond its end. Computing is
//! done at once when it is launched. Transfers are done as late as their order allows, so that code that
//! does not wait for one computes with NaN or another page.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]

use std::alloc::{Layout, alloc, dealloc};
use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use beamline_compute::cuda::device::{
    Argument, Device, DeviceError, Direction, HostCopy, Launch, Mark, Product, Queue, Written,
};
use half::bf16;
use rayon::prelude::*;

type EmulatedLaunch = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    u32,
    u32,
    *mut *mut c_void,
    u32,
    *mut c_char,
    usize,
) -> c_int;

/// The kernels. One launch at a time: the emulation has one machine.
#[derive(Debug)]
struct Kernels {
    library: libloading::Library,
    one_at_a_time: Mutex<()>,
}

/// Compiles the kernels; nothing, and a loud word, if there is no compiler.
fn compile(output: &str) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../compute/kernels/emulation/library.cpp");
    let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join(output);
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let mut command = Command::new(&compiler);
    command.args(["-std=c++20", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared"]);
    command.arg("-o").arg(&output).arg(source);
    match command.output() {
        Err(error) => {
            eprintln!("SKIPPED: the CUDA kernels are not tested, because {compiler} does not run: {error}");
            None
        }
        Ok(done) => {
            assert!(done.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&done.stderr));
            Some(output)
        }
    }
}

/// The kernels, compiled once per process.
fn kernels() -> Option<&'static Kernels> {
    static KERNELS: OnceLock<Option<Kernels>> = OnceLock::new();
    let load = || {
        let name = format!("libemulated-{}.so", std::process::id());
        let path = compile(&name)?;
        // SAFETY: the library was just built from sources of this crate, and does nothing when it is loaded.
        let library = unsafe { libloading::Library::new(&path) }.unwrap();
        std::fs::remove_file(path).unwrap();
        Some(Kernels { library, one_at_a_time: Mutex::new(()) })
    };
    KERNELS.get_or_init(load).as_ref()
}

/// The CPU as a device.
#[derive(Debug)]
pub struct Emulated {
    kernels: &'static Kernels,
    transfers: Mutex<Transfers>,
}

/// Copies that were asked for.
#[derive(Debug, Default)]
struct Transfers {
    /// The first of them not done yet, by their numbers.
    waiting: VecDeque<(u64, Direction, HostCopy)>,
    marks: u64,
    /// Marks that were asked whether they are over: the second answer is yes.
    asked: u64,
    /// Copies fail from now on.
    fails: bool,
    /// The last mark of computing that copies wait for.
    after: u64,
}

impl Emulated {
    /// The device, or nothing where there is no C++ compiler.
    pub fn open() -> Option<Arc<dyn Device>> {
        Self::new().map(|device| device as Arc<dyn Device>)
    }

    /// The same, to be made fail.
    pub fn new() -> Option<Arc<Self>> {
        Some(Arc::new(Self { kernels: kernels()?, transfers: Mutex::default() }))
    }

    /// From now on, copies in the transfer queue fail when they are carried out.
    pub fn fail_transfers(&self) {
        self.transfers().fails = true;
    }

    /// The number of the last mark of computing that copies launched from now on come after. Here that
    /// always holds, because computing is over when it was launched. A graphics processor needs the order.
    pub fn transfers_come_after(&self) -> u64 {
        self.transfers().after
    }

    fn transfers(&self) -> std::sync::MutexGuard<'_, Transfers> {
        self.transfers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transfers {
    /// Carries out what was asked for before a mark.
    fn carry_out(&mut self, before: u64) -> Result<(), DeviceError> {
        while let Some(&(number, direction, copy)) = self.waiting.front()
            && number < before
        {
            if self.fails {
                return Err(DeviceError::new("copying a page", "it was told to fail"));
            }
            let (device, host) = (copy.device as *mut u8, copy.host as *mut u8);
            let (from, to) = match direction {
                Direction::ToHost => (device, host),
                Direction::ToDevice => (host, device),
            };
            // SAFETY: the caller that started the copy vouches for both sides.
            unsafe { std::ptr::copy_nonoverlapping(from, to, copy.bytes) };
            self.waiting.pop_front();
        }
        Ok(())
    }
}

/// The device of the tests: the CPU, unless the feature `cuda` is on and `BEAMLINE_GPU` names a graphics
/// processor.
pub fn device() -> Option<Arc<dyn Device>> {
    #[cfg(feature = "cuda")]
    if let Ok(ordinal) = std::env::var("BEAMLINE_GPU") {
        return Some(beamline_compute::cuda::gpu::Gpu::open(ordinal.parse().unwrap()).unwrap());
    }
    Emulated::open()
}

/// Whether there is a graphics processor. Its products round by the number of rows; those of the
/// emulation do not.
pub fn on_gpu() -> bool {
    std::env::var_os("BEAMLINE_GPU").is_some()
}

const ALIGNMENT: usize = 256;

impl Device for Emulated {
    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        let layout = Layout::from_size_align(bytes, ALIGNMENT).unwrap();
        // SAFETY: the size is not zero, and every byte is written.
        let memory = unsafe {
            let memory = alloc(layout);
            assert!(!memory.is_null());
            memory.write_bytes(0xff, bytes);
            memory
        };
        Ok(memory as u64)
    }

    fn release(&self, address: u64, bytes: usize) {
        // SAFETY: it was had from `allocate` with this size.
        unsafe { dealloc(address as *mut u8, Layout::from_size_align(bytes, ALIGNMENT).unwrap()) };
    }

    fn free_bytes(&self) -> usize {
        1 << 30
    }

    fn upload(&self, bytes: &[u8], to: u64) -> Result<(), DeviceError> {
        // SAFETY: the caller's memory is that large.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        // SAFETY: the caller's memory is that large.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn pin(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.allocate(bytes)
    }

    fn unpin(&self, address: u64, bytes: usize) {
        self.release(address, bytes);
    }

    unsafe fn start_copies(&self, direction: Direction, copies: &[HostCopy]) -> Result<(), DeviceError> {
        let mut transfers = self.transfers();
        let number = transfers.marks;
        transfers.waiting.extend(copies.iter().map(|copy| (number, direction, *copy)));
        Ok(())
    }

    fn mark(&self, queue: Queue) -> Result<Mark, DeviceError> {
        let mut transfers = self.transfers();
        transfers.marks += 1;
        Ok(Mark { queue, number: transfers.marks })
    }

    fn order(&self, before: Mark, queue: Queue) -> Result<(), DeviceError> {
        match (before.queue, queue) {
            (Queue::Transfer, Queue::Compute) => self.transfers().carry_out(before.number),
            (Queue::Compute, Queue::Transfer) => {
                let mut transfers = self.transfers();
                transfers.after = transfers.after.max(before.number);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn is_over(&self, mark: Mark) -> Result<bool, DeviceError> {
        let mut transfers = self.transfers();
        if mark.queue == Queue::Transfer
            && transfers.waiting.front().is_some_and(|first| first.0 < mark.number)
        {
            if transfers.asked < mark.number {
                transfers.asked = mark.number;
                return Ok(false);
            }
            transfers.carry_out(mark.number)?;
        }
        Ok(true)
    }

    fn wait(&self) -> Result<(), DeviceError> {
        self.transfers().carry_out(u64::MAX)
    }

    fn keep_pace(&self) -> Result<Mark, DeviceError> {
        self.mark(Queue::Compute)
    }

    fn zero(&self, address: u64, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller's memory is that large.
        unsafe { (address as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        launch: Launch,
        arguments: &[Argument],
    ) -> Result<(), DeviceError> {
        let address = |argument: &Argument| -> *mut c_void {
            match argument {
                Argument::U64(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Argument::U32(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Argument::F32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            }
        };
        let mut addresses: Vec<*mut c_void> = arguments.iter().map(address).collect();
        let name = CString::new(kernel).unwrap();
        let mut message = [0_u8; 1024];
        let _one = self.kernels.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the signature is that of library.cpp; the rest is the caller's promise.
        let failed = unsafe {
            let launch_kernel: libloading::Symbol<'_, EmulatedLaunch> =
                self.kernels.library.get(b"emulated_launch").unwrap();
            launch_kernel(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.block,
                launch.shared,
                addresses.as_mut_ptr(),
                addresses.len() as u32,
                message.as_mut_ptr().cast(),
                message.len(),
            )
        };
        match failed {
            0 => Ok(()),
            _ => {
                let said = CStr::from_bytes_until_nul(&message).unwrap().to_string_lossy();
                Err(DeviceError::new(format!("{kernel} {launch:?}"), said))
            }
        }
    }

    unsafe fn multiply(&self, product: Product) -> Result<(), DeviceError> {
        let Product { x, weight, out, rows, inputs, outputs, written } = product;
        // SAFETY: the caller's memory is that large.
        let (x, weight) = unsafe {
            (
                std::slice::from_raw_parts(x as *const bf16, rows * inputs),
                std::slice::from_raw_parts(weight as *const bf16, outputs * inputs),
            )
        };
        let widen = |values: &[bf16]| values.iter().map(|value| value.to_f32()).collect::<Vec<f32>>();
        let (x, weight) = (widen(x), widen(weight));
        let row = |row: usize| -> Vec<f32> {
            let x = &x[row * inputs..][..inputs];
            let dot = |weight: &[f32]| x.iter().zip(weight).map(|(a, b)| a * b).sum::<f32>();
            weight.chunks_exact(inputs).map(dot).collect()
        };
        let all: Vec<f32> = (0..rows).into_par_iter().flat_map_iter(row).collect();
        match written {
            // SAFETY: as above.
            Written::F32 => unsafe { std::slice::from_raw_parts_mut(out as *mut f32, rows * outputs) }
                .copy_from_slice(&all),
            Written::Bf16 => {
                // SAFETY: as above.
                let out = unsafe { std::slice::from_raw_parts_mut(out as *mut bf16, rows * outputs) };
                for (out, value) in out.iter_mut().zip(all) {
                    *out = bf16::from_f32(value);
                }
            }
        }
        Ok(())
    }

    fn multiprocessors(&self) -> u32 {
        4
    }

    fn name(&self) -> &str {
        "emulated, no GPU"
    }
}
