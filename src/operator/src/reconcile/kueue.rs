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
    /// The worker cluster that MultiKueue has given the Job to.
    pub cluster: Option<String>,
}

impl Workload {
    /// Reads a Workload that a Job owns; `None` for those of others.
    pub fn read(object: &DynamicObject) -> Option<Self> {
        let owner = object.metadata.owner_references.iter().flatten().find(|owner| owner.kind == "Job" && owner.api_version.starts_with("batch/"))?;
        let list = |pointer: &str| object.data.pointer(pointer).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let name = object.metadata.name.clone()?;
        let (admitted, reason, message) = if object.data.pointer("/spec/active") == Some(&Value::Bool(false)) {
            (false, AdmittedReason::WorkloadDeactivated, deactivated(&name, list("/status/conditions")))
        } else {
            judge(list("/status/conditions"), list("/status/admissionChecks"))
        };
        let cluster = object.data.pointer("/status/clusterName").and_then(Value::as_str).map(str::to_owned);
        Some(Self { name, job_uid: owner.uid.clone(), admitted, reason, message, cluster })
    }
}

fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn condition<'a>(conditions: &'a [Value], type_: &str) -> Option<&'a Value> {
    conditions.iter().find(|condition| text(condition, "type") == type_)
}

/// The state that the conditions of a Workload describe.
fn judge(conditions: &[Value], checks: &[Value]) -> (bool, AdmittedReason, String) {
    let find = |type_: &str| condition(conditions, type_);
    let is_true = |type_: &str| find(type_).filter(|condition| text(condition, "status") == "True");
    if let Some(evicted) = is_true("Evicted") {
        let reason = if text(evicted, "reason") == "Preempted" { AdmittedReason::Preempted } else { AdmittedReason::Evicted };
        return (false, reason, text(evicted, "message").to_owned());
    }
    if let Some(admitted) = is_true("Admitted") {
        return (true, AdmittedReason::QuotaReserved, text(admitted, "message").to_owned());
    }
    if is_true("QuotaReserved").is_some() {
        // Kueue admits at once where the queue has no checks: what is reserved and not admitted waits for them.
        return (false, AdmittedReason::AdmissionCheckPending, pending(checks));
    }
    let message = find("QuotaReserved").map(|condition| text(condition, "message")).unwrap_or_default();
    (false, waiting_reason(message), message.to_owned())
}

/// Which admission checks are not through, in Kueue's words.
fn pending(checks: &[Value]) -> String {
    let waiting = checks.iter().filter(|check| text(check, "state") != "Ready").map(|check| {
        let (name, state, message) = (text(check, "name"), text(check, "state"), text(check, "message"));
        if message.is_empty() { format!("{name:?} is {state}") } else { format!("{name:?} is {state}: {message}") }
    });
    let waiting: Vec<String> = waiting.collect();
    if waiting.is_empty() {
        "quota is reserved; the queue's admission checks are not through".to_owned()
    } else {
        format!("quota is reserved; admission check {}", waiting.join("; "))
    }
}

/// Why a Workload was given up, and how it is taken up again.
fn deactivated(name: &str, conditions: &[Value]) -> String {
    let cause = condition(conditions, "Evicted").or_else(|| condition(conditions, "Finished"));
    let cause = cause.map(|condition| format!(" ({}: {})", text(condition, "reason"), text(condition, "message"))).unwrap_or_default();
    format!(
        "Kueue has deactivated Workload {name:?}{cause}; nothing starts until: kubectl patch workload {name} --type=merge -p '{{\"spec\":{{\"active\":true}}}}'"
    )
}

/// Kueue gives the reason why a Workload waits in words only.
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
        read(&serde_json::json!({"conditions": conditions}), true)
    }

    fn read(status: &Value, active: bool) -> Workload {
        let object: DynamicObject = serde_json::from_value(serde_json::json!({
            "apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "Workload",
            "metadata": {"name": "job-a-train-1f2e3", "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "a-train", "uid": "j1"}]},
            "spec": {"active": active},
            "status": status,
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
            (
                serde_json::json!([{"type": "QuotaReserved", "status": "True"}, {"type": "Admitted", "status": "False"}]),
                false,
                AdmittedReason::AdmissionCheckPending,
            ),
            (serde_json::json!([{"type": "QuotaReserved", "status": "True"}]), false, AdmittedReason::AdmissionCheckPending),
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
    fn admission_checks_that_are_not_through_are_named() {
        let reserved = |checks: Value| read(&serde_json::json!({"conditions": [{"type": "QuotaReserved", "status": "True"}], "admissionChecks": checks}), true);
        let seen = reserved(serde_json::json!([
            {"name": "budget", "state": "Ready"},
            {"name": "nodes", "state": "Pending", "message": "waits for ProvisioningRequest"},
            {"name": "other-cluster", "state": "Retry"},
        ]));
        assert_eq!(seen.message, "quota is reserved; admission check \"nodes\" is Pending: waits for ProvisioningRequest; \"other-cluster\" is Retry");
        assert!(!seen.admitted);
        assert!(reserved(serde_json::json!([])).message.contains("checks are not through"));
        // MultiKueue of Kueue 0.15, while the worker cluster has no quota yet, and once it has.
        let check = |state: &str| serde_json::json!([{"name": "multikueue", "state": state, "message": "The workload got reservation on \"worker1\""}]);
        assert_eq!(reserved(check("Pending")).cluster, None);
        let given = read(
            &serde_json::json!({
                "conditions": [{"type": "QuotaReserved", "status": "True"}, {"type": "Admitted", "status": "True"}], "admissionChecks": check("Ready"), "clusterName": "worker1",
            }),
            true,
        );
        assert_eq!((given.admitted, given.cluster.as_deref()), (true, Some("worker1")));
    }

    #[test]
    fn a_workload_that_was_given_up_says_how_it_is_taken_up_again() {
        let evicted =
            serde_json::json!({"conditions": [{"type": "Evicted", "status": "True", "reason": "DeactivatedDueToRequeuingLimitExceeded", "message": "m"}]});
        let seen = read(&evicted, false);
        assert_eq!((seen.admitted, seen.reason), (false, AdmittedReason::WorkloadDeactivated));
        assert!(seen.message.contains("(DeactivatedDueToRequeuingLimitExceeded: m)") && seen.message.contains("kubectl patch workload job-a-train-1f2e3"));
        assert_eq!(read(&evicted, true).reason, AdmittedReason::Evicted);
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
