//! CEL rules that several types share.

use kube::core::{Reason, Rule};

/// A block or field that stays as it was created. At the block itself: a rule further up that names it costs the API server a copy of the schemas of
/// all its neighbours, on every write of the status.
pub(super) fn immutable(name: &str) -> Rule {
    Rule::new("self == oldSelf").message(format!("{name} is immutable: create a job with a new name").as_str()).reason(Reason::FieldValueForbidden)
}
