//! What can go wrong with a store, without secrets.

use std::path::PathBuf;

/// The classes of failure that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// The location, endpoint, key or a `--bucket` mapping is malformed, the region is wrong, or the server does not do what is needed:
    /// nothing helps but another spec.
    InvalidLocation,
    /// The object, bucket or directory does not exist.
    NotFound,
    /// No credentials, credentials that are refused or expired, or too few rights.
    PermissionDenied,
    /// The server cannot be reached, is overloaded, or kept failing for the whole retry budget.
    Unavailable,
    /// The content is not what its digest, size or format promises, or changed while it was read.
    Corrupt,
    /// A newer attempt has taken over; this one must stop and delete nothing.
    Superseded,
    /// Another run is at work at the same place.
    InUse,
    /// This machine's own disk failed (full, read-only, ...).
    LocalDisk,
}

/// Text of a failure below this module. It is a string on purpose: the errors of HTTP clients and object stores may carry
/// signed addresses, tokens and whole response bodies; this one has been cut and cleaned by `Secrets::redact`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Cause(pub(super) String);

/// A failure of a store. Its text names the location and never a secret.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A URI, endpoint or bucket mapping that cannot be used.
    #[error("invalid storage location {location}: {problem}")]
    InvalidLocation {
        /// The location, without user information, query and fragment.
        location: String,
        /// What is wrong and what to write instead.
        problem: String,
    },
    /// A key that is not a clean relative path.
    #[error("invalid object key {key:?}: {problem}")]
    InvalidKey {
        /// The key as given.
        key: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// Client set-up failed: credentials that do not parse, a CA bundle that cannot be read.
    #[error("failed to set up access to {location}")]
    Setup {
        /// The URI prefix.
        location: String,
        /// What the client said.
        #[source]
        source: Cause,
    },
    /// The object, bucket or directory does not exist.
    #[error("failed to {operation} {location}: not found")]
    NotFound {
        /// What was tried.
        operation: &'static str,
        /// URI of the object or prefix.
        location: String,
        /// What the server said.
        #[source]
        source: Cause,
    },
    /// Refused by the server.
    #[error("failed to {operation} {location}: permission denied")]
    PermissionDenied {
        /// What was tried.
        operation: &'static str,
        /// URI of the object or prefix.
        location: String,
        /// What the server said.
        #[source]
        source: Cause,
    },
    /// The server did not do its part within the retry budget.
    #[error("failed to {operation} {location}: storage unavailable")]
    Unavailable {
        /// What was tried.
        operation: &'static str,
        /// URI of the object or prefix.
        location: String,
        /// The last failure, with attempts and time spent.
        #[source]
        source: Cause,
    },
    /// The server, or the connection to it, does not do what is needed, and will not at the next attempt either.
    #[error("failed to {operation} {location}: the server cannot be used as it is set up")]
    Unusable {
        /// What was tried.
        operation: &'static str,
        /// URI of the object or prefix.
        location: String,
        /// What is missing, and what to do.
        #[source]
        source: Cause,
    },
    /// Content that is not what it should be.
    #[error("{location} is damaged: {problem}")]
    Corrupt {
        /// URI of the object.
        location: String,
        /// What does not match.
        problem: String,
    },
    /// A newer claim exists.
    #[error("attempt {epoch} on {location} has been superseded by attempt {newest}")]
    Superseded {
        /// URI of the claimed prefix.
        location: String,
        /// This attempt's epoch.
        epoch: u64,
        /// The highest epoch found.
        newest: u64,
    },
    /// Another run holds the prefix.
    #[error("{location} is in use by {holder}: two jobs cannot share an output.uri; choose another one, or wait until that job has ended")]
    InUse {
        /// URI of the claimed prefix.
        location: String,
        /// The other run.
        holder: String,
    },
    /// A file of this machine.
    #[error("failed to {operation} {}", path.display())]
    LocalDisk {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
}

impl StoreError {
    /// The class of this failure.
    pub fn kind(&self) -> StoreErrorKind {
        match self {
            Self::InvalidLocation { .. } | Self::InvalidKey { .. } | Self::Setup { .. } | Self::Unusable { .. } => StoreErrorKind::InvalidLocation,
            Self::NotFound { .. } => StoreErrorKind::NotFound,
            Self::PermissionDenied { .. } => StoreErrorKind::PermissionDenied,
            Self::Unavailable { .. } => StoreErrorKind::Unavailable,
            Self::Corrupt { .. } => StoreErrorKind::Corrupt,
            Self::Superseded { .. } => StoreErrorKind::Superseded,
            Self::InUse { .. } => StoreErrorKind::InUse,
            Self::LocalDisk { .. } => StoreErrorKind::LocalDisk,
        }
    }

    /// True when the object, bucket or directory does not exist.
    pub fn is_not_found(&self) -> bool {
        self.kind() == StoreErrorKind::NotFound
    }

    pub(super) fn invalid(location: &str, problem: impl Into<String>) -> Self {
        Self::InvalidLocation { location: super::uri::without_secrets(location), problem: problem.into() }
    }

    pub(super) fn corrupt(location: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Corrupt { location: location.into(), problem: problem.into() }
    }

    pub(super) fn local(operation: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::LocalDisk { operation, path, source }
    }
}

/// Results of this module.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;
