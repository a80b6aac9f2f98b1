//! Computing kernels: the only place for unsafe code.
