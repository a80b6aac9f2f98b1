//! Kueue's Workload, read only: what the queue says about our Job.

use kube::api::DynamicObject;
use serde_json::Value;

use finetune_api::AdmittedReason;

/// API group of Kueue.
pub const GROUP: &str = "kueue.x-k8s.io";

/// What matters of a Workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Its name.
    pub name: String,
    /// UID of the Job that it stands for.
    pub job_uid: String,
    /// Whether the Job may run.
    pub admitted: bool,
    /// What the queue says.
    pub reason: AdmittedReason,
    /// In its own words.
    pub message: String,
}

impl Workload {
    /// Reads a Workload that a Job owns; `None` for those of others.
    pub fn read(object: &DynamicObject) -> Option<Self> {
        let owner = object.metadata.owner_references.iter().flatten().find(|owner| owner.kind == "Job" && owner.api_version.starts_with("batch/"))?;
        let (admitted, reason, message) = judge(object.data.pointer("/status/conditions").and_then(Value::as_array).map_or(&[][..], Vec::as_slice));
        Some(Self { name: object.metadata.name.clone()?, job_uid: owner.uid.clone(), admitted, reason, message })
    }
}

/// The state that the conditions of a Workload describe.
fn judge(conditions: &[Value]) -> (bool, AdmittedReason, String) {
    let text = |condition: &Value, key: &str| condition.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let find = |type_: &str| conditions.iter().find(|condition| text(condition, "type") == type_);
    let is_true = |type_: &str| find(type_).is_some_and(|condition| text(condition, "status") == "True");
    if is_true("Evicted")
        && let Some(evicted) = find("Evicted")
    {
        let reason = if text(evicted, "reason") == "Preempted" { AdmittedReason::Preempted } else { AdmittedReason::Evicted };
        return (false, reason, text(evicted, "message"));
    }
    if is_true("Admitted") || (is_true("QuotaReserved") && find("Admitted").is_none()) {
        let message = find("Admitted").or_else(|| find("QuotaReserved")).map(|condition| text(condition, "message")).unwrap_or_default();
        return (true, AdmittedReason::QuotaReserved, message);
    }
    let message = find("QuotaReserved").map(|condition| text(condition, "message")).unwrap_or_default();
    (false, waiting_reason(&message), message)
}

/// Kueue tells why a Workload waits in words only.
fn waiting_reason(message: &str) -> AdmittedReason {
    let message = message.to_lowercase();
    let has = |words: &str| message.contains(words);
    if has("localqueue") && (has("doesn't exist") || has("not found")) {
        AdmittedReason::LocalQueueNotFound
    } else if has("maximum capacity") || has("exceeds") {
        AdmittedReason::ExceedsMaxQuota
    } else if has("doesn't match node affinity") || has("untolerated taint") || has("flavor") && has("not found") {
        AdmittedReason::NoMatchingFlavor
    } else {
        AdmittedReason::WaitingForQuota
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(conditions: &Value) -> Workload {
        let object: DynamicObject = serde_json::from_value(serde_json::json!({
            "apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "Workload",
            "metadata": {"name": "job-a-train-1f2e3", "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "a-train", "uid": "j1"}]},
            "status": {"conditions": conditions},
        }))
        .unwrap();
        Workload::read(&object).unwrap()
    }

    #[test]
    fn each_state_of_a_workload_has_its_reason() {
        let pending = |message: &str| serde_json::json!([{"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message}]);
        let cases = [
            (serde_json::json!([]), false, AdmittedReason::WaitingForQuota),
            (
                pending("couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor t4, 1 more needed"),
                false,
                AdmittedReason::WaitingForQuota,
            ),
            (
                pending(
                    "couldn't assign flavors to pod set main: insufficient quota for nvidia.com/gpu in flavor t4, previously considered podsets requests (0) + current podset request (2) > maximum capacity (1)",
                ),
                false,
                AdmittedReason::ExceedsMaxQuota,
            ),
            (pending("couldn't assign flavors to pod set main: flavor a10g doesn't match node affinity"), false, AdmittedReason::NoMatchingFlavor),
            (pending("LocalQueue team-a doesn't exist"), false, AdmittedReason::LocalQueueNotFound),
            (
                serde_json::json!([{"type": "QuotaReserved", "status": "True"}, {"type": "Admitted", "status": "True", "message": "The workload is admitted"}]),
                true,
                AdmittedReason::QuotaReserved,
            ),
            (serde_json::json!([{"type": "QuotaReserved", "status": "True"}, {"type": "Admitted", "status": "False"}]), false, AdmittedReason::WaitingForQuota),
            (
                serde_json::json!([{"type": "QuotaReserved", "status": "True"}, {"type": "Admitted", "status": "True"}, {"type": "Evicted", "status": "True", "reason": "Preempted"}]),
                false,
                AdmittedReason::Preempted,
            ),
            (
                serde_json::json!([{"type": "QuotaReserved", "status": "False"}, {"type": "Evicted", "status": "True", "reason": "InactiveWorkload"}]),
                false,
                AdmittedReason::Evicted,
            ),
            (
                serde_json::json!([{"type": "Admitted", "status": "True"}, {"type": "QuotaReserved", "status": "True"}, {"type": "Evicted", "status": "False", "reason": "Preempted"}]),
                true,
                AdmittedReason::QuotaReserved,
            ),
        ];
        for (conditions, admitted, reason) in cases {
            let seen = workload(&conditions);
            assert_eq!((seen.admitted, seen.reason), (admitted, reason), "{conditions}");
        }
        assert_eq!(workload(&serde_json::json!([])).job_uid, "j1");
    }

    #[test]
    fn workloads_of_others_are_not_ours() {
        let object: DynamicObject = serde_json::from_value(serde_json::json!({
            "apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "Workload",
            "metadata": {"name": "w", "ownerReferences": [{"apiVersion": "ray.io/v1", "kind": "RayJob", "name": "a", "uid": "r1"}]},
        }))
        .unwrap();
        assert_eq!(Workload::read(&object), None);
    }
}
