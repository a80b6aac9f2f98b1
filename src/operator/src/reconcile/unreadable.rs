//! A FineTuneJob that this version cannot read: it is managed by nobody, and says so itself.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{Api, ApiResource, DynamicObject, ObjectMeta, Patch, PatchParams};
use kube::core::error_boundary::InvalidObject;
use kube::runtime::events::{Event, EventType};
use serde_json::json;

use crate::error::{Error, Operation};
use crate::reconcile::Scope;
use finetune_api::{API_VERSION, ConditionType, FineTuneJob, KIND, ValidatedReason, clean};

/// Another than that of the status: what is in the rest of the status, which cannot be read either, stays.
const FIELD_MANAGER: &str = "finetune-operator-unreadable";

/// Sets the conditions that say so and publishes an event, once for each problem.
pub async fn tell(object: &InvalidObject, scope: &Scope) -> Result<(), Error> {
    let (ctx, metadata) = (&scope.ctx, &object.metadata);
    let uid = metadata.uid.clone().unwrap_or_default();
    if ctx.told_unreadable(&uid, &object.error) {
        return Ok(());
    }
    let text = clean(&format!("this version of the operator cannot read the object, and leaves it and its pods alone: {}", object.error), 1000);
    // The answer cannot be read as a FineTuneJob either.
    let resource = ApiResource::erase::<FineTuneJob>(&());
    let jobs: Api<DynamicObject> = Api::namespaced_with(ctx.client.clone(), metadata.namespace.as_deref().unwrap_or_default(), &resource);
    let patch = Patch::Apply(patch(metadata, &text, Timestamp::now()));
    let name = metadata.name.as_deref().unwrap_or_default();
    let written = ctx.call(Operation::WriteStatus, jobs.patch_status(name, &PatchParams::apply(FIELD_MANAGER).force(), &patch)).await;
    if let Err(error) = written
        && !error.is_not_found()
        && !error.is_conflict()
    {
        return Err(error);
    }
    let event =
        Event { type_: EventType::Warning, reason: ValidatedReason::Unreadable.to_string(), note: Some(text), action: "Read".to_owned(), secondary: None };
    let reference = k8s_openapi::api::core::v1::ObjectReference {
        api_version: Some(API_VERSION.to_owned()),
        kind: Some(KIND.to_owned()),
        name: metadata.name.clone(),
        namespace: metadata.namespace.clone(),
        uid: metadata.uid.clone(),
        resource_version: metadata.resource_version.clone(),
        field_path: None,
    };
    scope.events.publish(event, &reference);
    Ok(())
}

fn patch(metadata: &ObjectMeta, text: &str, now: Timestamp) -> serde_json::Value {
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let condition = |type_: ConditionType, status: &str| Condition {
        type_: type_.to_string(),
        status: status.to_owned(),
        reason: ValidatedReason::Unreadable.to_string(),
        message: text.to_owned(),
        last_transition_time: Time(now),
        observed_generation: metadata.generation,
    };
    let conditions = [condition(ConditionType::Validated, "False"), condition(ConditionType::Stalled, "True")];
    json!({
        "apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": metadata.name, "uid": metadata.uid},
        "status": {"observedGeneration": metadata.generation, "conditions": conditions},
    })
}
