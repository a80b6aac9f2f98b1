//! What keeps a pod from being created or from starting: reasons for the words of the API server and the kubelet.

use crate::reconcile::world::Warning;
use finetune_api::{PodsScheduledReason, RunningReason};

/// Why the API server refuses the pod, by what it says.
pub(super) fn refusal(note: &str) -> PodsScheduledReason {
    let has = |words: &str| note.contains(words);
    if has("exceeded quota") || has("failed quota") {
        PodsScheduledReason::QuotaExceeded
    } else if has("violates PodSecurity") || has("security context constraint") {
        PodsScheduledReason::PodSecurityViolation
    } else if has("admission webhook") || has("failed calling webhook") || has("ValidatingAdmissionPolicy") {
        PodsScheduledReason::AdmissionDenied
    } else if has("service account") && has("not found") {
        PodsScheduledReason::ServiceAccountNotFound
    } else if has("no PriorityClass with name") {
        PodsScheduledReason::PriorityClassNotFound
    } else if has("RuntimeClass") && has("not found") {
        PodsScheduledReason::RuntimeClassNotFound
    } else if LIMIT_RANGE.iter().any(|words| has(words)) {
        PodsScheduledReason::LimitRangeViolated
    } else {
        PodsScheduledReason::PodRejected
    }
}

/// What the LimitRanger says ("maximum memory usage per Container is 1Gi, but limit is 12Gi").
const LIMIT_RANGE: [&str; 6] = [
    " usage per Container is ",
    " usage per Pod is ",
    " usage per PersistentVolumeClaim is ",
    " max limit to request ratio per Container is ",
    " max limit to request ratio per Pod is ",
    "to request ratio per ",
];

/// Why a container cannot be created, by what the kubelet says of it.
pub(super) fn container(message: &str) -> RunningReason {
    named(message).unwrap_or(RunningReason::CreateContainerError)
}

/// Why a pod does not get as far as its container, by the event about it.
pub(super) fn start(warning: &Warning) -> RunningReason {
    match warning.reason.as_str() {
        "FailedCreatePodSandBox" | "NetworkNotReady" => RunningReason::PodSandboxFailed,
        _ => named(&warning.note).unwrap_or(RunningReason::VolumeMountFailed),
    }
}

/// A Secret or ConfigMap that is missing, or misses a key.
fn named(message: &str) -> Option<RunningReason> {
    let message = message.to_lowercase();
    let missing = ["not found", "couldn't find key", "non-existent"].iter().any(|words| message.contains(words));
    let kind = [("configmap", RunningReason::ConfigMapNotFound), ("secret", RunningReason::SecretNotFound)];
    kind.into_iter().find(|(kind, _)| missing && message.contains(kind)).map(|(_, reason)| reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_of_a_pod_has_its_reason() {
        use PodsScheduledReason as R;
        let cases = [
            (
                "pods \"a-train-0-\" is forbidden: exceeded quota: no-gpus, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=0, limited: requests.nvidia.com/gpu=0",
                R::QuotaExceeded,
            ),
            ("pods \"a-train-0-\" is forbidden: failed quota: q: must specify limits.cpu for: trainer", R::QuotaExceeded),
            ("pods \"a-train-0-x\" is forbidden: violates PodSecurity \"restricted:latest\": hostPath volumes", R::PodSecurityViolation),
            ("pods \"a-train-0-\" is forbidden: unable to validate against any security context constraint: [provider \"anyuid\"...]", R::PodSecurityViolation),
            ("pods \"a-train-0-x\" is forbidden: maximum memory usage per Container is 1Gi, but limit is 12Gi", R::LimitRangeViolated),
            ("pods \"a-train-0-x\" is forbidden: [minimum cpu usage per Container is 4, but request is 2]", R::LimitRangeViolated),
            ("pods \"a-train-0-x\" is forbidden: cpu max limit to request ratio per Container is 1, but provided ratio is 2.000000", R::LimitRangeViolated),
            ("admission webhook \"policy.example.com\" denied the request: image is not signed", R::AdmissionDenied),
            ("Internal error occurred: failed calling webhook \"policy.example.com\": connection refused", R::AdmissionDenied),
            ("pods \"a-train-0-x\" is forbidden: ValidatingAdmissionPolicy 'bars-users' with binding 'bars' denied request: no", R::AdmissionDenied),
            ("pods \"a-train-0-\" is forbidden: error looking up service account team-a/tpyo: serviceaccount \"tpyo\" not found", R::ServiceAccountNotFound),
            ("pods \"a-train-0-\" is forbidden: no PriorityClass with name tpyo was found", R::PriorityClassNotFound),
            ("pods \"a-train-0-\" is forbidden: pod rejected: RuntimeClass \"tpyo\" not found", R::RuntimeClassNotFound),
            ("Pod \"a-train-0-x\" is invalid: spec.tolerations[0].effect: Unsupported value", R::PodRejected),
        ];
        for (note, want) in cases {
            assert_eq!(refusal(note), want, "{note}");
        }
    }

    #[test]
    fn each_thing_that_keeps_a_pod_from_starting_has_its_reason() {
        use RunningReason as R;
        let cases = [
            ("FailedMount", "MountVolume.SetUp failed for volume \"config\" : configmap \"a-config-1\" not found", R::ConfigMapNotFound),
            ("FailedMount", "MountVolume.SetUp failed for volume \"ca\" : configmap references non-existent config key: ca.crt", R::ConfigMapNotFound),
            ("FailedMount", "MountVolume.SetUp failed for volume \"s\" : secret \"s3\" not found", R::SecretNotFound),
            ("FailedMount", "MountVolume.MountDevice failed for volume \"pvc-1\" : rpc error: code = Internal", R::VolumeMountFailed),
            ("FailedAttachVolume", "Multi-Attach error for volume \"pvc-1\" Volume is already used by pod(s) b-train-0-x", R::VolumeMountFailed),
            ("FailedCreatePodSandBox", "Failed to create pod sandbox: rpc error: code = Unknown desc = failed to get sandbox runtime", R::PodSandboxFailed),
        ];
        for (reason, note, want) in cases {
            assert_eq!(start(&Warning { reason: reason.into(), note: note.into() }), want, "{note}");
        }
        assert_eq!(container("couldn't find key AWS in Secret team-a/s3"), R::SecretNotFound);
        assert_eq!(container("configmap \"ca\" not found"), R::ConfigMapNotFound);
        assert_eq!(container("container has runAsNonRoot and image will run as root"), R::CreateContainerError);
    }
}
