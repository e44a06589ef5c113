//! An NVIDIA graphics processor: its context, one stream, and cuBLAS, through the driver bindings that candle brings.
//!
//! Invariants: one stream, so work is done in order; no event per allocation (cudarc's tracking is off, as
//! nothing here is used from a second stream); memory that is given back stays with the process. Everything is asked for by
//! one thread, the engine's, but may be made and dropped by another.
//!
//! candle's own device is not used: opening one also makes a generator of random numbers, which nobody here asks for.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, result as cublas, sys as cublas_sys};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, PinnedHostSlice, result, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;

use super::device::{Argument, Device, DeviceError, Launch, Product, Written};

/// The kernels, for every architecture they were built for.
static KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));
/// Bytes of a piece of page-locked memory; what is larger is copied piece by piece.
const PIECE: usize = 4 << 20;
/// Pieces: how many copies may be on their way.
const PIECES: usize = 4;
/// Memory that cuBLAS may use for one product: what NVIDIA recommends for Hopper.
const CUBLAS_WORKSPACE: usize = 32 << 20;

/// A graphics processor.
#[derive(Debug)]
pub struct Gpu {
    stream: Arc<CudaStream>,
    blas: CudaBlas,
    pool: Pool,
    module: Arc<CudaModule>,
    functions: Mutex<HashMap<&'static str, Function>>,
    pieces: Mutex<Pieces>,
    /// Ends of the last two steps, the earlier one first.
    paces: Mutex<[CudaEvent; 2]>,
    multiprocessors: u32,
    name: String,
}

#[derive(Clone, Debug)]
struct Function {
    function: CudaFunction,
    /// Dynamic shared memory that it was given permission for. Beyond 48 KiB, less what the kernel declares, it needs one.
    shared: u32,
}

/// Page-locked memory that copies go through, used in turn.
#[derive(Debug)]
struct Pieces {
    all: Vec<(PinnedHostSlice<u8>, CudaEvent)>,
    next: usize,
}

impl Pieces {
    /// The one that was used longest ago, and the event of its last copy.
    fn next(&mut self) -> (&mut PinnedHostSlice<u8>, &mut CudaEvent) {
        let next = self.next;
        self.next = (next + 1) % PIECES;
        let (piece, copied) = &mut self.all[next];
        (piece, copied)
    }
}

/// Memory cut into parts that fit into a piece.
fn cut(address: u64, bytes: usize) -> Vec<(u64, usize)> {
    (0..bytes).step_by(PIECE).map(|at| (address + at as u64, PIECE.min(bytes - at))).collect()
}

/// How many of the parts, from the first on, fit into a piece, and their bytes.
fn fitting(parts: &[(u64, usize)]) -> (usize, usize) {
    let (mut count, mut bytes) = (0, 0);
    for &(_, part) in parts {
        if bytes + part > PIECE {
            break;
        }
        (count, bytes) = (count + 1, bytes + part);
    }
    (count, bytes)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind them is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn blas_said(what: &str, error: &cublas::CublasError) -> DeviceError {
    DeviceError::new(what, format!("{error:?}"))
}

fn said(what: &str) -> impl Fn(result::DriverError) -> DeviceError + '_ {
    move |error| DeviceError::new(what, error)
}

impl Gpu {
    /// The graphics processor of a number.
    ///
    /// # Errors
    ///
    /// When there is none, its driver is too old, or it is older than what the kernels were built for.
    pub fn open(ordinal: usize) -> Result<Arc<dyn Device>, DeviceError> {
        let opening = format!("opening GPU {ordinal}");
        let context = CudaContext::new(ordinal).map_err(said(&opening))?;
        // SAFETY: memory is allocated, used and released on this one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(said(&opening))?;
        let blas = CudaBlas::new(Arc::clone(&stream)).map_err(|error| blas_said("opening cuBLAS", &error))?;
        let pool = Pool::of(context.cu_device()).map_err(said("configuring the memory pool"))?;
        let module = context.load_module(Ptx::from_binary(KERNELS.to_vec())).map_err(|error| {
            let capability = context.compute_capability().unwrap_or_default();
            let what = format!("loading kernels on compute capability {}.{}", capability.0, capability.1);
            DeviceError::new(what, error)
        })?;
        let mut all = Vec::with_capacity(PIECES);
        for _ in 0..PIECES {
            // SAFETY: a piece is written before it is read.
            let piece = unsafe { context.alloc_pinned_with_flags(PIECE, 0) };
            all.push((
                piece.map_err(said("allocating page-locked memory"))?,
                context.new_event(None).map_err(said("making an event"))?,
            ));
        }
        let event = || context.new_event(None).map_err(said("making an event"));
        let paces = Mutex::new([event()?, event()?]);
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(attribute).map_err(said("asking for multiprocessors"))?;
        let name = context.name().map_err(said("asking for the name"))?;
        let gpu = Self {
            stream,
            blas,
            pool,
            module,
            functions: Mutex::default(),
            pieces: Mutex::new(Pieces { all, next: 0 }),
            paces,
            multiprocessors: u32::try_from(multiprocessors).unwrap_or(1),
            name,
        };
        gpu.configure_cublas()?;
        Ok(Arc::new(gpu))
    }

    /// A workspace of its own, so that cuBLAS allocates nothing in a step: after the stream was set, which takes it away. It is
    /// never given back. And sums in single precision throughout: by default parts of a product of few rows may
    /// be rounded to bf16 before they are added up.
    fn configure_cublas(&self) -> Result<(), DeviceError> {
        let address = self.allocate(CUBLAS_WORKSPACE)?;
        let handle = *self.blas.handle();
        // SAFETY: the memory is of this device, and lives as long as the process.
        let status =
            unsafe { cublas_sys::cublasSetWorkspace_v2(handle, address as *mut c_void, CUBLAS_WORKSPACE) };
        status.result().map_err(|error| blas_said("giving cuBLAS a workspace", &error))?;
        let mode = cublas_sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: the handle is open.
        let status = unsafe { cublas_sys::cublasSetMathMode(handle, mode) };
        status.result().map_err(|error| blas_said("configuring cuBLAS", &error))
    }

    fn bind(&self) -> Result<(), DeviceError> {
        self.stream.context().bind_to_thread().map_err(said("binding the context to the thread"))
    }

    fn function(&self, name: &'static str, shared: u32) -> Result<CudaFunction, DeviceError> {
        let mut functions = lock(&self.functions);
        let known = match functions.get(name) {
            Some(known) => known.clone(),
            None => {
                let function = self.module.load_function(name).map_err(|e| DeviceError::new(name, e))?;
                Function { function, shared: 0 }
            }
        };
        if known.shared < shared {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(shared).unwrap_or(i32::MAX);
            known.function.set_attribute(attribute, bytes).map_err(|e| DeviceError::new(name, e))?;
        }
        let function = known.function.clone();
        functions.insert(name, Function { shared: shared.max(known.shared), ..known });
        Ok(function)
    }
}

/// The pool that memory comes from.
#[derive(Debug)]
struct Pool(sys::CUmemoryPool);

// SAFETY: a handle of the driver, whose functions may be called from any thread.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Pool {
    /// The pool of a device. Memory that is given back stays in it: by default the driver returns it to the system at every wait.
    fn of(device: sys::CUdevice) -> Result<Self, result::DriverError> {
        let mut threshold = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute is a number of 64 bits, and the device is open.
        unsafe {
            let pool = result::device::get_default_mem_pool(device)?;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast())?;
            Ok(Self(pool))
        }
    }

    /// Bytes that were given back and can be given out again, which the driver does not count as free.
    fn unused(&self) -> usize {
        let ask = |attribute| {
            let mut value = 0_u64;
            // SAFETY: both attributes are numbers of 64 bits.
            unsafe { result::mem_pool::get_attribute(self.0, attribute, (&raw mut value).cast()) }
                .map_or(0, |()| usize::try_from(value).unwrap_or(0))
        };
        let reserved = ask(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
        reserved.saturating_sub(ask(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Page-locked memory goes next, which copies may still use.
        let _ = self.wait();
    }
}

impl Device for Gpu {
    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.bind()?;
        // SAFETY: the stream is open; the memory is used on it alone.
        unsafe { result::malloc_async(self.stream.cu_stream(), bytes) }
            .map_err(|error| DeviceError::new(format!("allocating {bytes} bytes"), error))
    }

    fn release(&self, address: u64, _bytes: usize) {
        if self.bind().is_ok() {
            // SAFETY: it was had from `allocate`, and is given back once. What fails here is told by what comes next.
            let _ = unsafe { result::free_async(address, self.stream.cu_stream()) };
        }
    }

    fn free_bytes(&self) -> usize {
        let free = self.stream.context().mem_get_info().map_or(0, |(free, _)| free);
        free + self.pool.unused()
    }

    fn upload(&self, bytes: &[u8], to: u64) -> Result<(), DeviceError> {
        self.scatter(bytes, &cut(to, bytes.len()))
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.gather(&cut(from, bytes.len()), bytes)
    }

    fn gather(&self, parts: &[(u64, usize)], to: &mut [u8]) -> Result<(), DeviceError> {
        // As many at a time as fit into a piece: one wait for all of them.
        self.bind()?;
        let fail = said("copying from the device");
        let mut pieces = lock(&self.pieces);
        let mut to = to;
        let mut parts = parts;
        while let Some(&(_, first)) = parts.first() {
            if first > PIECE {
                return Err(DeviceError::new("copying from the device", format!("a part of {first} bytes")));
            }
            let (count, bytes) = fitting(parts);
            let (now, later) = parts.split_at(count);
            let (piece, copied) = pieces.next();
            copied.synchronize().map_err(&fail)?;
            let piece = piece.as_mut_slice().map_err(&fail)?;
            let mut at = 0;
            for &(from, bytes) in now {
                // SAFETY: the piece is read after the stream was waited for.
                unsafe {
                    result::memcpy_dtoh_async(&mut piece[at..at + bytes], from, self.stream.cu_stream())
                }
                .map_err(&fail)?;
                at += bytes;
            }
            self.stream.synchronize().map_err(&fail)?;
            let (done, rest) = to.split_at_mut(bytes);
            done.copy_from_slice(&piece[..bytes]);
            (to, parts) = (rest, later);
        }
        Ok(())
    }

    fn scatter(&self, from: &[u8], parts: &[(u64, usize)]) -> Result<(), DeviceError> {
        self.bind()?;
        let fail = said("copying to the device");
        let mut pieces = lock(&self.pieces);
        let (mut from, mut parts) = (from, parts);
        while let Some(&(_, first)) = parts.first() {
            if first > PIECE {
                return Err(DeviceError::new("copying to the device", format!("a part of {first} bytes")));
            }
            let (count, bytes) = fitting(parts);
            let (now, later) = parts.split_at(count);
            let (piece, copied) = pieces.next();
            copied.synchronize().map_err(&fail)?;
            let piece = piece.as_mut_slice().map_err(&fail)?;
            let (done, rest) = from.split_at(bytes);
            piece[..bytes].copy_from_slice(done);
            let mut at = 0;
            for &(to, bytes) in now {
                // SAFETY: the piece is not written again before its event.
                unsafe { result::memcpy_htod_async(to, &piece[at..at + bytes], self.stream.cu_stream()) }
                    .map_err(&fail)?;
                at += bytes;
            }
            copied.record(&self.stream).map_err(&fail)?;
            (from, parts) = (rest, later);
        }
        Ok(())
    }

    fn wait(&self) -> Result<(), DeviceError> {
        self.bind()?;
        self.stream.synchronize().map_err(said("waiting"))
    }

    fn keep_pace(&self) -> Result<(), DeviceError> {
        self.bind()?;
        let fail = said("waiting for the step before");
        let mut paces = lock(&self.paces);
        paces.swap(0, 1);
        // An event that was never recorded is over.
        paces[1].record(&self.stream).map_err(&fail)?;
        paces[0].synchronize().map_err(&fail)
    }

    fn zero(&self, address: u64, bytes: usize) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: the caller's memory is that large.
        unsafe { result::memset_d8_async(address, 0, bytes, self.stream.cu_stream()) }
            .map_err(said("clearing memory"))
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        launch: Launch,
        arguments: &[Argument],
    ) -> Result<(), DeviceError> {
        self.bind()?;
        let function = self.function(kernel, launch.shared)?;
        let address = |argument: &Argument| -> *mut c_void {
            match argument {
                Argument::U64(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Argument::U32(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Argument::F32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            }
        };
        let mut addresses: Vec<*mut c_void> = arguments.iter().map(address).collect();
        let [x, y, z] = launch.grid;
        // SAFETY: the caller says that arguments and memory are what the kernel takes; the driver copies the arguments before it returns.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (launch.block, 1, 1),
                launch.shared,
                self.stream.cu_stream(),
                &mut addresses,
            )
        }
        .map_err(|error| DeviceError::new(format!("{kernel} {launch:?}"), error))
    }

    unsafe fn multiply(&self, product: Product) -> Result<(), DeviceError> {
        if product.rows == 0 || product.outputs == 0 {
            return Ok(());
        }
        self.bind()?;
        let fail = |why: String| DeviceError::new(format!("{product:?}"), why);
        let size = |value: usize| i32::try_from(value).map_err(|error| fail(error.to_string()));
        let (rows, inputs, outputs) = (size(product.rows)?, size(product.inputs)?, size(product.outputs)?);
        let (one, zero) = (1.0_f32, 0.0_f32);
        let bf16 = cublas_sys::cudaDataType_t::CUDA_R_16BF;
        let out = match product.written {
            Written::Bf16 => bf16,
            Written::F32 => cublas_sys::cudaDataType_t::CUDA_R_32F,
        };
        // cuBLAS counts by columns: what lies here as [rows, outputs] is to it [outputs, rows].
        // SAFETY: the caller says that the memory is that large.
        unsafe {
            cublas::gemm_ex(
                *self.blas.handle(),
                cublas_sys::cublasOperation_t::CUBLAS_OP_T,
                cublas_sys::cublasOperation_t::CUBLAS_OP_N,
                outputs,
                rows,
                inputs,
                (&raw const one).cast(),
                product.weight as *const c_void,
                bf16,
                inputs,
                product.x as *const c_void,
                bf16,
                inputs,
                (&raw const zero).cast(),
                product.out as *mut c_void,
                out,
                outputs,
                cublas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(|error| blas_said(&format!("{product:?}"), &error))
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn name(&self) -> &str {
        &self.name
    }
}
