//! From a location to a client of `object_store`, and from its errors to ours.

use std::path::Path;
use std::sync::Arc;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::HttpError;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::{Certificate, ClientOptions, ObjectStore, RetryConfig};

use super::env::Secrets;
use super::error::{Cause, Result, StoreError};
use super::http::{HttpFailure, RetryingConnector, chain};
use super::uri::Scheme;
use super::{AddressingStyle, StoreOptions};

/// A client for `bucket`. Settings come from `options`, then from the environment's `AWS_*`, `GOOGLE_*` or `AZURE_*`.
pub(super) fn connect(scheme: Scheme, bucket: &str, options: &StoreOptions) -> Result<Arc<dyn ObjectStore>> {
    // The process has one TLS provider; a second installation is refused and changes nothing.
    let _already_installed = rustls::crypto::ring::default_provider().install_default();
    let location = format!("{}://{bucket}/", scheme.as_str());
    let secrets = options.environment.secrets();
    let set_up = Setup { options, secrets: &secrets, location: &location };
    match scheme {
        Scheme::S3 => set_up.s3(bucket),
        Scheme::Gs => set_up.gs(bucket),
        Scheme::Az => set_up.az(bucket),
    }
}

/// A client for the directory `root`; keys are relative to it.
pub(super) fn directory(root: &Path) -> Result<Arc<dyn ObjectStore>> {
    let store = LocalFileSystem::new_with_prefix(root)
        .map_err(|error| classify(&error, "open", &root.display().to_string(), &super::env::Environment::from_pairs::<String, String>([]).secrets()))?;
    Ok(Arc::new(store.with_fsync(true)))
}

struct Setup<'a> {
    options: &'a StoreOptions,
    secrets: &'a Secrets,
    location: &'a str,
}

impl Setup<'_> {
    fn s3(&self, bucket: &str) -> Result<Arc<dyn ObjectStore>> {
        let mut builder = AmazonS3Builder::new();
        for (name, value) in self.options.environment.with_prefix("AWS_") {
            if let Ok(key) = name.to_ascii_lowercase().parse() {
                builder = builder.with_config(key, value);
            }
        }
        let endpoint = self.endpoint(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])?;
        let style = self.addressing_style(endpoint.as_deref())?;
        // object_store takes an endpoint as it is where the bucket's name belongs into the host.
        let endpoint = match (endpoint, style) {
            (Some(endpoint), Some(AddressingStyle::VirtualHost)) => Some(with_bucket_in_host(&endpoint, bucket)?),
            (endpoint, _) => endpoint,
        };
        if let Some(style) = style {
            builder = builder.with_virtual_hosted_style_request(style == AddressingStyle::VirtualHost);
        }
        if let Some(endpoint) = &endpoint {
            builder = builder.with_config("aws_endpoint_url_s3".parse().map_err(|error| self.failed(&error))?, endpoint).with_endpoint(endpoint);
        }
        if let Some(region) = self.options.region.as_deref().or_else(|| self.options.environment.get("AWS_REGION")) {
            builder = builder.with_region(region);
        }
        builder
            .with_bucket_name(bucket)
            // Many servers of the S3 protocol lack the bulk call; single deletes work everywhere.
            .with_disable_bulk_delete(true)
            .with_retry(Self::no_retries())
            .with_client_options(self.client_options(endpoint.as_deref(), "AWS_CA_BUNDLE")?)
            .with_http_connector(self.connector("AWS_CA_BUNDLE"))
            .build()
            .map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
            .map_err(|error| self.failed(&error))
    }

    fn gs(&self, bucket: &str) -> Result<Arc<dyn ObjectStore>> {
        let mut builder = GoogleCloudStorageBuilder::new();
        for (name, value) in self.options.environment.with_prefix("GOOGLE_") {
            if let Ok(key) = name.to_ascii_lowercase().parse() {
                builder = builder.with_config(key, value);
            }
        }
        let endpoint = self.endpoint(&["GOOGLE_BASE_URL"])?;
        if let Some(endpoint) = &endpoint {
            builder = builder.with_base_url(endpoint);
        }
        builder
            .with_bucket_name(bucket)
            .with_retry(Self::no_retries())
            .with_client_options(self.client_options(endpoint.as_deref(), "GOOGLE_CA_BUNDLE")?)
            .with_http_connector(self.connector("GOOGLE_CA_BUNDLE"))
            .build()
            .map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
            .map_err(|error| self.failed(&error))
    }

    fn az(&self, container: &str) -> Result<Arc<dyn ObjectStore>> {
        let mut builder = MicrosoftAzureBuilder::new();
        for (name, value) in self.options.environment.with_prefix("AZURE_") {
            if let Ok(key) = name.to_ascii_lowercase().parse() {
                builder = builder.with_config(key, value);
            }
        }
        let endpoint = self.endpoint(&["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"])?;
        if let Some(endpoint) = &endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        builder
            .with_container_name(container)
            .with_retry(Self::no_retries())
            .with_client_options(self.client_options(endpoint.as_deref(), "AZURE_CA_BUNDLE")?)
            .with_http_connector(self.connector("AZURE_CA_BUNDLE"))
            .build()
            .map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
            .map_err(|error| self.failed(&error))
    }

    /// Where the bucket's name goes. The variable of `object_store` speaks for Amazon's own endpoints; to one that a server of
    /// somebody else has, it would have requests sent without the bucket's name, so there the field decides.
    fn addressing_style(&self, endpoint: Option<&str>) -> Result<Option<AddressingStyle>> {
        const VARIABLE: &str = "AWS_VIRTUAL_HOSTED_STYLE_REQUEST";
        let asked =
            self.options.environment.get(VARIABLE).is_some_and(|value| !matches!(value.to_ascii_lowercase().as_str(), "0" | "false" | "off" | "no" | "n"));
        match (self.options.addressing_style, endpoint) {
            (None, Some(endpoint)) if asked => Err(StoreError::invalid(
                endpoint,
                format!(
                    "{VARIABLE} does not say whether the endpoint holds the bucket's name: unset it, and set storage.addressingStyle: VirtualHost with an \
                     endpoint without that name"
                ),
            )),
            (None, Some(_)) => Ok(Some(AddressingStyle::Path)),
            (style, _) => Ok(style),
        }
    }

    /// The endpoint: the job's, else the first of the variables `names` that is set; checked, without a trailing slash.
    fn endpoint(&self, names: &[&str]) -> Result<Option<String>> {
        let Some(endpoint) = self.options.endpoint.as_deref().or_else(|| names.iter().find_map(|name| self.options.environment.get(name))) else {
            return Ok(None);
        };
        let invalid = |problem: &str| StoreError::invalid(endpoint, format!("the storage endpoint {problem}"));
        let url = url::Url::parse(endpoint).map_err(|_| invalid("must be an address such as https://minio.storage:9000"))?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(invalid("must start with https:// (or http:// inside a trusted network)"));
        }
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
            return Err(invalid("must not hold credentials, a query or a fragment; set credentials in the environment"));
        }
        Ok(Some(endpoint.trim_end_matches('/').to_owned()))
    }

    /// Plain http only where the endpoint itself says so. Variables such as `AWS_ALLOW_HTTP` or
    /// `AWS_ALLOW_INVALID_CERTIFICATES` have no say: these options replace theirs.
    fn client_options(&self, endpoint: Option<&str>, ca_variable: &str) -> Result<ClientOptions> {
        let policy = &self.options.retry;
        let mut options = ClientOptions::new()
            .with_allow_http(endpoint.is_some_and(|endpoint| endpoint.starts_with("http://")))
            .with_connect_timeout(policy.connect_timeout)
            .with_read_timeout(policy.read_timeout)
            // Large bodies take as long as they take; the read timeout notices one that stands still.
            .with_timeout_disabled();
        let bundle = self.options.ca_bundle.clone().or_else(|| self.options.environment.get(ca_variable).map(Into::into));
        if let Some(path) = bundle {
            let pem = std::fs::read(&path).map_err(StoreError::local("read the CA bundle", &path))?;
            let certificates = Certificate::from_pem_bundle(&pem).map_err(|error| self.failed(&error))?;
            if certificates.is_empty() {
                return Err(StoreError::invalid(&path.display().to_string(), "the CA bundle holds no PEM certificate"));
            }
            for certificate in certificates {
                options = options.with_root_certificate(certificate);
            }
        }
        Ok(options)
    }

    /// `object_store` itself retries nothing: its loops around ours would multiply attempts and time.
    fn no_retries() -> RetryConfig {
        RetryConfig { max_retries: 0, ..RetryConfig::default() }
    }

    fn connector(&self, ca_variable: &'static str) -> RetryingConnector {
        RetryingConnector { policy: self.options.retry.clone(), secrets: self.secrets.clone(), ca_variable }
    }

    fn failed(&self, error: &object_store::Error) -> StoreError {
        StoreError::Setup { location: self.location.to_owned(), source: Cause(self.secrets.redact(&chain(error))) }
    }
}

/// The endpoint's address with the bucket's name in front of its host.
fn with_bucket_in_host(endpoint: &str, bucket: &str) -> Result<String> {
    let invalid = |problem: String| StoreError::invalid(endpoint, problem);
    let mut url = url::Url::parse(endpoint).map_err(|error| invalid(error.to_string()))?;
    let Some(url::Host::Domain(host)) = url.host() else {
        return Err(invalid("addressingStyle: VirtualHost needs a host name: no bucket can stand before an IP address".to_owned()));
    };
    let host = format!("{bucket}.{host}");
    let label = |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    let usable = bucket.split('.').all(label);
    if !usable || url.set_host(Some(&host)).is_err() || url.host_str() != Some(&host) {
        return Err(invalid(format!("addressingStyle: VirtualHost does not go with the bucket {bucket:?}: it cannot be part of a host's name")));
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

/// Finds the first cause of type `T`.
fn cause<'a, T: std::error::Error + 'static>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(current) = next {
        if let Some(found) = current.downcast_ref() {
            return Some(found);
        }
        next = current.source();
    }
    None
}

/// True when a create found the object there, or lost a race that the server reports as a conflict.
pub(super) fn is_conflict(error: &object_store::Error) -> bool {
    let refused = matches!(cause::<HttpFailure>(error), Some(HttpFailure::Status { status: 304 | 409 | 412, .. }));
    refused || matches!(error, object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. })
}

/// True when the object is no longer the one that was asked for (`If-Match`).
pub(super) fn is_changed(error: &object_store::Error) -> bool {
    let refused = matches!(cause::<HttpFailure>(error), Some(HttpFailure::Status { status: 412, .. }));
    refused || matches!(error, object_store::Error::Precondition { .. })
}

/// True when the server refused without saying why, other than for want of the object.
pub(super) fn is_unexplained(error: &object_store::Error) -> bool {
    matches!(cause::<HttpFailure>(error), Some(HttpFailure::Status { status, code, .. }) if code.is_empty() && matches!(status, 300..=399 | 400..=403 | 405..=499))
}

/// The error of a listing that names an object twice.
pub(super) fn endless_listing() -> object_store::Error {
    let message = "the server lists an object twice: its continuation tokens lead back to earlier pages".to_owned();
    object_store::Error::Generic { store: "bucket", source: Box::new(HttpFailure::Unusable { message }) }
}

/// True when the request may have been carried out, or may be when it is sent again.
pub(super) fn is_doubtful(error: &object_store::Error) -> bool {
    cause::<HttpFailure>(error).is_some_and(HttpFailure::is_doubtful)
}

/// True when the answer's head had arrived and its body broke off.
pub(super) fn is_cut_body(error: &object_store::Error) -> bool {
    cause::<HttpError>(error).is_some() && cause::<HttpFailure>(error).is_none()
}

/// Our error for one of `object_store`, cleaned of secrets.
pub(super) fn classify(error: &object_store::Error, operation: &'static str, location: &str, secrets: &Secrets) -> StoreError {
    use std::io::ErrorKind;

    let location = location.to_owned();
    if let Some(failure) = cause::<HttpFailure>(error) {
        return classify_failure(failure, operation, location);
    }
    let text = Cause(secrets.redact(&chain(error)));
    let io_kind = cause::<std::io::Error>(error).map(std::io::Error::kind);
    match (error, io_kind) {
        (object_store::Error::NotFound { .. }, _) | (_, Some(ErrorKind::NotFound | ErrorKind::NotADirectory)) => {
            StoreError::NotFound { operation, location, source: text }
        }
        (object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. }, _)
        | (_, Some(ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem)) => StoreError::PermissionDenied { operation, location, source: text },
        (object_store::Error::InvalidPath { .. }, _) => StoreError::InvalidLocation { location, problem: text.to_string() },
        (object_store::Error::Precondition { .. } | object_store::Error::NotModified { .. }, _) => StoreError::corrupt(location, "changed while it was read"),
        _ => StoreError::Unavailable { operation, location, source: text },
    }
}

/// Our error for an answer, or for none.
fn classify_failure(failure: &HttpFailure, operation: &'static str, location: String) -> StoreError {
    let mut source = Cause(failure.to_string());
    let HttpFailure::Status { status, code, message, .. } = failure else {
        return match failure {
            HttpFailure::NoCredentials { .. } => StoreError::PermissionDenied { operation, location, source },
            HttpFailure::Unusable { .. } => StoreError::Unusable { operation, location, source },
            HttpFailure::Status { .. } | HttpFailure::Transport { .. } => StoreError::Unavailable { operation, location, source },
        };
    };
    let skewed = code == "RequestTimeTooSkewed" || message.contains("request time and the");
    if skewed {
        source.0.push_str("; this machine's clock differs from the server's");
    }
    // S3, its imitations and the token services answer 400 to credentials that have expired, are malformed or of another time.
    let credentials = skewed || code.contains("Token") || code.contains("Credential") || code == "InvalidAccessKeyId" || code == "AccessDenied";
    match *status {
        404 | 410 => StoreError::NotFound { operation, location, source },
        401 | 403 => StoreError::PermissionDenied { operation, location, source },
        400 if credentials => StoreError::PermissionDenied { operation, location, source },
        301 | 307 | 308 => StoreError::InvalidLocation { location, problem: format!("{source}; set the bucket's region and endpoint") },
        400 if code == "AuthorizationHeaderMalformed" => StoreError::InvalidLocation { location, problem: format!("{source}; set the bucket's region") },
        // The server cannot read or do what is asked, whoever asks and whenever.
        400 | 405 | 411 | 501 | 505 if !failure.is_doubtful() => StoreError::Unusable { operation, location, source },
        _ => StoreError::Unavailable { operation, location, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(status: u16, code: &str, message: &str) -> StoreError {
        let failure = HttpFailure::Status { status, code: code.into(), message: message.into(), attempts: 1, elapsed: std::time::Duration::ZERO };
        classify_failure(&failure, "read", "s3://b/x".to_owned())
    }

    #[test]
    fn answers_are_told_apart_by_what_helps() {
        use super::super::StoreErrorKind::{InvalidLocation, NotFound, PermissionDenied, Unavailable};
        for (answer, code, kind) in [
            (404, "NoSuchKey", NotFound),
            (403, "AccessDenied", PermissionDenied),
            (400, "ExpiredToken", PermissionDenied),
            (400, "AuthorizationHeaderMalformed", InvalidLocation),
            (400, "InvalidRequest", InvalidLocation),
            (501, "NotImplemented", InvalidLocation),
            (400, "RequestTimeout", Unavailable),
            (503, "SlowDown", Unavailable),
            (409, "OperationAborted", Unavailable),
        ] {
            assert_eq!(status(answer, code, "").kind(), kind, "{answer} {code}");
        }
    }

    #[test]
    fn a_skewed_clock_is_named_whatever_the_servers_code() {
        for (answer, code, message) in [
            (403, "RequestTimeTooSkewed", ""),
            (400, "AccessDenied", "The difference between the request time and the server's time exceeds the maximum allowed."),
            (403, "AccessDenied", "The difference between the request time and the current time is too large."),
        ] {
            let error = status(answer, code, message);
            assert_eq!(error.kind(), super::super::StoreErrorKind::PermissionDenied);
            assert!(chain(&error).contains("this machine's clock"), "{error:?}");
        }
    }

    #[test]
    fn the_bucket_goes_in_front_of_the_hosts_name() {
        for (endpoint, address) in [
            ("https://oss-eu.example.com", "https://team.oss-eu.example.com"),
            ("http://localhost:9000", "http://team.localhost:9000"),
            ("http://team.example.com/path", "http://team.team.example.com/path"),
        ] {
            assert_eq!(with_bucket_in_host(endpoint, "team").unwrap(), address);
        }
        for (endpoint, bucket) in
            [("http://127.0.0.1:9000", "team"), ("http://[::1]:9000", "team"), ("http://localhost", "te_am"), ("http://localhost", "a..b")]
        {
            let made = with_bucket_in_host(endpoint, bucket);
            assert!(made.is_err(), "{made:?}");
        }
    }
}
