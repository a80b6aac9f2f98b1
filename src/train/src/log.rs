//! The end of the process's log, kept in memory so that a run can put it beside its checkpoints: there it can be read when the pod is gone.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use finetune_api::Reason;

/// The file below `logs/`.
pub const FILE_NAME: &str = "trainer.log";
/// The most that is kept, in bytes.
const MOST: usize = 1 << 20;
/// What stands in place of a secret.
const REDACTED: &str = "***";
/// Values of variables with one of these words in their names never leave the process.
const SECRET: [&str; 6] = ["SECRET", "TOKEN", "PASSWORD", "KEY", "SAS", "CREDENTIAL"];
/// Shorter values are no secrets, and their letters may be anywhere.
const SHORTEST_SECRET: usize = 8;

/// The last MiB of what is written to it. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct LogTail {
    bytes: Arc<Mutex<VecDeque<u8>>>,
}

impl LogTail {
    /// The whole lines of the last MiB, without the values of the process's variables that hold credentials.
    pub fn text(&self) -> Bytes {
        let mut bytes = self.lock();
        // The first line is whole unless something came before it.
        let begin = if bytes.len() < MOST { 0 } else { bytes.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1) };
        let text = String::from_utf8_lossy(&bytes.make_contiguous()[begin..]).into_owned();
        drop(bytes);
        let variables = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        redact(text, variables).into()
    }

    /// Adds why the run ends, which nothing logs: it is printed once the run has ended.
    pub fn end(&self, reason: Reason, message: &str) {
        let line = format!("{} the attempt ends: {message} ({reason}, exit code {})\n", jiff::Timestamp::now(), reason.exit_code());
        self.push(line.as_bytes());
    }

    fn push(&self, new: &[u8]) {
        let mut bytes = self.lock();
        bytes.extend(&new[new.len().saturating_sub(MOST)..]);
        let surplus = bytes.len().saturating_sub(MOST);
        bytes.drain(..surplus);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<u8>> {
        // Bytes are bytes, whatever a thread that panicked did.
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for LogTail {
    fn write(&mut self, new: &[u8]) -> std::io::Result<usize> {
        self.push(new);
        Ok(new.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// `text` without the values of variables whose names are those of credentials. Names of files are none.
fn redact(text: String, variables: impl Iterator<Item = (String, String)>) -> String {
    let is_secret = |name: &str| SECRET.iter().any(|word| name.contains(word)) && !name.ends_with("_FILE");
    let mut secrets: Vec<_> = variables.filter(|(name, value)| is_secret(&name.to_uppercase()) && value.len() >= SHORTEST_SECRET).collect();
    // One that begins with another goes as a whole.
    secrets.sort_by_key(|(_, value)| std::cmp::Reverse(value.len()));
    secrets.into_iter().fold(text, |text, (_, secret)| if text.contains(&secret) { text.replace(&secret, REDACTED) } else { text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_whole_lines_are_kept() {
        let mut tail = LogTail::default();
        tail.write_all(b"first\n").unwrap();
        assert_eq!(tail.text(), "first\n");
        let line = format!("{}\n", "x".repeat(999));
        for _ in 0..2000 {
            tail.clone().write_all(line.as_bytes()).unwrap();
        }
        tail.end(Reason::Diverged, "the loss is not finite");
        let text = String::from_utf8(tail.text().to_vec()).unwrap();
        assert!(text.len() <= MOST && text.len() > MOST - 2 * line.len(), "{}", text.len());
        assert!(text.starts_with(&line) && text.ends_with("the loss is not finite (Diverged, exit code 13)\n"));
        tail.write_all(&vec![b'y'; 3 * MOST]).unwrap();
        assert_eq!(tail.text().len(), MOST, "one line without an end");
    }

    #[test]
    fn credentials_are_taken_out_by_the_names_of_their_variables() {
        let variables = [
            ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI"),
            ("MODEL_AZURE_STORAGE_SAS_KEY", "sv=2024&sig=abc"),
            ("hf_token", "hf_abcdefgh"),
            ("OTHER_TOKEN", "hf_abcdefghij"),
            ("SHORT_KEY", "the"),
            ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token"),
            ("HOME", "/home/nonroot"),
        ];
        let text = "GET https://x/?sv=2024&sig=abc of wJalrXUtnFEMI, hf_abcdefgh, hf_abcdefghij: the /var/run/secrets/token of /home/nonroot".to_owned();
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        assert_eq!(redact(text, variables), "GET https://x/?*** of ***, ***, ***: the /var/run/secrets/token of /home/nonroot");
    }
}
