//! The folders of a job: which of them may lie in which.

use super::Problem;

/// Where checkpoints go unless the job says otherwise: below the output, named after the spec.
pub fn default_checkpoint_uri(output: &str, spec_hash: &str) -> String {
    let digits = spec_hash.trim_start_matches("sha256:");
    format!("{output}.checkpoints/{}/", digits.get(..16).unwrap_or(digits))
}

/// What a job does with a folder.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Use {
    /// Results are written there.
    Output,
    /// Checkpoints are written there.
    Checkpoint,
    /// It is only read.
    Input,
}

/// A folder of a job.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Folder {
    /// The field that names it, as in `spec.output.uri`.
    pub path: &'static str,
    /// Where it is; ends with "/".
    pub uri: String,
    /// What it is for.
    pub used_as: Use,
}

impl Folder {
    /// Whether `other` is this folder or lies in it.
    fn holds(&self, other: &Self) -> bool {
        other.uri.starts_with(&self.uri)
    }
}

/// The folders that cannot be used together: what a run writes would be found among what it or another attempt reads, or the other way round.
/// Only checkpoints may lie in another folder of the job, below the output.
pub fn overlaps(folders: &[Folder]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (index, a) in folders.iter().enumerate() {
        for b in &folders[index + 1..] {
            if !(a.holds(b) || b.holds(a)) {
                continue;
            }
            let message = match (a.used_as, b.used_as) {
                (Use::Input, Use::Input) => continue,
                (Use::Output, Use::Checkpoint) if a.uri != b.uri && a.holds(b) => continue,
                (Use::Output, Use::Checkpoint) => format!("must not be {} or contain it; a folder of its own below it is fine", field(a)),
                _ => format!("must not be {}, contain it or lie in it: a run writes there", if a.used_as == Use::Input { field(b) } else { field(a) }),
            };
            let at = if a.used_as == Use::Input { a } else { b };
            problems.push(Problem { path: at.path.to_owned(), message: format!("{message} ({} and {})", at.uri, if at == a { &b.uri } else { &a.uri }) });
        }
    }
    problems
}

/// The field's name as a person writes it.
fn field(folder: &Folder) -> &str {
    folder.path.trim_start_matches("spec.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(path: &'static str, uri: &str, used_as: Use) -> Folder {
        Folder { path, uri: uri.to_owned(), used_as }
    }

    #[test]
    fn only_checkpoints_may_lie_below_the_output() {
        let found = |checkpoint: &str, model: &str| {
            let folders = [
                folder("spec.output.uri", "s3://b/out/", Use::Output),
                folder("spec.checkpoint.uri", checkpoint, Use::Checkpoint),
                folder("spec.dataset.uri", "s3://b/data/", Use::Input),
                folder("spec.model.source.objectStore.uri", model, Use::Input),
            ];
            overlaps(&folders).into_iter().map(|problem| problem.path).collect::<Vec<_>>()
        };
        let none: [&str; 0] = [];
        for checkpoint in ["s3://b/out/checkpoints/", "s3://b/c/", "s3://other/", "s3://b/out-2/", "gs://b/out/"] {
            assert_eq!(found(checkpoint, "s3://b/sd3/"), none, "{checkpoint}");
        }
        assert_eq!(found("s3://b/out/", "s3://b/sd3/"), ["spec.checkpoint.uri"]);
        assert_eq!(found("s3://b/", "s3://m/sd3/"), ["spec.checkpoint.uri", "spec.dataset.uri"]);
        assert_eq!(found("s3://b/data/c/", "s3://m/"), ["spec.dataset.uri"]);
        assert_eq!(found("s3://c/", "s3://b/out/sd3/"), ["spec.model.source.objectStore.uri"]);
        assert_eq!(found("s3://b/sd3/c/", "s3://b/sd3/"), ["spec.model.source.objectStore.uri"]);
        // Both are only read.
        assert_eq!(found("s3://c/", "s3://b/data/sd3/"), none);
    }

    #[test]
    fn both_folders_are_named() {
        let folders = [folder("spec.output.uri", "s3://b/o/", Use::Output), folder("spec.dataset.uri", "s3://b/o/d/", Use::Input)];
        let problem = overlaps(&folders).remove(0).to_string();
        for word in ["spec.dataset.uri", "output.uri", "s3://b/o/d/", "s3://b/o/)"] {
            assert!(problem.contains(word), "{word}: {problem}");
        }
    }
}
