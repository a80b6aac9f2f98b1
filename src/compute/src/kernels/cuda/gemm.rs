//! Matrix products by cuBLASLt. The heuristic is asked once per shape, the workspace is allocated once.

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::sys::{self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtMatmulDescAttributes_t as Attribute};
use cudarc::cublaslt::sys::{cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasStatus_t, cudaDataType};

use super::Kind;
use super::driver::Driver;
use super::error::{CudaError, must};

/// An operand, row-major.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand {
    /// Address of the first value.
    pub(super) pointer: u64,
    /// From one stored row to the next.
    pub(super) stride: usize,
    /// Stored as the transpose of what the product wants.
    pub(super) transposed: bool,
    /// Type of the values.
    pub(super) kind: Kind,
}

/// What is done to a product before it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Epilogue {
    /// Nothing.
    None,
    /// A vector [n] is added to every row.
    Bias,
    /// Bias, then `pre` gets the sum and the result its GELU (tanh form).
    BiasGelu,
}

/// `c[m, n] = alpha · a[m, k] b[k, n] + beta · c`, then `epilogue`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) a: Operand,
    pub(super) b: Operand,
    pub(super) c: Operand,
    pub(super) alpha: f32,
    pub(super) beta: f32,
    pub(super) epilogue: Epilogue,
    /// Address of the bias, of the result's type.
    pub(super) bias: u64,
    /// Address of the values before GELU [m, n], of the result's type, rows at the same stride.
    pub(super) pre: u64,
}

/// All that a plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sizes: (usize, usize, usize),
    a: (usize, bool, Kind),
    b: (usize, bool, Kind),
    c: (usize, Kind),
    accumulates: bool,
    epilogue: Epilogue,
    /// Alignment of the addresses in bytes, at most 256.
    alignment: [u32; 3],
}

struct Plan {
    description: cublasLtMatmulDesc_t,
    a: cublasLtMatrixLayout_t,
    b: cublasLtMatrixLayout_t,
    c: cublasLtMatrixLayout_t,
    algorithm: cublasLtMatmulAlgo_t,
}

/// cuBLASLt with its plans.
pub(super) struct Blas {
    driver: Arc<Driver>,
    handle: cublasLtHandle_t,
    workspace: u64,
    plans: Mutex<HashMap<Key, Plan>>,
}

// SAFETY: handle and descriptors may be used from any thread; plans are used under their lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl std::fmt::Debug for Blas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Blas")
    }
}

/// Bytes of workspace, as NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// Opens `libcublasLt.so.13`: from the search path, beside the executable, or where Python packages and toolkits keep it.
fn open_library() -> Result<(), CudaError> {
    const NAME: &str = "libcublasLt.so.13";
    let mut places: Vec<PathBuf> = vec![PathBuf::from(NAME)];
    if let Some(folder) = std::env::current_exe().ok().as_deref().and_then(std::path::Path::parent) {
        places.extend([folder.join(NAME), folder.join("../lib").join(NAME)]);
    }
    let mut roots: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    roots.push("/usr/local/cuda".into());
    roots.push("/usr/local/cuda-13.0".into());
    places.extend(roots.iter().flat_map(|root| [root.join("lib64").join(NAME), root.join("targets/x86_64-linux/lib").join(NAME)]));
    // lib/python3.N/{site,dist}-packages/nvidia/cu13/lib below the usual prefixes.
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    prefixes.extend(["/usr/local", "/usr", "/opt/conda", "/opt/venv"].map(PathBuf::from));
    for prefix in prefixes {
        let Ok(entries) = std::fs::read_dir(prefix.join("lib")) else { continue };
        let pythons = entries.flatten().map(|e| e.path()).filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3")));
        for packages in pythons.flat_map(|p| [p.join("site-packages"), p.join("dist-packages")]) {
            places.extend([packages.join("nvidia/cu13/lib").join(NAME), packages.join("nvidia/cublas/lib").join(NAME)]);
        }
    }
    for place in &places {
        if place.components().count() > 1 && !place.exists() {
            continue;
        }
        // SAFETY: NVIDIA's library; opening it runs its initialisers only.
        if let Ok(library) = unsafe { libloading::Library::new(place) } {
            // Stays open: cudarc then finds it by its name.
            std::mem::forget(library);
            return Ok(());
        }
    }
    let searched = places.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ");
    Err(CudaError::NoBlas { searched })
}

fn check(doing: &'static str, status: cublasStatus_t, detail: impl FnOnce() -> String) -> Result<(), CudaError> {
    if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS { Ok(()) } else { Err(CudaError::Blas { doing, status: format!("{status:?}"), detail: detail() }) }
}

fn data_type(kind: Kind) -> cudaDataType {
    match kind {
        Kind::F32 => cudaDataType::CUDA_R_32F,
        Kind::F16 => cudaDataType::CUDA_R_16F,
        Kind::Bf16 => cudaDataType::CUDA_R_16BF,
    }
}

fn alignment(pointer: u64) -> u32 {
    if pointer == 0 { 256 } else { 1 << pointer.trailing_zeros().min(8) }
}

impl Blas {
    pub(super) fn open(driver: Arc<Driver>) -> Result<Self, CudaError> {
        open_library()?;
        driver.bind();
        let mut handle = null_mut();
        // SAFETY: `handle` outlives the call.
        check("start", unsafe { sys::cublasLtCreate(&raw mut handle) }, String::new)?;
        let mut workspace = 0;
        // SAFETY: `workspace` outlives the call.
        super::driver::check("allocate a workspace", unsafe { cudarc::driver::sys::cuMemAlloc_v2(&raw mut workspace, WORKSPACE) })?;
        Ok(Self { driver, handle, workspace, plans: Mutex::default() })
    }

    /// Puts a product on the stream.
    ///
    /// # Safety
    /// The operands' addresses are valid for their sizes, and `c` overlaps neither `a` nor `b`.
    pub(super) unsafe fn run(&self, p: &Product) {
        if p.m == 0 || p.n == 0 {
            return;
        }
        self.driver.bind();
        let key = Key {
            sizes: (p.m, p.n, p.k),
            a: (p.a.stride, p.a.transposed, p.a.kind),
            b: (p.b.stride, p.b.transposed, p.b.kind),
            c: (p.c.stride, p.c.kind),
            accumulates: p.beta != 0.0,
            epilogue: p.epilogue,
            alignment: [alignment(p.a.pointer), alignment(p.b.pointer), alignment(p.c.pointer)],
        };
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(plan) => plan.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => place.insert(must(self.plan(&key, p))),
        };
        if p.epilogue != Epilogue::None {
            must(set_pointers(plan.description, p));
        }
        // cuBLAS is column-major: it computes cᵀ = bᵀ aᵀ.
        // SAFETY: as the caller vouches; descriptors, algorithm and workspace belong together.
        let multiply = || unsafe {
            sys::cublasLtMatmul(
                self.handle,
                plan.description,
                (&raw const p.alpha).cast(),
                p.b.pointer as *const c_void,
                plan.b,
                p.a.pointer as *const c_void,
                plan.a,
                (&raw const p.beta).cast(),
                p.c.pointer as *const c_void,
                plan.c,
                p.c.pointer as *mut c_void,
                plan.c,
                &raw const plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                self.driver.stream().cast(),
            )
        };
        let name = || {
            let letter = |operand: &Operand| if operand.transposed { 't' } else { 'n' };
            format!("product {} x {} x {} {}{} {:?}{}", p.m, p.n, p.k, letter(&p.a), letter(&p.b), p.epilogue, if p.beta == 0.0 { "" } else { " added" })
        };
        let status = self.driver.timed(name, multiply);
        must(check("multiply", status, || format!("{key:?}")));
    }

    fn plan(&self, key: &Key, p: &Product) -> Result<Plan, CudaError> {
        let detail = || format!("{key:?}");
        let mut description = null_mut();
        // SAFETY: `description` outlives the call.
        let status = unsafe { sys::cublasLtMatmulDescCreate(&raw mut description, cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType::CUDA_R_32F) };
        check("describe a product", status, detail)?;
        let transpose = |operand: &Operand| i32::from(operand.transposed);
        attribute(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transpose(&p.b))?;
        attribute(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &transpose(&p.a))?;
        let epilogue = match p.epilogue {
            Epilogue::None => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
            Epilogue::Bias => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            Epilogue::BiasGelu => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
        };
        attribute(description, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &(epilogue as u32))?;
        if p.epilogue != Epilogue::None {
            set_pointers(description, p)?;
        }
        let a = layout(&p.a, p.m, p.k)?;
        let b = layout(&p.b, p.k, p.n)?;
        let c = layout(&p.c, p.m, p.n)?;
        let mut preference = null_mut();
        // SAFETY: `preference` outlives the call.
        check("state a preference", unsafe { sys::cublasLtMatmulPreferenceCreate(&raw mut preference) }, detail)?;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let prefer = |attribute, value: *const c_void, size| {
            // SAFETY: `value` points to `size` bytes that outlive the call.
            let status = unsafe { sys::cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, size) };
            check("state a preference", status, detail)
        };
        let workspace = WORKSPACE;
        prefer(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), size_of::<usize>())?;
        // Partial sums are added in a fixed order (in the workspace, in f32), never in place by whoever comes first.
        let schemes = 2_u32;
        prefer(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const schemes).cast(), 4)?;
        for (attribute, alignment) in [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &key.alignment[1]),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &key.alignment[0]),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &key.alignment[2]),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &key.alignment[2]),
        ] {
            prefer(attribute, std::ptr::from_ref(alignment).cast(), 4)?;
        }
        let mut found = MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        let mut count = 0;
        // SAFETY: descriptors are valid, there is room for the one result that is asked for.
        let status = unsafe { sys::cublasLtMatmulAlgoGetHeuristic(self.handle, description, b, a, c, c, preference, 1, found.as_mut_ptr(), &raw mut count) };
        check("choose an algorithm", status, detail)?;
        // SAFETY: made above and used no more.
        check("drop a preference", unsafe { sys::cublasLtMatmulPreferenceDestroy(preference) }, detail)?;
        if count == 0 {
            return Err(CudaError::Blas { doing: "choose an algorithm", status: "none fits".into(), detail: detail() });
        }
        // SAFETY: zeroed before, and written by the heuristic.
        Ok(Plan { description, a, b, c, algorithm: unsafe { found.assume_init() }.algo })
    }
}

fn attribute<T>(description: cublasLtMatmulDesc_t, attribute: Attribute, value: &T) -> Result<(), CudaError> {
    // SAFETY: the value outlives the call and its size is given.
    let status = unsafe { sys::cublasLtMatmulDescSetAttribute(description, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) };
    check("describe a product", status, || format!("{attribute:?}"))
}

fn set_pointers(description: cublasLtMatmulDesc_t, p: &Product) -> Result<(), CudaError> {
    attribute(description, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias)?;
    if p.epilogue == Epilogue::BiasGelu {
        attribute(description, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &p.pre)?;
        attribute(description, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &(p.c.stride as i64))?;
    }
    Ok(())
}

/// Of a row-major matrix, which is its column-major transpose.
fn layout(operand: &Operand, rows: usize, columns: usize) -> Result<cublasLtMatrixLayout_t, CudaError> {
    let (rows, columns) = if operand.transposed { (columns, rows) } else { (rows, columns) };
    let mut layout = null_mut();
    // SAFETY: `layout` outlives the call.
    let status = unsafe { sys::cublasLtMatrixLayoutCreate(&raw mut layout, data_type(operand.kind), columns as u64, rows as u64, operand.stride as i64) };
    check("describe a matrix", status, || format!("{rows} x {columns}, {operand:?}"))?;
    Ok(layout)
}
