//! Create-if-absent, on which claims rest: one winner, and a look whether the server keeps to it.

use bytes::Bytes;
use object_store::{ObjectStore, PutMode, PutOptions};

use super::error::{Cause, Result, StoreError};
use super::{Created, Store, Target, backend, retry};

fn only_if_absent() -> PutOptions {
    PutOptions { mode: PutMode::Create, ..PutOptions::default() }
}

impl Store {
    /// Writes an object only if there is none. Of any number of concurrent creators one gets [`Created::Yes`].
    ///
    /// When an answer is lost, the object is read back and compared: so `data` must differ between creators (hold a random
    /// name, say) where it matters who won.
    ///
    /// # Errors
    /// See [`StoreErrorKind`](super::StoreErrorKind).
    pub async fn create(&self, key: &str, data: impl Into<Bytes>) -> Result<Created> {
        let data = data.into();
        let path = self.path(key)?;
        let backend = self.backend_for_writing()?;
        let mut attempts = retry::Attempts::new(&self.connection.retry);
        // An earlier attempt of ours may have been carried out although its answer was an error.
        let mut doubtful = false;
        loop {
            let Err(error) = backend.put_opts(&path, data.clone().into(), only_if_absent()).await else { return Ok(Created::Yes) };
            if backend::is_conflict(&error) {
                if doubtful {
                    match self.get(key).await {
                        Ok(found) => return Ok(if found == data { Created::Yes } else { Created::AlreadyExists }),
                        Err(error) if error.is_not_found() => {}
                        Err(error) => return Err(error),
                    }
                } else if self.head(key).await?.is_some() {
                    return Ok(Created::AlreadyExists);
                }
                // A conflict without an object: another writer's create is under way, or was undone.
            } else if backend::is_doubtful(&error) {
                doubtful = true;
            } else {
                return Err(self.failed(&error, "create", key));
            }
            let Some(delay) = attempts.next_delay(None) else { return Err(self.failed(&error, "create", key)) };
            tracing::warn!(object = %self.uri_of(key), attempt = attempts.made(), "retrying a conditional create");
            tokio::time::sleep(delay).await;
        }
    }

    /// Checks that the server refuses to create what exists: several servers of the S3 protocol accept the condition and ignore
    /// it. `key` must hold `data`, which is sent again, so that such a server changes nothing by it.
    ///
    /// # Errors
    /// [`StoreError::Unusable`] when the server does not refuse; those of [`StoreErrorKind`](super::StoreErrorKind) when it cannot be asked.
    pub(super) async fn check_creates_are_conditional(&self, key: &str, data: impl Into<Bytes>) -> Result<()> {
        // A directory's hard links and O_EXCL are the kernel's.
        if let Target::Directory { .. } = self.connection.target {
            return Ok(());
        }
        let (path, data, backend) = (self.path(key)?, data.into(), self.backend_for_writing()?);
        let mut attempts = retry::Attempts::new(&self.connection.retry);
        loop {
            let error = match backend.put_opts(&path, data.clone().into(), only_if_absent()).await {
                Ok(_) => {
                    let problem = "it carried out a conditional create (If-None-Match: *) of an object that exists: two attempts on one job would both \
                                   believe that they are alone. Use a server that knows conditional writes";
                    return Err(StoreError::Unusable { operation: "claim", location: self.uri().to_owned(), source: Cause(problem.to_owned()) });
                }
                Err(error) if backend::is_conflict(&error) => return Ok(()),
                Err(error) => error,
            };
            let delay = if backend::is_doubtful(&error) { attempts.next_delay(None) } else { None };
            let Some(delay) = delay else { return Err(self.failed(&error, "create", key)) };
            tokio::time::sleep(delay).await;
        }
    }
}
