//! Where checkpoints lie below the checkpoint prefix.

use serde::{Deserialize, Serialize};

/// The folder of a checkpoint: `step-S/eN/`. Attempts never write into each other's folders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Optimizer updates done.
    pub step: u64,
    /// The claim of the attempt that wrote it.
    pub attempt: u64,
}

/// What the manifest says about the checkpoint besides its files. A neighbouring version of this program may say more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Label {
    /// Optimizer updates done.
    pub step: u64,
    /// The claim of the attempt that wrote it.
    pub attempt: u64,
    /// The spec that it belongs to.
    pub spec_hash: String,
    /// The dataset that it belongs to.
    pub dataset_digest: String,
    /// The base model that it belongs to; absent in checkpoints of versions that did not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<String>,
}

impl Place {
    /// `step-000200/e3`.
    pub fn folder(self) -> String {
        format!("step-{:06}/e{}", self.step, self.attempt)
    }

    /// The place and the file name that a key names, if it is one of a checkpoint's.
    pub fn parse(key: &str) -> Option<(Self, &str)> {
        let (step, rest) = key.strip_prefix("step-")?.split_once("/e")?;
        let (attempt, file) = rest.split_once('/')?;
        let place = Self { step: step.parse().ok()?, attempt: attempt.parse().ok()? };
        // The spelling must be the one that `folder` writes: one place, one folder.
        (!file.is_empty() && key.strip_prefix(&place.folder()).is_some_and(|rest| rest.starts_with('/'))).then_some((place, file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_round_trip_and_foreign_keys_are_ignored() {
        let place = Place { step: 200, attempt: 3 };
        assert_eq!(place.folder(), "step-000200/e3");
        assert_eq!(Place::parse("step-000200/e3/manifest.json"), Some((place, "manifest.json")));
        let far = Place { step: 12_345_678, attempt: 1 };
        assert_eq!(Place::parse(&format!("{}/x", far.folder())), Some((far, "x")));
        for foreign in ["step-200/e3/manifest.json", "step-000200/e03/x", "step-000200/e3/", "step-000200/x", "identity.json", "step-/e1/x"] {
            assert_eq!(Place::parse(foreign), None, "{foreign}");
        }
        assert!(Place { step: 9, attempt: 9 } < Place { step: 10, attempt: 1 });
    }
}
