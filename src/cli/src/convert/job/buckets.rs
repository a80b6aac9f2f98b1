//! kohya's aspect-ratio buckets (`--enable_bucket`): bounds that are no multiples of the step are moved outwards, as `adjust_min_max_bucket_reso_by_steps` does.

use anyhow::ensure;

use super::Job;

/// The scripts' default step.
const STEP: u64 = 64;
/// What the API's steps are multiples of.
const UNIT: u64 = 16;

impl Job {
    /// `spec.training.buckets`.
    pub(super) fn buckets(&mut self) -> anyhow::Result<()> {
        let bounds = ["min_bucket_reso", "max_bucket_reso"];
        if !self.has("enable_bucket") {
            self.without_effect(&["bucket_reso_steps", "bucket_no_upscale", bounds[0], bounds[1]], "--enable_bucket");
            return Ok(());
        }
        ensure!(
            !self.has("with_prior_preservation"),
            "--enable_bucket and --with_prior_preservation: class pictures are square and share no batch with buckets; leave one of the two out"
        );
        let given = self.whole("bucket_reso_steps")?.unwrap_or(STEP);
        let step = given.max(1).next_multiple_of(UNIT);
        if step != given {
            self.remarks.push(format!("--bucket_reso_steps {given} becomes {step}: sides are multiples of {UNIT}, a patch of the model"));
        }
        self.set("training.buckets.step", step);
        self.set("training.centerCrop", true);
        if self.has("bucket_no_upscale") {
            self.set("training.buckets.upscale", false);
            for flag in bounds {
                if self.whole(flag)?.is_some() {
                    self.remarks.push(format!("--{flag} is without effect with --bucket_no_upscale, as in the scripts: the sides follow from the pictures"));
                }
            }
            return Ok(());
        }
        self.set("training.buckets.upscale", true);
        let moved = [|side: u64, step: u64| (side / step * step).max(step), |side: u64, step: u64| side.next_multiple_of(step)];
        for ((flag, path), moved) in bounds.into_iter().zip(["minSize", "maxSize"]).zip(moved) {
            let Some(given) = self.whole(flag)? else { continue };
            let side = moved(given, step);
            if side != given {
                self.remarks.push(format!("--{flag} {given} becomes {side}, a multiple of the step, as in the scripts"));
            }
            self.set(&format!("training.buckets.{path}"), side);
        }
        Ok(())
    }
}
