//! Events of the API, published beside the reconciliations: a slow answer to one holds up nobody's status.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, Recorder};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::context::Context;
use super::error::Operation;

/// Events that are published at once.
const PUBLISHERS: usize = 4;
/// Events that wait for each publisher; more are dropped.
const WAITING: usize = 2048;
/// Events after which a publisher forgets what it has published: to count an event that comes again, a [`Recorder`] keeps each for six minutes, some
/// 3 KiB in memory, however many there are.
const REMEMBERED: usize = 128;

/// An event and what it is about.
type Note = (Event, ObjectReference);

/// Hands events to the publishers. Events of one object are published in order.
#[derive(Debug, Clone)]
pub struct Events {
    queues: Vec<mpsc::Sender<Note>>,
}

/// The publishers' ends of the queues.
#[derive(Debug)]
pub struct Publishers {
    queues: Vec<mpsc::Receiver<Note>>,
}

impl Events {
    /// Empty queues.
    pub fn new() -> (Self, Publishers) {
        let (senders, receivers) = (0..PUBLISHERS).map(|_| mpsc::channel(WAITING)).unzip();
        (Self { queues: senders }, Publishers { queues: receivers })
    }

    /// Puts an event in its object's queue. One that finds it full is dropped: the status has told the same, and memory is bounded.
    pub fn publish(&self, event: Event, reference: &ObjectReference) {
        let mut hasher = DefaultHasher::new();
        reference.uid.hash(&mut hasher);
        let queue = &self.queues[(hasher.finish() % self.queues.len() as u64) as usize];
        if let Err(refused) = queue.try_send((event, reference.clone())) {
            let (event, reference) = refused.into_inner();
            tracing::warn!(namespace = reference.namespace, job = reference.name, reason = %event.reason, "too many events wait to be published; this one is dropped");
        }
    }
}

impl Publishers {
    /// Publishes by recorders that `new_recorder` makes, until every [`Events`] is gone and its queue empty.
    pub fn start(self, new_recorder: impl Fn() -> Recorder + Clone + Send + 'static, ctx: &Arc<Context>) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        for mut queue in self.queues {
            let (new_recorder, ctx) = (new_recorder.clone(), Arc::clone(ctx));
            tasks.spawn(async move {
                let mut recorder = new_recorder();
                let mut published = 0;
                while let Some((event, reference)) = queue.recv().await {
                    if published == REMEMBERED {
                        recorder = new_recorder();
                        published = 0;
                    }
                    published += 1;
                    // An event that is lost is no reason to do anything again.
                    if let Err(error) = ctx.call(Operation::PublishEvent, recorder.publish(&event, &reference)).await {
                        tracing::warn!(
                            namespace = reference.namespace,
                            job = reference.name,
                            error = &error as &dyn std::error::Error,
                            "failed to publish an event"
                        );
                    }
                }
            });
        }
        tasks
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use axum::http::{Method, Request, Response};
    use kube::Client;
    use kube::client::Body;
    use kube::runtime::events::{EventType, Reporter};

    use super::*;
    use crate::operator::context::FaultHook;
    use crate::operator::fixtures::settings;
    use crate::operator::lease::Leadership;

    fn event(note: &str) -> Event {
        Event { type_: EventType::Normal, reason: "Started".into(), note: Some(note.into()), action: "Watch".into(), secondary: None }
    }

    fn reference(uid: &str) -> ObjectReference {
        ObjectReference { uid: Some(uid.into()), ..ObjectReference::default() }
    }

    #[test]
    fn an_objects_events_keep_their_order_and_too_many_are_dropped() {
        let (events, mut publishers) = Events::new();
        for i in 0..WAITING + 10 {
            events.publish(event(&i.to_string()), &reference("a"));
        }
        let mut lengths: Vec<usize> = publishers.queues.iter().map(mpsc::Receiver::len).collect();
        lengths.sort_unstable();
        assert_eq!(lengths, [0, 0, 0, WAITING], "one object, one queue, and no more than it holds");
        let queue = publishers.queues.iter_mut().find(|queue| !queue.is_empty()).unwrap();
        let notes: Vec<String> = std::iter::from_fn(|| queue.try_recv().ok()).filter_map(|(event, _)| event.note).collect();
        assert_eq!(notes, (0..WAITING).map(|i| i.to_string()).collect::<Vec<_>>());
        // Objects share the work.
        for i in 0..64 {
            events.publish(event(""), &reference(&i.to_string()));
        }
        assert!(publishers.queues.iter().all(|queue| !queue.is_empty()));
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
        let ctx = Arc::new(Context::new(client.clone(), settings(), Arc::default(), Leadership::without_election(), FaultHook::default()));
        let (events, publishers) = Events::new();
        // One object's events in the eyes of the queues, each about another in the recorder's.
        let publish = |number: usize| events.publish(event(""), &ObjectReference { name: Some(number.to_string()), ..reference("a") });
        publish(0);
        publish(0);
        for number in 2..REMEMBERED {
            publish(number);
        }
        publish(0);
        drop(events);
        let recorder = move || Recorder::new(client.clone(), Reporter { controller: "operator".to_owned(), instance: None });
        publishers.start(recorder, &ctx).join_all().await;
        let seen = seen.lock().unwrap();
        assert_eq!(seen[..2], [Method::POST, Method::PATCH], "what comes again is counted in the first one");
        assert!(seen[2..].iter().all(|method| *method == Method::POST), "after {REMEMBERED} it is told anew");
        assert_eq!(seen.len(), REMEMBERED + 1);
    }
}
