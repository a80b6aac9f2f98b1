//! Storage URIs, keys, and directories that stand in for buckets.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::error::{Result, StoreError};

/// A provider's protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheme {
    /// `s3://bucket/prefix/`: Amazon S3 and what speaks its protocol.
    S3,
    /// `gs://bucket/prefix/`: Google Cloud Storage.
    Gs,
    /// `az://container/prefix/`: Azure Blob Storage; the account comes from the environment.
    Az,
}

impl Scheme {
    /// The scheme's name in a URI.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gs => "gs",
            Self::Az => "az",
        }
    }
}

/// A parsed storage location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A bucket (or container) and a prefix without leading and trailing `/`.
    Bucket {
        /// The protocol.
        scheme: Scheme,
        /// Bucket or container.
        bucket: String,
        /// Clean key prefix; empty for the whole bucket.
        prefix: String,
    },
    /// An absolute directory of this machine.
    Directory(PathBuf),
}

const HELP: &str = "write s3://bucket/prefix/, gs://bucket/prefix/, az://container/prefix/, file:///directory/ or a directory";

impl Location {
    /// Parses a URI or a directory. A relative directory is taken from the current one.
    ///
    /// # Errors
    /// [`StoreError::InvalidLocation`] for other schemes, a missing bucket, `user:password@`, a query or fragment (presigned
    /// addresses hold secrets), and prefixes with empty, `.` or `..` segments.
    pub fn parse(uri: &str) -> Result<Self> {
        let Some((scheme, rest)) = uri.split_once("://") else {
            if uri.is_empty() || uri.contains('\0') {
                return Err(StoreError::invalid(uri, HELP));
            }
            return std::path::absolute(uri).map(Self::Directory).map_err(StoreError::local("resolve", Path::new(uri)));
        };
        if uri.len() > 2048 {
            return Err(StoreError::invalid(&uri[..uri.floor_char_boundary(80)], "longer than 2048 bytes"));
        }
        if let Some(c) = rest.chars().find(|c| matches!(c, '@' | '?' | '#')) {
            return Err(StoreError::invalid(
                uri,
                format!("{c:?} is not allowed: credentials and signed queries do not belong into a URI; set them in the environment"),
            ));
        }
        let scheme = match scheme {
            "s3" => Scheme::S3,
            "gs" => Scheme::Gs,
            "az" => Scheme::Az,
            "file" => {
                let path =
                    url::Url::parse(uri).ok().filter(|url| url.host_str().is_none_or(|host| host == "localhost")).and_then(|url| url.to_file_path().ok());
                return path.map(Self::Directory).ok_or_else(|| StoreError::invalid(uri, "a file URI has three slashes: file:///directory/"));
            }
            _ => return Err(StoreError::invalid(uri, format!("unknown scheme {scheme:?}; {HELP}"))),
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let bucket_ok = (1..=222).contains(&bucket.len()) && bucket.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.$".contains(&b));
        if !bucket_ok || bucket.starts_with('.') {
            return Err(StoreError::invalid(uri, format!("{bucket:?} is no bucket name; {HELP}")));
        }
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        if !prefix.is_empty() {
            check_key(prefix).map_err(|error| StoreError::invalid(uri, error.to_string()))?;
        }
        Ok(Self::Bucket { scheme, bucket: bucket.to_owned(), prefix: prefix.to_owned() })
    }
}

/// A URI that may be shown: user information, query and fragment replaced by `***`.
pub(super) fn without_secrets(uri: &str) -> String {
    let (head, rest) = uri.split_once("://").map_or(("", uri), |(scheme, rest)| (&uri[..scheme.len() + 3], rest));
    let (body, tail) = rest.find(['?', '#']).map_or((rest, ""), |at| (&rest[..at], "***"));
    let body = body.rfind('@').map_or_else(|| body.to_owned(), |at| format!("***{}", &body[at..]));
    let mark = if tail.is_empty() { String::new() } else { rest[rest.len().min(rest.find(['?', '#']).unwrap_or(0))..].chars().take(1).collect() };
    format!("{head}{body}{mark}{tail}")
}

/// Checks that `key` is a clean relative path: `/`-separated, no empty, `.` or `..` segment, no control characters, at most
/// 1024 bytes.
///
/// # Errors
/// [`StoreError::InvalidKey`].
pub fn check_key(key: &str) -> Result<()> {
    let problem = if key.is_empty() {
        "empty"
    } else if key.len() > 1024 {
        "longer than 1024 bytes"
    } else if key.starts_with('/') || key.ends_with('/') {
        "starts or ends with a slash"
    } else if key.chars().any(char::is_control) {
        "holds a control character"
    } else if key.split('/').any(str::is_empty) {
        "has an empty segment"
    } else if key.split('/').any(|segment| matches!(segment, "." | "..")) {
        "has a segment \".\" or \"..\""
    } else {
        return Ok(());
    };
    Err(StoreError::InvalidKey { key: key.to_owned(), problem })
}

/// Directories that stand in for buckets: `--bucket s3://NAME=DIR`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buckets {
    directories: BTreeMap<(Scheme, String), PathBuf>,
}

impl Buckets {
    /// Parses mappings of the form `s3://NAME=DIR` (also `gs://`, `az://`). The directory must exist.
    ///
    /// # Errors
    /// [`StoreError::InvalidLocation`] naming the mapping and what is wrong with it.
    pub fn parse<S: AsRef<str>>(mappings: &[S]) -> Result<Self> {
        let mut directories = BTreeMap::new();
        for mapping in mappings {
            let mapping = mapping.as_ref();
            let invalid = |problem: String| StoreError::invalid(mapping, problem);
            let (uri, directory) = mapping.split_once('=').ok_or_else(|| invalid("write s3://NAME=DIRECTORY".to_owned()))?;
            let Location::Bucket { scheme, bucket, prefix } = Location::parse(uri)? else {
                return Err(invalid("the left side must be a bucket, such as s3://NAME".to_owned()));
            };
            if !prefix.is_empty() {
                return Err(invalid("map the whole bucket, without a prefix".to_owned()));
            }
            let path = std::fs::canonicalize(directory).map_err(StoreError::local("open the bucket directory", Path::new(directory)))?;
            if !path.is_dir() {
                return Err(invalid(format!("{directory} is not a directory")));
            }
            if directories.insert((scheme, bucket), path).is_some() {
                return Err(invalid("the bucket is mapped twice".to_owned()));
            }
        }
        Ok(Self { directories })
    }

    /// The directory that stands in for a bucket.
    pub fn directory(&self, scheme: Scheme, bucket: &str) -> Option<&Path> {
        self.directories.get(&(scheme, bucket.to_owned())).map(PathBuf::as_path)
    }

    /// The buckets that have a directory.
    pub fn names(&self) -> impl Iterator<Item = (Scheme, &str)> {
        self.directories.keys().map(|(scheme, bucket)| (*scheme, bucket.as_str()))
    }

    /// True when no bucket is mapped.
    pub fn is_empty(&self) -> bool {
        self.directories.is_empty()
    }
}

/// Whether two endpoints are one server, reached in the same way. An address that cannot be read is nobody's.
pub fn same_server(a: Option<&str>, b: Option<&str>) -> bool {
    let address = |text: &str| url::Url::parse(text.trim_end_matches('/')).ok();
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => address(a).is_some_and(|a| address(b) == Some(a)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(scheme: Scheme, bucket: &str, prefix: &str) -> Location {
        Location::Bucket { scheme, bucket: bucket.into(), prefix: prefix.into() }
    }

    #[test]
    fn buckets_prefixes_and_directories_are_told_apart() {
        for (uri, want) in [
            ("s3://models", bucket(Scheme::S3, "models", "")),
            ("s3://models/", bucket(Scheme::S3, "models", "")),
            ("gs://b/a b/ü", bucket(Scheme::Gs, "b", "a b/ü")),
            ("az://container/p/q/", bucket(Scheme::Az, "container", "p/q")),
            ("file:///data/with%20space/", Location::Directory("/data/with space/".into())),
            ("/data/x", Location::Directory("/data/x".into())),
        ] {
            assert_eq!(Location::parse(uri).unwrap(), want, "{uri}");
        }
        assert!(matches!(Location::parse("relative/dir").unwrap(), Location::Directory(path) if path.is_absolute()));
    }

    #[test]
    fn unusable_uris_are_refused_and_their_secrets_are_not_shown() {
        for uri in [
            "",
            "s3://",
            "s3:///key",
            "s3://b//a",
            "s3://b/../a",
            "s3://b/a/./c",
            "s3://.b/a",
            "ftp://host/a",
            "https://host/a",
            "file://host/a",
            "s3://b/a\nb",
            "s3://user:pass@b/a",
            "s3://b/a?X-Amz-Signature=pass",
            "gs://b/a#pass",
        ] {
            let error = Location::parse(uri).unwrap_err().to_string();
            assert!(!error.contains("pass"), "{error}");
        }
    }

    #[test]
    fn keys_stay_below_their_prefix() {
        for key in ["a", "a/b c/ü.png", "..a/b..", "a#1.png", "a%2Fb"] {
            check_key(key).unwrap();
        }
        for key in ["", "/a", "a/", "a//b", "a/../b", "..", "./a", "a\0b", "a\nb"] {
            assert!(check_key(key).is_err(), "{key:?}");
        }
    }

    #[test]
    fn mappings_need_a_whole_bucket_and_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        let buckets = Buckets::parse(&[format!("s3://one={path}"), format!("gs://one={path}")]).unwrap();
        assert!(buckets.directory(Scheme::S3, "one").is_some());
        assert!(buckets.directory(Scheme::Az, "one").is_none());
        for bad in ["s3://one".to_owned(), format!("s3://one/prefix={path}"), format!("{path}={path}"), "s3://one=/no/such/directory".to_owned()] {
            assert!(Buckets::parse(&[&bad]).is_err(), "{bad}");
        }
        assert!(Buckets::parse(&[format!("s3://one={path}"), format!("s3://one={path}")]).is_err());
    }
}
