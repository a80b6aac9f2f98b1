//! Whether this process can do its work: the FineTuneJob resource is served, and of the namespaces that are watched at least one can be. A namespace
//! that is gone or forbidden stops nobody else; it is named here, in the log and in `finetune_watch_failing`.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::{Arc, Mutex, PoisonError};

use kube::runtime::watcher;

use crate::telemetry::metrics::Metrics;

/// Why something cannot be watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// 403.
    Forbidden,
    /// 404: the API server does not serve the kind.
    NotServed,
    /// Anything else, which may be over in a moment.
    Other(String),
}

impl Trouble {
    /// Of a failed request.
    pub fn of(error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::of_status(status),
            other => Self::Other(other.to_string()),
        }
    }

    /// Of a watch.
    pub fn of_watch(error: &watcher::Error) -> Self {
        match error {
            watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => Self::of(error),
            watcher::Error::WatchError(status) => Self::of_status(status),
            other @ watcher::Error::NoResourceVersion => Self::Other(other.to_string()),
        }
    }

    /// By its code: what the API server says of a kind that it does not know, "404 page not found", is no Status, and the reason that stands for it is kube's.
    fn of_status(status: &kube::core::Status) -> Self {
        match status.code {
            403 => Self::Forbidden,
            404 => Self::NotServed,
            _ => Self::Other(status.to_string()),
        }
    }

    /// Whether only a person can end it.
    fn is_refusal(&self) -> bool {
        !matches!(self, Self::Other(_))
    }
}

/// One watched namespace, or all of them.
#[derive(Debug, Default)]
struct Watched {
    synced: bool,
    /// Kinds that cannot be watched.
    troubles: BTreeMap<&'static str, Trouble>,
}

impl Watched {
    fn is_served(&self) -> bool {
        self.synced && !self.troubles.values().any(Trouble::is_refusal)
    }
}

#[derive(Debug, Default)]
struct State {
    resource_served: bool,
    leading: bool,
    /// By namespace; the empty name stands for all.
    watched: BTreeMap<String, Watched>,
}

/// What readiness depends on.
#[derive(Debug)]
pub struct Readiness {
    state: Mutex<State>,
    metrics: Arc<Metrics>,
}

impl Readiness {
    /// Nothing is known yet. What is noted here is in `metrics` too.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { state: Mutex::default(), metrics }
    }

    /// The FineTuneJob resource is (not) served by the API server. True where that is news.
    pub fn set_resource_served(&self, served: bool) -> bool {
        self.metrics.set_crd_missing(!served);
        std::mem::replace(&mut self.lock().resource_served, served) != served
    }

    /// This process holds the lease and fills the caches of these namespaces (one empty name: of all).
    pub fn lead(&self, namespaces: &[String]) {
        let mut state = self.lock();
        state.leading = true;
        for namespace in namespaces {
            state.watched.entry(namespace.clone()).or_default();
            self.metrics.set_watch_failing(namespace, false);
        }
    }

    /// Every cache of the namespace is filled.
    pub fn set_synced(&self, namespace: &str) {
        self.lock().watched.entry(namespace.to_owned()).or_default().synced = true;
    }

    /// `kind` cannot be watched.
    pub fn failed(&self, namespace: &str, kind: &'static str, trouble: Trouble) {
        self.lock().watched.entry(namespace.to_owned()).or_default().troubles.insert(kind, trouble);
        self.metrics.set_watch_failing(namespace, true);
    }

    /// `kind` can be watched again. True where it could not.
    pub fn recovered(&self, namespace: &str, kind: &'static str) -> bool {
        let mut state = self.lock();
        let Some(watched) = state.watched.get_mut(namespace) else { return false };
        let news = watched.troubles.remove(kind).is_some();
        if news && watched.troubles.is_empty() {
            self.metrics.set_watch_failing(namespace, false);
        }
        news
    }

    /// Kinds of the namespace that cannot be watched.
    pub fn troubles(&self, namespace: &str) -> Vec<&'static str> {
        self.lock().watched.get(namespace).map(|watched| watched.troubles.keys().copied().collect()).unwrap_or_default()
    }

    /// Whether the process is ready, and in words what is missing, also where it is ready.
    pub fn check(&self) -> (bool, String) {
        let state = self.lock();
        if !state.resource_served {
            return (false, "the API server does not serve finetunejobs.finetune.dev: install the CRD (finetune crd | kubectl apply -f -)\n".to_owned());
        }
        let missing: String = state.watched.iter().map(|(namespace, watched)| problems(namespace, watched)).collect();
        let ready = !state.leading || state.watched.values().any(Watched::is_served);
        (ready, if ready { format!("ok\n{missing}") } else { missing })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is missing in a namespace, a line each.
fn problems(namespace: &str, watched: &Watched) -> String {
    let mut troubles = String::new();
    for (kind, trouble) in &watched.troubles {
        let _infallible = writeln!(troubles, "{}", Problem { namespace, kind, trouble });
    }
    if troubles.is_empty() && !watched.synced { format!("{}: the caches are not filled yet\n", Scope(namespace)) } else { troubles }
}

/// A watched namespace by name, or all.
pub struct Scope<'a>(pub &'a str);

impl fmt::Display for Scope<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { f.write_str("all namespaces") } else { write!(f, "namespace {:?}", self.0) }
    }
}

/// What cannot be watched, why, and what to do.
pub struct Problem<'a> {
    /// Where; empty for all namespaces.
    pub namespace: &'a str,
    /// What.
    pub kind: &'a str,
    /// Why.
    pub trouble: &'a Trouble,
}

impl fmt::Display for Problem<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { namespace, kind, trouble } = self;
        write!(f, "{}: {kind} ", Scope(namespace))?;
        match trouble {
            Trouble::Forbidden if namespace.is_empty() && *kind == "nodes" => {
                f.write_str("may not be listed: bind the operator's ClusterRole, or start it with --watch-nodes=false")
            }
            Trouble::Forbidden if namespace.is_empty() => f.write_str("may not be listed: the operator's ClusterRole or its ClusterRoleBinding is missing"),
            Trouble::Forbidden => f.write_str(
                "may not be listed: the namespace is gone, or the operator's Role or RoleBinding in it is; make the namespace and upgrade the release, or take it \
                 out of watchNamespaces",
            ),
            Trouble::NotServed => f.write_str("are not served by the API server: install the CRD (finetune crd | kubectl apply -f -)"),
            Trouble::Other(error) => write!(f, "cannot be listed: {error}"),
        }
    }
}

/// Waits until the channel holds true; false if its other end is gone before. Unlike `Receiver::wait_for`, it keeps no guard, which may not cross threads.
pub(crate) async fn until(receiver: &mut tokio::sync::watch::Receiver<bool>) -> bool {
    while !*receiver.borrow_and_update() {
        if receiver.changed().await.is_err() {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readiness(namespaces: &[&str]) -> Readiness {
        let readiness = Readiness::new(Arc::new(Metrics::new()));
        readiness.set_resource_served(true);
        readiness.lead(&namespaces.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        readiness
    }

    fn api(code: u16, reason: &str) -> kube::Error {
        kube::Error::Api(Box::new(kube::core::Status { code, reason: reason.to_owned(), ..kube::core::Status::default() }))
    }

    #[test]
    fn readiness_needs_the_resource_and_a_leaders_caches() {
        let readiness = Readiness::new(Arc::new(Metrics::new()));
        assert!(!readiness.check().0, "the CRD is missing");
        assert!(readiness.set_resource_served(true), "that is news");
        assert!(!readiness.set_resource_served(true));
        assert!(readiness.check().0, "a standby is ready");
        readiness.lead(&[String::new()]);
        assert_eq!(readiness.check(), (false, "all namespaces: the caches are not filled yet\n".to_owned()));
        readiness.set_synced("");
        assert_eq!(readiness.check(), (true, "ok\n".to_owned()));
        readiness.set_resource_served(false);
        assert!(!readiness.check().0, "the CRD was deleted");
        readiness.set_resource_served(true);
        assert!(readiness.check().0, "and is back");
    }

    #[test]
    fn one_namespace_that_is_gone_is_named_and_stops_nobody_else() {
        let readiness = readiness(&["a", "b"]);
        readiness.failed("a", "finetunejobs", Trouble::of(&api(403, "Forbidden")));
        assert!(!readiness.check().0, "none is served yet");
        readiness.set_synced("b");
        let (ready, text) = readiness.check();
        assert!(ready && text.starts_with("ok\nnamespace \"a\": finetunejobs may not be listed: the namespace is gone"), "{text}");
        let metrics = readiness.metrics.encode().unwrap();
        assert!(metrics.contains("finetune_watch_failing{namespace=\"a\"} 1") && metrics.contains("finetune_watch_failing{namespace=\"b\"} 0"), "{metrics}");
        assert_eq!(readiness.troubles("a"), ["finetunejobs"]);
        assert!(readiness.recovered("a", "finetunejobs") && !readiness.recovered("a", "finetunejobs"));
        assert!(readiness.metrics.encode().unwrap().contains("finetune_watch_failing{namespace=\"a\"} 0"));
    }

    #[test]
    fn an_outage_of_the_api_server_is_no_reason_to_be_unready_and_a_refusal_is() {
        let readiness = readiness(&["a"]);
        readiness.set_synced("a");
        readiness.failed("a", "pods", Trouble::of(&kube::Error::LinesCodecMaxLineLengthExceeded));
        assert!(readiness.check().0, "the caches hold what they held");
        readiness.failed("a", "pods", Trouble::Forbidden);
        assert!(!readiness.check().0);
    }

    #[test]
    fn forbidden_and_missing_have_hints_of_their_own() {
        let text = |namespace: &str, kind: &str, error: &kube::Error| Problem { namespace, kind, trouble: &Trouble::of(error) }.to_string();
        assert!(text("a", "pods", &api(403, "Forbidden")).contains("Role or RoleBinding"));
        assert!(text("", "pods", &api(403, "Forbidden")).contains("ClusterRole"));
        assert!(text("", "nodes", &api(403, "Forbidden")).contains("--watch-nodes=false"));
        // What the API server says of a kind that it does not know is no Status.
        assert!(text("a", "finetunejobs", &api(404, "Failed to parse error data")).contains("install the CRD"));
        assert!(!text("a", "finetunejobs", &api(403, "Forbidden")).contains("CRD"));
        assert!(text("a", "pods", &api(500, "InternalError")).contains("cannot be listed"));
    }
}
