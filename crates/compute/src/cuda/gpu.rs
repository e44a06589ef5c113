//! An NVIDIA graphics processor: its context, two streams, and cuBLAS, through the bindings of `cudarc`.
//! They load the driver and cuBLAS when a processor is opened.
//!
//! Invariants: computing is one stream, so it is done in order, and memory is allocated and released in
//! that order. Transfers are another stream. There is no event per allocation: cudarc's tracking is off,
//! and code that uses both streams orders them. Memory that is given back stays with the process.
//! Engines of several models may share it, each on its own thread: their work goes through the same two
//! streams, in any order.
//!
//! candle's own device is not used: its kernels take minutes to build, and no step launches one of them.

mod queue;
mod staging;

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublas::{CudaBlas, result as cublas, sys as cublas_sys};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, result, sys};
use cudarc::nvrtc::Ptx;

use self::queue::GpuQueue;
use self::staging::Staging;
use super::device::{
    Argument, Device, DeviceError, Direction, HostCopy, Launch, Mark, Product, Queue, Written,
};

/// The kernels, for every architecture they were built for.
static KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));
/// Memory that cuBLAS may use for one product: what NVIDIA recommends for Hopper.
const CUBLAS_WORKSPACE: usize = 32 << 20;

/// A graphics processor.
#[derive(Debug)]
pub struct Gpu {
    context: Arc<CudaContext>,
    compute: GpuQueue,
    transfer: GpuQueue,
    blas: CudaBlas,
    pool: Pool,
    module: Arc<CudaModule>,
    functions: Mutex<HashMap<&'static str, Function>>,
    staging: Mutex<Staging>,
    /// The end of the step before.
    pace: Mutex<u64>,
    multiprocessors: u32,
    name: String,
}

#[derive(Clone, Debug)]
struct Function {
    function: CudaFunction,
    /// Dynamic shared memory that the kernel has permission for. It needs one beyond 48 KiB, less what
    /// the kernel declares.
    shared: u32,
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

/// Looks for what `cudarc` loads: it panics where a library is missing.
fn libraries_are_present(opening: &str) -> Result<(), DeviceError> {
    if KERNELS.is_empty() {
        let why = "this binary was built without kernels (BEAMLINE_WITHOUT_NVCC); build it with nvcc";
        return Err(DeviceError::new(opening, why));
    }
    // SAFETY: both only ask the dynamic linker for a library by its name.
    let (driver, blas) = unsafe { (sys::is_culib_present(), cublas_sys::is_culib_present()) };
    for (present, name, from) in
        [(driver, "libcuda.so.1", "the NVIDIA driver"), (blas, "libcublas.so.13", "the CUDA 13 libraries")]
    {
        if !present {
            let why = format!("{name} was not found; install {from}, or add its folder to LD_LIBRARY_PATH");
            return Err(DeviceError::new(opening, why));
        }
    }
    Ok(())
}

impl Gpu {
    /// The graphics processor of a number.
    ///
    /// # Errors
    ///
    /// When there is none, its driver is too old, or it is older than what the kernels were built for.
    pub fn open(ordinal: usize) -> Result<Arc<dyn Device>, DeviceError> {
        let opening = format!("opening GPU {ordinal}");
        libraries_are_present(&opening)?;
        let context = CudaContext::new(ordinal).map_err(said(&opening))?;
        // SAFETY: memory is allocated and released in the order of computing; code that copies beside it
        // orders the two.
        unsafe { context.disable_event_tracking() };
        let compute = GpuQueue::new(&context).map_err(said(&opening))?;
        let transfer = GpuQueue::new(&context).map_err(said(&opening))?;
        let blas = CudaBlas::new(Arc::clone(compute.stream()))
            .map_err(|error| blas_said("opening cuBLAS", &error))?;
        let pool = Pool::of(context.cu_device()).map_err(said("configuring the memory pool"))?;
        let module = context.load_module(Ptx::from_binary(KERNELS.to_vec())).map_err(|error| {
            let capability = context.compute_capability().unwrap_or_default();
            let what = format!("loading kernels on compute capability {}.{}", capability.0, capability.1);
            DeviceError::new(what, error)
        })?;
        let staging = Staging::new(&context).map_err(said("allocating page-locked memory"))?;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(attribute).map_err(said("asking for multiprocessors"))?;
        let name = context.name().map_err(said("asking for the name"))?;
        let gpu = Self {
            compute,
            transfer,
            blas,
            pool,
            module,
            functions: Mutex::default(),
            staging: Mutex::new(staging),
            pace: Mutex::new(0),
            multiprocessors: u32::try_from(multiprocessors).unwrap_or(1),
            name,
            context,
        };
        gpu.configure_cublas()?;
        Ok(Arc::new(gpu))
    }

    /// A workspace of its own, so that cuBLAS allocates nothing in a step. It is set after the stream,
    /// because setting a stream takes it away, and it is never given back. Sums are in single precision
    /// throughout: by default, parts of a product of few rows may be rounded to bf16 before they are
    /// added up.
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
        self.context.bind_to_thread().map_err(said("binding the context to the thread"))
    }

    fn queue(&self, queue: Queue) -> &GpuQueue {
        match queue {
            Queue::Compute => &self.compute,
            Queue::Transfer => &self.transfer,
        }
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
    /// The pool of a device. Memory that is given back stays in it: by default the driver returns it to
    /// the system at every wait.
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
        unsafe { result::malloc_async(self.compute.stream().cu_stream(), bytes) }
            .map_err(|error| DeviceError::new(format!("allocating {bytes} bytes"), error))
    }

    fn release(&self, address: u64, _bytes: usize) {
        if self.bind().is_ok() {
            // SAFETY: it came from `allocate`, and is given back once. Later calls report what fails
            // here.
            let _ = unsafe { result::free_async(address, self.compute.stream().cu_stream()) };
        }
    }

    fn free_bytes(&self) -> usize {
        let free = self.context.mem_get_info().map_or(0, |(free, _)| free);
        free + self.pool.unused()
    }

    fn upload(&self, bytes: &[u8], to: u64) -> Result<(), DeviceError> {
        self.bind()?;
        let mut staging = lock(&self.staging);
        staging.upload(&self.compute, bytes, to).map_err(said("copying to the device"))
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.bind()?;
        let mut staging = lock(&self.staging);
        staging.download(&self.compute, from, bytes).map_err(said("copying from the device"))
    }

    fn pin(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.bind()?;
        // SAFETY: the context is bound; the memory is given back to `unpin`.
        let memory = unsafe { result::malloc_host(bytes, 0) };
        memory.map(|memory| memory as u64).map_err(|error| {
            DeviceError::new(format!("allocating {bytes} bytes of page-locked memory"), error)
        })
    }

    fn unpin(&self, address: u64, _bytes: usize) {
        if self.bind().is_ok() {
            // SAFETY: it was had from `pin`, and no copy uses it. What fails here is told by what comes next.
            let _ = unsafe { result::free_host(address as *mut c_void) };
        }
    }

    unsafe fn start_copies(&self, direction: Direction, copies: &[HostCopy]) -> Result<(), DeviceError> {
        self.bind()?;
        let stream = self.transfer.stream().cu_stream();
        for &HostCopy { device, host, bytes } in copies {
            // SAFETY: the caller says that the memory is that large on both sides, and stays. It is
            // named by addresses only, as slices of it would be read and written behind their backs.
            let started = unsafe {
                match direction {
                    Direction::ToHost => {
                        sys::cuMemcpyDtoHAsync_v2(host as *mut c_void, device, bytes, stream)
                    }
                    Direction::ToDevice => {
                        sys::cuMemcpyHtoDAsync_v2(device, host as *const c_void, bytes, stream)
                    }
                }
            };
            started.result().map_err(said("copying pages"))?;
        }
        Ok(())
    }

    fn mark(&self, queue: Queue) -> Result<Mark, DeviceError> {
        self.bind()?;
        let number = self.queue(queue).mark().map_err(said("marking the end of work"))?;
        Ok(Mark { queue, number })
    }

    fn order(&self, before: Mark, queue: Queue) -> Result<(), DeviceError> {
        if before.queue == queue {
            return Ok(());
        }
        self.bind()?;
        self.queue(before.queue).order(before.number, self.queue(queue)).map_err(said("ordering work"))
    }

    fn is_over(&self, mark: Mark) -> Result<bool, DeviceError> {
        self.bind()?;
        self.queue(mark.queue).is_over(mark.number).map_err(said("asking whether work is over"))
    }

    fn wait(&self) -> Result<(), DeviceError> {
        self.bind()?;
        self.transfer.stream().synchronize().map_err(said("waiting for transfers"))?;
        self.compute.stream().synchronize().map_err(said("waiting"))
    }

    fn keep_pace(&self) -> Result<Mark, DeviceError> {
        let end = self.mark(Queue::Compute)?;
        let before = std::mem::replace(&mut *lock(&self.pace), end.number);
        self.compute.wait_for(before).map_err(said("waiting for the step before"))?;
        Ok(end)
    }

    fn zero(&self, address: u64, bytes: usize) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: the caller's memory is that large.
        unsafe { result::memset_d8_async(address, 0, bytes, self.compute.stream().cu_stream()) }
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
        // SAFETY: the caller says that arguments and memory are what the kernel takes; the driver copies
        // the arguments before it returns.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (launch.block, 1, 1),
                launch.shared,
                self.compute.stream().cu_stream(),
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
