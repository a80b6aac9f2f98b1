//! Events of the API, published beside the reconciliations: a slow answer to one holds up nobody's status.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, Recorder};
use tokio::sync::mpsc;

use crate::controller::context::Context;
use crate::error::Operation;

/// Events that wait to be published; more are dropped.
const WAITING: usize = 4096;
/// Events after which the publisher forgets what it has published: to count an event that comes again, a [`Recorder`] keeps each for six minutes, some
/// 3 KiB in memory, however many there are.
const REMEMBERED: usize = 128;

/// An event and what it is about.
type Note = (Event, ObjectReference);

/// Hands events to the publisher.
#[derive(Debug, Clone)]
pub struct Events {
    queue: mpsc::Sender<Note>,
}

/// Publishes events in their order, one at a time, as client-go's broadcaster does: while the API server answers slowly, events leave it to the statuses.
#[derive(Debug)]
pub struct Publisher {
    queue: mpsc::Receiver<Note>,
}

impl Events {
    /// An empty queue.
    pub fn new() -> (Self, Publisher) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self { queue: sender }, Publisher { queue: receiver })
    }

    /// Puts an event in the queue. One that finds it full is dropped: the status has told the same, and memory is bounded.
    pub fn publish(&self, event: Event, reference: &ObjectReference) {
        if let Err(refused) = self.queue.try_send((event, reference.clone())) {
            let (event, reference) = refused.into_inner();
            tracing::warn!(namespace = reference.namespace, job = reference.name, reason = %event.reason, "too many events wait to be published; this one is dropped");
        }
    }
}

impl Publisher {
    /// Publishes by recorders that `new_recorder` makes, until every [`Events`] is gone and the queue empty.
    pub async fn run(mut self, new_recorder: impl Fn() -> Recorder, ctx: &Context) {
        let mut recorder = new_recorder();
        let mut published = 0;
        while let Some((event, reference)) = self.queue.recv().await {
            if published == REMEMBERED {
                recorder = new_recorder();
                published = 0;
            }
            published += 1;
            // An event that is lost is no reason to do anything again.
            if let Err(error) = ctx.call(Operation::PublishEvent, recorder.publish(&event, &reference)).await {
                tracing::warn!(namespace = reference.namespace, job = reference.name, error = &error as &dyn std::error::Error, "failed to publish an event");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::http::{Method, Request, Response};
    use kube::Client;
    use kube::client::Body;
    use kube::runtime::events::{EventType, Reporter};

    use super::*;
    use crate::controller::context::FaultHook;
    use crate::controller::lease::Leadership;
    use crate::fixtures::settings;

    fn event(note: &str) -> Event {
        Event { type_: EventType::Normal, reason: "Started".into(), note: Some(note.into()), action: "Watch".into(), secondary: None }
    }

    fn reference(uid: &str) -> ObjectReference {
        ObjectReference { uid: Some(uid.into()), ..ObjectReference::default() }
    }

    #[test]
    fn events_keep_their_order_and_too_many_are_dropped() {
        let (events, mut publisher) = Events::new();
        for i in 0..WAITING + 10 {
            events.publish(event(&i.to_string()), &reference("a"));
        }
        let notes: Vec<String> = std::iter::from_fn(|| publisher.queue.try_recv().ok()).filter_map(|(event, _)| event.note).collect();
        assert_eq!(notes, (0..WAITING).map(|i| i.to_string()).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn an_event_that_comes_again_is_counted_and_the_memory_of_events_is_bounded() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let requests = Arc::clone(&seen);
        let client = Client::new(
            tower::service_fn(move |request: Request<Body>| {
                requests.lock().unwrap().push(request.method().clone());
                async move { Ok::<_, kube::Error>(Response::new(Body::from(request.into_body().collect_bytes().await?.to_vec()))) }
            }),
            "default",
        );
        let ctx = Context::new(client.clone(), settings(), Arc::default(), Leadership::without_election(), FaultHook::default());
        let (events, publisher) = Events::new();
        // Each about another object in the recorder's eyes.
        let publish = |number: usize| events.publish(event(""), &ObjectReference { name: Some(number.to_string()), ..reference("a") });
        publish(0);
        publish(0);
        for number in 2..REMEMBERED {
            publish(number);
        }
        publish(0);
        drop(events);
        let recorder = move || Recorder::new(client.clone(), Reporter { controller: "operator".to_owned(), instance: None });
        publisher.run(recorder, &ctx).await;
        let seen = seen.lock().unwrap();
        assert_eq!(seen[..2], [Method::POST, Method::PATCH], "what comes again is counted in the first one");
        assert!(seen[2..].iter().all(|method| *method == Method::POST), "after {REMEMBERED} it is told anew");
        assert_eq!(seen.len(), REMEMBERED + 1);
    }
}
