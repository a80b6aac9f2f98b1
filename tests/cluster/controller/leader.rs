//! Two operators, one lease.

use std::time::Duration;

use finetune_operator::run::Election;

use super::stage::{SOON, Stage, success};
use finetune_testing::kubernetes;

/// A lease that lasts much longer than anything here is waited for.
fn long(stage: &Stage, identity: &str) -> Election {
    let mut election = stage.election(identity);
    election.intervals.duration = 10 * SOON;
    election.intervals.renew_deadline = 5 * SOON;
    election
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a cluster: make cluster-up"]
async fn a_standby_takes_over_when_the_leader_is_killed_and_at_once_when_it_ends() {
    let stage = Stage::new("leader").await;
    let first = stage.operator_with(|options| options.election = Some(stage.election("first"))).await;
    kubernetes::eventually("a leader", SOON, || async { (first.count(&["finetune_leader"]) == 1).then_some(()) }).await;
    let second = stage.operator_with(|options| options.election = Some(long(&stage, "second"))).await;
    stage.create("steady", |_| {}).await;
    let pod = stage.pod("steady", None).await;
    stage.start(&pod).await;
    stage.until("steady", "an attempt", |job| job["status"]["attempts"]["started"] == 1).await;
    assert_eq!((second.count(&["finetune_leader"]), second.writes()), (0, 0), "a standby writes nothing, not even to the lease it cannot have");

    // Killed: the lease runs out.
    first.kill().await;
    stage.finish(&pod, 0, "Completed", &success()).await;
    stage.condition("steady", "Complete", "True", "TrainingSucceeded").await;
    assert_eq!(second.count(&["finetune_leader"]), 1);

    // Ended: the lease, which would last for ten minutes, is given back, and the next one need not wait.
    let third = stage.operator_with(|options| options.election = Some(stage.election("third"))).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(third.count(&["finetune_leader"]), 0);
    second.stop().await;
    kubernetes::eventually("a leader after a released lease", SOON, || async { (third.count(&["finetune_leader"]) == 1).then_some(()) }).await;

    // Somebody takes the lease away: the process ends.
    let theft = serde_json::json!({"spec": {"holderIdentity": "thief"}});
    kubernetes::patch(&stage.client, "Lease", &stage.namespace, "operator", &theft, false).await.expect("a lease");
    kubernetes::eventually("the end of a leader without a lease", SOON, || async { third.has_ended().then_some(()) }).await;
}
