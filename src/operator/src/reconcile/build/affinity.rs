//! Node affinity of the GPU class that a job asks for.
//!
//! Terms are ORed. The first ones are those of NVIDIA's GPU Feature Discovery (GFD); clouds whose nodes carry other labels, or get them too late for
//! scaling up from nothing, come from the operator's configuration ([`NodeClass`]). Each term is ANDed with each of the user's own terms.

use k8s_openapi::api::core::v1::{Affinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm};
use serde::{Deserialize, Serialize};

use finetune_api::{GpuSpec, SchedulingSpec};

/// GFD's label with the memory of the GPU in MiB.
const GFD_MEMORY: &str = "nvidia.com/gpu.memory";
/// Labels that tell of a GPU shared by several pods, with the values that mean so.
const SHARED: [(&str, [&str; 2]); 2] =
    [("nvidia.com/gpu.sharing-strategy", ["time-slicing", "mps"]), ("cloud.google.com/gke-gpu-sharing-strategy", ["time-sharing", "mps"])];

/// Nodes that GPU Feature Discovery has not labelled.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeClass {
    /// Label that holds the memory of the node's GPU in MiB; bounded by the job's `minMemoryMiB` and `maxMemoryMiB`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_label: Option<String>,
    /// Memory of the GPU in MiB where there is no such label: the class is left out for jobs whose bounds exclude it.
    #[serde(default = "sixteen_gib", rename = "memoryMiB")]
    pub memory_mib: u32,
    /// Lowest compute capability among the nodes of the class; it is left out for jobs that need more.
    #[serde(default = "turing")]
    pub compute_capability: String,
    /// What else a node of the class has.
    #[serde(default)]
    pub match_expressions: Vec<NodeSelectorRequirement>,
}

fn sixteen_gib() -> u32 {
    16_384
}

fn turing() -> String {
    "7.5".to_owned()
}

/// Why a list of node classes cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NodeClassError {
    /// The class would match every node.
    #[error("nodeAffinityTerms[{index}] matches any node: set matchExpressions or memoryLabel")]
    Empty {
        /// Position in the list, from 0.
        index: usize,
    },
    /// Not MAJOR.MINOR.
    #[error("nodeAffinityTerms[{index}].computeCapability is {value:?}, which is not like \"7.5\"")]
    ComputeCapability {
        /// Position in the list, from 0.
        index: usize,
        /// As given.
        value: String,
    },
}

/// Checks a list of node classes as read from a file.
pub fn check_node_classes(classes: &[NodeClass]) -> Result<(), NodeClassError> {
    for (index, class) in classes.iter().enumerate() {
        if class.memory_label.is_none() && class.match_expressions.is_empty() {
            return Err(NodeClassError::Empty { index });
        }
        if capability(&class.compute_capability).is_none() {
            return Err(NodeClassError::ComputeCapability { index, value: class.compute_capability.clone() });
        }
    }
    Ok(())
}

/// Label of a node's processor architecture.
const ARCHITECTURE: &str = "kubernetes.io/arch";

/// The pod's affinity: the user's own, with the terms of the GPU class and the `architectures` of the image added. CPU jobs (`perReplica: 0`) have no class.
pub fn affinity(scheduling: &SchedulingSpec, classes: &[NodeClass], architectures: &[String]) -> Option<Affinity> {
    let user = scheduling.affinity.as_ref();
    let architecture = (!architectures.is_empty() && !names_architecture(scheduling)).then(|| requirement(ARCHITECTURE, "In", architectures));
    let mut added = if scheduling.gpu.per_replica == 0 { vec![term(Vec::new())] } else { gpu_terms(&scheduling.gpu, classes) };
    for term in &mut added {
        term.match_expressions.get_or_insert_default().extend(architecture.iter().cloned());
    }
    // An empty term matches no node at all.
    if added.iter().all(|term| term.match_expressions.as_ref().is_none_or(Vec::is_empty)) {
        return user.cloned();
    }
    let mut affinity = user.cloned().unwrap_or_default();
    let node_affinity = affinity.node_affinity.get_or_insert_default();
    let user_terms = node_affinity.required_during_scheduling_ignored_during_execution.take().map(|selector| selector.node_selector_terms).unwrap_or_default();
    let terms = if user_terms.is_empty() { added } else { user_terms.iter().flat_map(|user| added.iter().map(|added| and(user, added))).collect() };
    node_affinity.required_during_scheduling_ignored_during_execution = Some(NodeSelector { node_selector_terms: terms });
    Some(affinity)
}

/// Whether the user has decided about the architecture.
fn names_architecture(scheduling: &SchedulingSpec) -> bool {
    let required =
        scheduling.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref()?.required_during_scheduling_ignored_during_execution.as_ref());
    let mut expressions = required.into_iter().flat_map(|selector| &selector.node_selector_terms).flat_map(|term| term.match_expressions.iter().flatten());
    scheduling.node_selector.contains_key(ARCHITECTURE) || expressions.any(|expression| expression.key == ARCHITECTURE)
}

/// The terms of the GPU class alone.
fn gpu_terms(gpu: &GpuSpec, classes: &[NodeClass]) -> Vec<NodeSelectorTerm> {
    let wanted = capability(&gpu.min_compute_capability).unwrap_or((0, 0));
    let mut common = Vec::new();
    if !gpu.allow_shared {
        common.extend(SHARED.iter().map(|(key, values)| requirement(key, "NotIn", values)));
    }
    let mut terms = Vec::new();
    for capability in capability_alternatives(wanted) {
        let mut expressions = memory_bounds(GFD_MEMORY, gpu);
        expressions.extend(capability);
        if !gpu.products.is_empty() {
            expressions.push(requirement("nvidia.com/gpu.product", "In", &gpu.products));
        }
        expressions.extend(common.iter().cloned());
        terms.push(term(expressions));
    }
    // Products are known by GFD's label alone.
    if gpu.products.is_empty() {
        for class in classes {
            let capable = capability(&class.compute_capability).is_some_and(|lowest| lowest >= wanted);
            let fits =
                class.memory_label.is_some() || (class.memory_mib >= gpu.min_memory_mib && gpu.most_memory_mib().is_none_or(|most| class.memory_mib <= most));
            if capable && fits {
                let mut expressions = class.memory_label.as_deref().map(|label| memory_bounds(label, gpu)).unwrap_or_default();
                expressions.extend(class.match_expressions.iter().cloned());
                expressions.extend(common.iter().cloned());
                terms.push(term(expressions));
            }
        }
    }
    terms
}

/// `Gt` and `Lt` are exclusive and compare integers.
fn memory_bounds(label: &str, gpu: &GpuSpec) -> Vec<NodeSelectorRequirement> {
    let lower = requirement(label, "Gt", &[gpu.min_memory_mib.saturating_sub(1).to_string()]);
    let upper = gpu.most_memory_mib().map(|most| requirement(label, "Lt", &[most.saturating_add(1).to_string()]));
    std::iter::once(lower).chain(upper).collect()
}

/// The alternatives of "at least MAJOR.MINOR" in GFD's two labels.
fn capability_alternatives((major, minor): (u32, u32)) -> Vec<Vec<NodeSelectorRequirement>> {
    const MAJOR: &str = "nvidia.com/gpu.compute.major";
    const MINOR: &str = "nvidia.com/gpu.compute.minor";
    if minor == 0 {
        return vec![if major == 0 { Vec::new() } else { vec![requirement(MAJOR, "Gt", &[(major - 1).to_string()])] }];
    }
    vec![
        vec![requirement(MAJOR, "Gt", &[major.to_string()])],
        vec![requirement(MAJOR, "In", &[major.to_string()]), requirement(MINOR, "Gt", &[(minor - 1).to_string()])],
    ]
}

/// "7.5" as (7, 5).
fn capability(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn requirement<S: AsRef<str>>(key: &str, operator: &str, values: &[S]) -> NodeSelectorRequirement {
    NodeSelectorRequirement { key: key.to_owned(), operator: operator.to_owned(), values: Some(values.iter().map(|value| value.as_ref().to_owned()).collect()) }
}

fn term(expressions: Vec<NodeSelectorRequirement>) -> NodeSelectorTerm {
    NodeSelectorTerm { match_expressions: Some(expressions), match_fields: None }
}

/// A term that holds where both hold.
fn and(a: &NodeSelectorTerm, b: &NodeSelectorTerm) -> NodeSelectorTerm {
    let joined = |a: &Option<Vec<NodeSelectorRequirement>>, b: &Option<Vec<NodeSelectorRequirement>>| {
        let all: Vec<_> = a.iter().chain(b).flatten().cloned().collect();
        (!all.is_empty()).then_some(all)
    };
    NodeSelectorTerm { match_expressions: joined(&a.match_expressions, &b.match_expressions), match_fields: joined(&a.match_fields, &b.match_fields) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::nodes::{Labels, term_matches};

    /// The chart's default `nodeAffinityTerms`.
    fn classes() -> Vec<NodeClass> {
        let text = r#"[
            {"memoryLabel": "karpenter.k8s.aws/instance-gpu-memory", "matchExpressions": [{"key": "karpenter.k8s.aws/instance-gpu-name", "operator": "NotIn", "values": ["v100"]}]},
            {"memoryLabel": "eks.amazonaws.com/instance-gpu-memory", "matchExpressions": [{"key": "eks.amazonaws.com/instance-gpu-name", "operator": "NotIn", "values": ["v100"]}]},
            {"matchExpressions": [{"key": "cloud.google.com/gke-accelerator", "operator": "In", "values": ["nvidia-tesla-t4"]}]}
        ]"#;
        let classes: Vec<NodeClass> = serde_json::from_str(text).unwrap();
        check_node_classes(&classes).unwrap();
        classes
    }

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    /// Every kubelet sets the label.
    fn on(architecture: &str, mut labels: Labels) -> Labels {
        labels.entry(ARCHITECTURE.to_owned()).or_insert_with(|| architecture.to_owned());
        labels
    }

    fn gfd(memory: &str, capability: (&str, &str), product: &str) -> Labels {
        labels(&[
            ("nvidia.com/gpu.memory", memory),
            ("nvidia.com/gpu.compute.major", capability.0),
            ("nvidia.com/gpu.compute.minor", capability.1),
            ("nvidia.com/gpu.product", product),
            ("nvidia.com/gpu.count", "1"),
            ("nvidia.com/gpu.replicas", "1"),
            ("nvidia.com/gpu.sharing-strategy", "none"),
        ])
    }

    /// Label dumps of real nodes.
    fn node(name: &str) -> Labels {
        let with = |mut base: Labels, more: &[(&str, &str)]| {
            base.extend(labels(more));
            base
        };
        on(
            "amd64",
            match name {
                "T4G, Karpenter" => on("arm64", labels(&[("karpenter.k8s.aws/instance-gpu-memory", "16384"), ("karpenter.k8s.aws/instance-gpu-name", "t4g")])),
                "T4G, GFD" => on("arm64", gfd("15360", ("7", "5"), "Tesla-T4G")),
                "T4, GFD" => gfd("15360", ("7", "5"), "Tesla-T4"),
                "T4, GFD, older driver" => gfd("16384", ("7", "5"), "Tesla-T4"),
                "A4000, GFD" => gfd("16376", ("8", "6"), "NVIDIA-RTX-A4000"),
                "V100 16 GB, GFD" => gfd("16160", ("7", "0"), "Tesla-V100-PCIE-16GB"),
                "L4, GFD" => gfd("23034", ("8", "9"), "NVIDIA-L4"),
                "A10G, GFD" => gfd("23028", ("8", "6"), "NVIDIA-A10G"),
                "RTX 3060, GFD" => gfd("12288", ("8", "6"), "NVIDIA-GeForce-RTX-3060"),
                "T4, GFD, time-sliced" => {
                    with(gfd("15360", ("7", "5"), "Tesla-T4-SHARED"), &[("nvidia.com/gpu.sharing-strategy", "time-slicing"), ("nvidia.com/gpu.replicas", "4")])
                }
                "T4, GFD, MPS" => with(gfd("15360", ("7", "5"), "Tesla-T4-SHARED"), &[("nvidia.com/gpu.sharing-strategy", "mps")]),
                "T4, Karpenter" => labels(&[
                    ("karpenter.k8s.aws/instance-gpu-memory", "16384"),
                    ("karpenter.k8s.aws/instance-gpu-name", "t4"),
                    ("node.kubernetes.io/instance-type", "g4dn.xlarge"),
                ]),
                "V100, Karpenter" => labels(&[("karpenter.k8s.aws/instance-gpu-memory", "16384"), ("karpenter.k8s.aws/instance-gpu-name", "v100")]),
                "A10G, Karpenter" => labels(&[("karpenter.k8s.aws/instance-gpu-memory", "22888"), ("karpenter.k8s.aws/instance-gpu-name", "a10g")]),
                "T4, EKS Auto" => labels(&[("eks.amazonaws.com/instance-gpu-memory", "16384"), ("eks.amazonaws.com/instance-gpu-name", "t4")]),
                "T4, GKE" => labels(&[("cloud.google.com/gke-accelerator", "nvidia-tesla-t4"), ("cloud.google.com/gke-gpu", "true")]),
                "T4, GKE, time-shared" => {
                    labels(&[("cloud.google.com/gke-accelerator", "nvidia-tesla-t4"), ("cloud.google.com/gke-gpu-sharing-strategy", "time-sharing")])
                }
                "L4, GKE" => labels(&[("cloud.google.com/gke-accelerator", "nvidia-l4")]),
                "CPU node" => labels(&[("kubernetes.io/arch", "amd64")]),
                other => panic!("{other}"),
            },
        )
    }

    const NODES: [&str; 19] = [
        "T4G, Karpenter",
        "T4G, GFD",
        "T4, GFD",
        "T4, GFD, older driver",
        "A4000, GFD",
        "V100 16 GB, GFD",
        "L4, GFD",
        "A10G, GFD",
        "RTX 3060, GFD",
        "T4, GFD, time-sliced",
        "T4, GFD, MPS",
        "T4, Karpenter",
        "V100, Karpenter",
        "A10G, Karpenter",
        "T4, EKS Auto",
        "T4, GKE",
        "T4, GKE, time-shared",
        "L4, GKE",
        "CPU node",
    ];

    fn chosen(gpu: &GpuSpec, user: Option<&Affinity>) -> Vec<&'static str> {
        let scheduling = SchedulingSpec { gpu: gpu.clone(), affinity: user.cloned(), ..SchedulingSpec::default() };
        let affinity = affinity(&scheduling, &classes(), &["amd64".to_owned()]).unwrap();
        let terms = affinity.node_affinity.unwrap().required_during_scheduling_ignored_during_execution.unwrap().node_selector_terms;
        NODES.into_iter().filter(|name| terms.iter().any(|term| term_matches(term, name, &node(name)))).collect()
    }

    #[test]
    fn the_sixteen_gigabyte_class_takes_t4_and_a4000_and_leaves_v100_l4_a10g_and_shared_ones() {
        let all = ["T4, GFD", "T4, GFD, older driver", "A4000, GFD", "T4, Karpenter", "T4, EKS Auto", "T4, GKE"];
        assert_eq!(chosen(&GpuSpec::default(), None), all);
    }

    #[test]
    fn bounds_products_sharing_and_capability_change_the_choice() {
        let gpu = |change: fn(&mut GpuSpec)| {
            let mut gpu = GpuSpec::default();
            change(&mut gpu);
            chosen(&gpu, None)
        };
        let larger_too = gpu(|gpu| gpu.max_memory_mib = 0);
        for name in ["T4, GFD", "L4, GFD", "A10G, GFD", "A10G, Karpenter", "T4, GKE"] {
            assert!(larger_too.contains(&name), "{name} in {larger_too:?}");
        }
        assert_eq!(
            gpu(|gpu| {
                gpu.min_memory_mib = 20_000;
                gpu.max_memory_mib = 25_000;
            }),
            ["L4, GFD", "A10G, GFD", "A10G, Karpenter"]
        );
        assert_eq!(gpu(|gpu| gpu.products = vec!["NVIDIA-RTX-A4000".into()]), ["A4000, GFD"]);
        assert_eq!(gpu(|gpu| gpu.min_compute_capability = "8.0".into()), ["A4000, GFD"]);
        assert!(gpu(|gpu| gpu.min_compute_capability = "7.0".into()).contains(&"V100 16 GB, GFD"));
        let shared = gpu(|gpu| gpu.allow_shared = true);
        for name in ["T4, GFD, time-sliced", "T4, GFD, MPS", "T4, GKE, time-shared"] {
            assert!(shared.contains(&name), "{name} in {shared:?}");
        }
    }

    #[test]
    fn the_users_terms_are_anded_with_each_of_the_class() {
        let user_term = |zone: &str| term(vec![requirement("topology.kubernetes.io/zone", "In", &[zone])]);
        let mut user = Affinity::default();
        user.node_affinity.get_or_insert_default().required_during_scheduling_ignored_during_execution =
            Some(NodeSelector { node_selector_terms: vec![user_term("a"), user_term("b")] });
        let scheduling = SchedulingSpec { affinity: Some(user), ..SchedulingSpec::default() };
        let affinity = affinity(&scheduling, &classes(), &[]).unwrap();
        let terms = affinity.node_affinity.unwrap().required_during_scheduling_ignored_during_execution.unwrap().node_selector_terms;
        assert_eq!(terms.len(), 2 * 5, "two alternatives of the user times five of the class");
        let mut in_zone = node("T4, GFD");
        assert!(!terms.iter().any(|term| term_matches(term, "n", &in_zone)), "the class alone is not enough");
        in_zone.insert("topology.kubernetes.io/zone".into(), "b".into());
        assert!(terms.iter().any(|term| term_matches(term, "n", &in_zone)));
        let only_zone = labels(&[("topology.kubernetes.io/zone", "a")]);
        assert!(!terms.iter().any(|term| term_matches(term, "n", &only_zone)), "the zone alone is not enough");
    }

    #[test]
    fn a_cpu_job_has_the_users_affinity_and_the_images_architecture() {
        let scheduling = |affinity| SchedulingSpec { gpu: GpuSpec { per_replica: 0, ..GpuSpec::default() }, affinity, ..SchedulingSpec::default() };
        assert_eq!(affinity(&scheduling(None), &classes(), &[]), None);
        let user = Affinity::default();
        assert_eq!(affinity(&scheduling(Some(user.clone())), &classes(), &[]), Some(user));
        assert_eq!(terms(&scheduling(None), &["amd64", "arm64"]), [term(vec![requirement(ARCHITECTURE, "In", &["amd64", "arm64"])])]);
    }

    fn terms(scheduling: &SchedulingSpec, architectures: &[&str]) -> Vec<NodeSelectorTerm> {
        let architectures: Vec<String> = architectures.iter().map(ToString::to_string).collect();
        let affinity = affinity(scheduling, &classes(), &architectures).unwrap();
        affinity.node_affinity.unwrap().required_during_scheduling_ignored_during_execution.unwrap().node_selector_terms
    }

    #[test]
    fn nodes_of_another_architecture_are_left_unless_the_job_names_one() {
        let takes = |scheduling: &SchedulingSpec, architectures: &[&str], name: &str| {
            terms(scheduling, architectures).iter().any(|term| term_matches(term, name, &node(name)))
        };
        let mut scheduling = SchedulingSpec::default();
        for name in ["T4G, Karpenter", "T4G, GFD"] {
            assert!(!takes(&scheduling, &["amd64"], name), "exec format error");
            assert!(takes(&scheduling, &["amd64", "arm64"], name) && takes(&scheduling, &[], name));
        }
        scheduling.node_selector.insert(ARCHITECTURE.to_owned(), "arm64".to_owned());
        assert!(takes(&scheduling, &["amd64"], "T4G, GFD"), "the selector decides");
        let own = term(vec![requirement(ARCHITECTURE, "In", &["arm64"])]);
        let mut user = Affinity::default();
        user.node_affinity.get_or_insert_default().required_during_scheduling_ignored_during_execution = Some(NodeSelector { node_selector_terms: vec![own] });
        let scheduling = SchedulingSpec { affinity: Some(user), ..SchedulingSpec::default() };
        assert!(takes(&scheduling, &["amd64"], "T4G, GFD") && !takes(&scheduling, &["amd64"], "T4, GFD"));
    }

    #[test]
    fn a_class_that_matches_any_node_is_refused() {
        let class = |text: &str| check_node_classes(&[serde_json::from_str(text).unwrap()]);
        assert_eq!(class("{}"), Err(NodeClassError::Empty { index: 0 }));
        assert!(class(r#"{"memoryLabel": "x/y", "computeCapability": "new"}"#).is_err());
        assert!(serde_json::from_str::<NodeClass>(r#"{"memorylabel": "x/y"}"#).is_err(), "a misspelt key is an error");
    }
}
