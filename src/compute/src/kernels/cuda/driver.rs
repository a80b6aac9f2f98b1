//! The driver: context, stream, kernels.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::ptr::null_mut;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys::{self, CUcontext, CUdevice_attribute, CUfunction, CUfunction_attribute, CUmodule, CUresult, CUstream};

use super::error::{CudaError, must};
use super::timer::Profile;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// CUDA 13.0, with whose compiler the kernels were made.
const NEEDED_VERSION: i32 = 13_000;

/// Checks the result of a driver call.
pub(super) fn check(doing: &'static str, result: CUresult) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: `text` is a place for a pointer to a static string.
    let known = unsafe { sys::cuGetErrorString(result, &raw mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
    // SAFETY: the driver's string ends with 0 and lives as long as the process.
    let problem = if known { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() } else { format!("{result:?}") };
    Err(CudaError::Call { doing, problem })
}

/// One device's context, its one stream, and the kernels.
#[derive(Debug)]
pub(super) struct Driver {
    context: CUcontext,
    stream: CUstream,
    modules: Vec<CUmodule>,
    functions: Mutex<HashMap<(&'static str, &'static str), CUfunction>>,
    /// Times of kernels, while they are asked for.
    profile: Mutex<Option<Profile>>,
    /// Name of the device.
    pub(super) name: String,
    /// Compute capability.
    pub(super) capability: (i32, i32),
    /// Multiprocessors.
    pub(super) multiprocessors: usize,
}

// SAFETY: the driver's handles may be used from any thread; the context is made current before each use.
unsafe impl Send for Driver {}
// SAFETY: as above; calls on one stream from several threads are ordered by the driver.
unsafe impl Sync for Driver {}

impl Driver {
    /// Opens device `ordinal` and loads the kernels.
    pub(super) fn open(ordinal: i32) -> Result<Self, CudaError> {
        // SAFETY: only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        // SAFETY: the driver's entry point; takes no pointers.
        check("start the driver", unsafe { sys::cuInit(0) })?;
        let mut version = 0;
        // SAFETY: `version` outlives the call.
        check("read the driver's version", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
        if version < NEEDED_VERSION {
            return Err(CudaError::OldDriver { version });
        }
        let mut device = 0;
        // SAFETY: `device` outlives the call.
        check("find the device", unsafe { sys::cuDeviceGet(&raw mut device, ordinal) }).map_err(|_| CudaError::NoDevice { ordinal })?;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: `value` outlives the call, `device` is valid.
            check("read the device's properties", unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) }).map(|()| value)
        };
        let capability = (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let multiprocessors = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let mut name = [0_u8; 128];
        // SAFETY: the buffer's length is given.
        check("read the device's name", unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device) })?;
        let name = CStr::from_bytes_until_nul(&name).map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let (mut context, mut stream) = (null_mut(), null_mut());
        // SAFETY: `context` outlives the call, `device` is valid.
        check("make a context", unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) })?;
        // SAFETY: the context was just made.
        check("make the context current", unsafe { sys::cuCtxSetCurrent(context) })?;
        // SAFETY: `stream` outlives the call.
        check("make a stream", unsafe { sys::cuStreamCreate(&raw mut stream, 1) })?;
        let mut modules = Vec::with_capacity(IMAGES.len());
        for (_, image) in IMAGES.iter().filter(|(name, _)| capability == (9, 0) || !name.ends_with("_hopper")) {
            let mut module = null_mut();
            // SAFETY: the image is a fat binary, which says its own length.
            check("load the kernels", unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) })?;
            modules.push(module);
        }
        Ok(Self { context, stream, modules, functions: Mutex::default(), profile: Mutex::default(), name, capability, multiprocessors })
    }

    /// The one stream.
    pub(super) fn stream(&self) -> CUstream {
        self.stream
    }

    /// Makes the context this thread's.
    pub(super) fn bind(&self) {
        // SAFETY: the context lives as long as the process.
        must(check("make the context current", unsafe { sys::cuCtxSetCurrent(self.context) }));
    }

    /// Begins to time what is put on the stream.
    pub(super) fn start_profile(&self) {
        *self.profile.lock().unwrap_or_else(PoisonError::into_inner) = Some(Profile::new(self));
    }

    /// Ends it: (name, calls, milliseconds), longest first.
    pub(super) fn end_profile(&self) -> Vec<(String, usize, f64)> {
        self.synchronize();
        self.profile.lock().unwrap_or_else(PoisonError::into_inner).take().map(Profile::sums).unwrap_or_default()
    }

    /// Whether times are asked for.
    pub(super) fn is_profiling(&self) -> bool {
        self.profile.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Does `work`, timed under this name while times are asked for.
    pub(super) fn timed<T>(&self, name: impl FnOnce() -> String, work: impl FnOnce() -> T) -> T {
        let now = || self.profile.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(|profile| profile.now(self));
        let Some(before) = now() else { return work() };
        let result = work();
        if let Some(after) = now()
            && let Some(profile) = self.profile.lock().unwrap_or_else(PoisonError::into_inner).as_mut()
        {
            profile.add(name(), before, after);
        }
        result
    }

    /// Waits for what still runs before something is destroyed; what went wrong there has been said elsewhere.
    pub(super) fn settle(&self) {
        // SAFETY: context and stream live as long as the process.
        let _: CUresult = unsafe { sys::cuCtxSetCurrent(self.context) };
        // SAFETY: as above.
        let _: CUresult = unsafe { sys::cuStreamSynchronize(self.stream) };
    }

    /// Waits until all that was asked is done.
    pub(super) fn synchronize(&self) {
        self.bind();
        // SAFETY: the stream is valid.
        must(check("finish its work", unsafe { sys::cuStreamSynchronize(self.stream) }));
    }

    /// The kernel `name_suffix`, which may use `shared` bytes of dynamic shared memory.
    fn function(&self, name: &'static str, suffix: &'static str, shared: usize) -> Result<CUfunction, CudaError> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = functions.get(&(name, suffix)) {
            return Ok(function);
        }
        let full = if suffix.is_empty() { name.to_owned() } else { format!("{name}_{suffix}") };
        let symbol = CString::new(full.as_str()).map_err(|_| CudaError::NoKernel(full.clone()))?;
        for &module in &self.modules {
            let mut function = null_mut();
            // SAFETY: `function` outlives the call, the module is loaded, the name ends with 0.
            if unsafe { sys::cuModuleGetFunction(&raw mut function, module, symbol.as_ptr()) } == CUresult::CUDA_SUCCESS {
                if shared > 48 << 10 {
                    let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                    // SAFETY: the function was just found.
                    check("reserve shared memory", unsafe { sys::cuFuncSetAttribute(function, attribute, shared as i32) })?;
                }
                functions.insert((name, suffix), function);
                return Ok(function);
            }
        }
        Err(CudaError::NoKernel(full))
    }

    /// Puts a kernel on the stream.
    ///
    /// # Safety
    /// `arguments` point to values of the kernel's parameter types, in order; the memory that they name is valid on the device
    /// for what the kernel does with this grid.
    pub(super) unsafe fn launch(
        &self,
        (name, suffix): (&'static str, &'static str),
        grid: (usize, usize, usize),
        block: usize,
        shared: usize,
        arguments: &mut [*mut c_void],
    ) {
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return;
        }
        self.bind();
        let function = must(self.function(name, suffix, shared));
        let (x, y, z) = (grid.0 as u32, grid.1 as u32, grid.2 as u32);
        // SAFETY: as the caller vouches; function and stream are valid.
        let launch = || unsafe { sys::cuLaunchKernel(function, x, y, z, block as u32, 1, 1, shared as u32, self.stream, arguments.as_mut_ptr(), null_mut()) };
        let result = self.timed(|| format!("{name}_{suffix}"), launch);
        if let Err(CudaError::Call { problem, .. }) = check("launch a kernel", result) {
            super::error::raise(CudaError::Call { doing: "launch a kernel", problem: format!("{name}_{suffix}: {problem}") });
        }
    }
}

/// Pointers to the values, for [`Driver::launch`].
macro_rules! arguments {
    ($($value:expr),* $(,)?) => {
        &mut [$((&raw const $value).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
pub(super) use arguments;
