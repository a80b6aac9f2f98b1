//! How transfers tell how far they are.

/// Told about transfers; called from several tasks at a time.
pub trait Progress: Send + Sync {
    /// A transfer of `name` starts; `resumed` of its `size` bytes are there already.
    fn start(&self, name: &str, size: u64, resumed: u64) {
        let _ = (name, size, resumed);
    }

    /// `bytes` more of `name` have arrived.
    fn advance(&self, name: &str, bytes: u64) {
        let _ = (name, bytes);
    }

    /// What was counted for `name` is void: it starts again from nothing.
    fn restart(&self, name: &str) {
        let _ = name;
    }

    /// `name` is complete and verified.
    fn finish(&self, name: &str) {
        let _ = name;
    }
}

/// Tells nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {}
