//! Frozen weights in 8 bits: a whole job, resumed, with what it publishes about them.

use serde_json::json;

use crate::support::{Bench, LORA, reference};

#[test]
fn a_run_in_8_bits_trains_says_so_and_resumes_to_the_same_lora() {
    let int8 = json!({"training": {"weights": "Int8"}});
    let whole = Bench::new();
    whole.complete(&int8);
    assert!(whole.read(LORA) != reference().0, "rounded weights must matter");
    let result = whole.result();
    assert_eq!(result["weights"], "Int8");
    assert!(result["evaluation"]["end"].as_f64() < result["evaluation"]["start"].as_f64(), "{result}");
    let card = String::from_utf8(whole.read("README.md")).unwrap();
    assert!(card.contains("the blocks' frozen weights in 8 bits"), "{card}");

    let bench = Bench::new();
    // Early in the run, so that it cannot end before it is killed, however slow the machine.
    let mut killed = bench.start(&json!({"training": {"weights": "Int8"}, "checkpoint": {"everySteps": 2}}), &[]);
    killed.await_log("saved a checkpoint");
    killed.signal("KILL");
    assert_eq!(killed.wait(), None, "it ended before it was killed");
    bench.complete(&int8);
    assert_eq!(bench.claims(), 2);
    assert!(bench.read(LORA) == whole.read(LORA), "a resumed run ends in the same bits");
}

/// What the job leaves out and what it writes out are the same run on the CPU: no result of an earlier version trains again.
#[test]
fn numbers_stay_the_default_on_the_cpu() {
    let bench = Bench::new();
    bench.complete(&json!({"training": {"weights": "Float"}}));
    assert!(bench.read(LORA) == reference().0);
    assert!(bench.result().get("weights").is_none());
}
