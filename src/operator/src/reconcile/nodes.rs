//! Whether a node's labels satisfy a pod's node selector and required node affinity: the scheduler's rules for labels, applied to the labels of all
//! nodes to tell "every matching node is busy" from "no node matches".

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, PodSpec};

/// Labels of a node.
pub type Labels = BTreeMap<String, String>;

/// Whether the labels of a node called `name` satisfy the pod's `nodeSelector` and required node affinity.
pub fn matches(pod: &PodSpec, name: &str, labels: &Labels) -> bool {
    let selector = pod.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let required = pod
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    selector && required.is_none_or(|required| required.node_selector_terms.iter().any(|term| term_matches(term, name, labels)))
}

/// Whether all requirements of one term hold. An empty term matches nothing.
pub fn term_matches(term: &NodeSelectorTerm, name: &str, labels: &Labels) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    (!expressions.is_empty() || !fields.is_empty())
        && expressions.iter().all(|requirement| holds(requirement, labels.get(&requirement.key).map(String::as_str)))
        && fields.iter().all(|requirement| requirement.key == "metadata.name" && holds(requirement, Some(name)))
}

fn holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|value| values.iter().any(|candidate| candidate == value));
    let compared = |order: fn(i64, i64) -> bool| match (value.map(str::parse), values.first().map(|bound| bound.parse())) {
        (Some(Ok(value)), Some(Ok(bound))) => order(value, bound),
        _ => false,
    };
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compared(|value, bound| value > bound),
        "Lt" => compared(|value, bound| value < bound),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirements_follow_the_schedulers_rules() {
        let cases = [
            ("In", &["a", "b"][..], Some("b"), true),
            ("In", &["a"], None, false),
            ("NotIn", &["a"], None, true),
            ("NotIn", &["a"], Some("a"), false),
            ("Exists", &[], Some(""), true),
            ("DoesNotExist", &[], None, true),
            ("Gt", &["14999"], Some("15360"), true),
            ("Gt", &["15360"], Some("15360"), false),
            ("Lt", &["17001"], Some("24576"), false),
            ("Gt", &["1"], None, false),
            ("Gt", &["1"], Some("many"), false),
            ("Nonsense", &["1"], Some("1"), false),
        ];
        for (operator, values, value, want) in cases {
            let requirement =
                NodeSelectorRequirement { key: "k".into(), operator: operator.into(), values: Some(values.iter().map(ToString::to_string).collect()) };
            assert_eq!(holds(&requirement, value), want, "{operator} {values:?} of {value:?}");
        }
        assert!(!term_matches(&NodeSelectorTerm::default(), "n", &Labels::new()), "an empty term matches nothing");
    }
}
