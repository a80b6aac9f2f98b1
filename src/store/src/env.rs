//! The part of the process's environment that stores read, and the secrets in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Variables whose names start like this are kept.
const PREFIXES: [&str; 4] = ["AWS_", "GOOGLE_", "AZURE_", "HF_"];

/// The variable with the hub's access token.
const HUB_TOKEN: &str = "HF_TOKEN";
/// The variable that names the folder of the hub's own tools.
const HUB_HOME: &str = "HF_HOME";

/// Environment variables for storage and the model hub, captured once. `Debug` shows names only.
///
/// Tests build one of their own instead of changing the process's environment.
#[derive(Clone)]
pub struct Environment {
    variables: Arc<BTreeMap<String, String>>,
}

impl Environment {
    /// The process's variables `AWS_*`, `GOOGLE_*`, `AZURE_*` and `HF_*`. Values that are not UTF-8 or are empty are left out. Without
    /// `HF_TOKEN` the token is that of a login with the hub's own tools.
    pub fn process() -> Self {
        Self::of_user(std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))))
    }

    /// The variables of a user, with what the hub's own tools find without variables: its folder, and the token of a login.
    pub fn of_user(pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut all: BTreeMap<String, String> = pairs.into_iter().filter(|(_, value)| !value.is_empty()).collect();
        let cache = all.get("XDG_CACHE_HOME").cloned().or_else(|| Some(format!("{}/.cache", all.get("HOME")?)));
        if let Some(cache) = cache {
            all.entry(HUB_HOME.to_owned()).or_insert(format!("{cache}/huggingface"));
        }
        if !all.contains_key(HUB_TOKEN)
            && let Some(file) = all.get("HF_TOKEN_PATH").cloned().or_else(|| Some(format!("{}/token", all.get(HUB_HOME)?)))
            && let Ok(token) = std::fs::read_to_string(&file)
        {
            tracing::debug!(file, "using the hub's access token of a login");
            all.insert(HUB_TOKEN.to_owned(), token.trim().to_owned());
        }
        Self::from_pairs(all)
    }

    /// Where the hub's own tools keep what they have downloaded.
    pub(super) fn hub_cache(&self) -> Option<PathBuf> {
        let home = || self.get(HUB_HOME).map(|home| Path::new(home).join("hub"));
        self.get("HF_HUB_CACHE").map(PathBuf::from).or_else(home)
    }

    /// An environment of the given variables; unrelated names are left out.
    pub fn from_pairs<N: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (N, V)>) -> Self {
        let variables = pairs
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()))
            .filter(|(name, value)| !value.is_empty() && PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
            .collect();
        Self { variables: Arc::new(variables) }
    }

    /// Value of the variable `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str)
    }

    /// Variables whose names start with `prefix`, sorted by name.
    pub(super) fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.variables.iter().filter(move |(name, _)| name.starts_with(prefix)).map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The secret values among the variables.
    pub(super) fn secrets(&self) -> Secrets {
        let mut values = BTreeSet::new();
        for (name, value) in self.variables.iter() {
            let path_or_plain = name.ends_with("_FILE") || name.ends_with("_PATH") || name == "GOOGLE_APPLICATION_CREDENTIALS";
            let secret = ["KEY", "SECRET", "TOKEN", "SAS", "PASSWORD", "CREDENTIAL"].iter().any(|word| name.contains(word));
            if !secret || path_or_plain {
                continue;
            }
            values.insert(value.clone());
            // A service account key is JSON; a shared access signature is a query string. Their parts are secret too.
            if let Ok(serde_json::Value::Object(fields)) = serde_json::from_str(value) {
                values.extend(fields.iter().filter(|(field, _)| field.starts_with("private_key")).filter_map(|(_, v)| v.as_str()).map(String::from));
            }
            if let Some(signature) = value.split(['?', '&']).find_map(|pair| pair.strip_prefix("sig=")) {
                values.insert(signature.to_owned());
            }
        }
        // Longest first, so that a part never leaves the rest of a longer secret behind.
        let mut values: Vec<String> = values.into_iter().filter(|value| value.len() >= 6).collect();
        values.sort_by_key(|value| std::cmp::Reverse(value.len()));
        Secrets { values: values.into() }
    }
}

impl Default for Environment {
    /// The process's own.
    fn default() -> Self {
        Self::process()
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.variables.keys()).finish()
    }
}

/// Values that must appear in no error, log line or `Debug` text.
#[derive(Clone)]
pub(super) struct Secrets {
    values: Arc<[String]>,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({})", self.values.len())
    }
}

/// Longest text taken over from a server.
const MAX_TEXT: usize = 400;

impl Secrets {
    /// `text` on one line, without secrets, query strings and user information of addresses, and at most 400 characters.
    pub(super) fn redact(&self, text: &str) -> String {
        let mut clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        for value in self.values.iter() {
            if clean.contains(value.as_str()) {
                clean = clean.replace(value.as_str(), "***");
            }
        }
        let words: Vec<String> = clean.split_whitespace().map(redact_word).collect();
        let mut clean = words.join(" ");
        if let Some((end, _)) = clean.char_indices().nth(MAX_TEXT) {
            clean.truncate(end);
            clean.push_str("...");
        }
        clean
    }
}

/// A word without the query of an address in it, and without user information before its host.
fn redact_word(word: &str) -> String {
    let mut word = word.to_owned();
    if let Some(scheme) = word.find("://") {
        let host = scheme + 3;
        let end = word[host..].find(['/', '?']).map_or(word.len(), |at| host + at);
        if let Some(at) = word[host..end].rfind('@') {
            word.replace_range(host..host + at, "***");
        }
    }
    if let Some(query) = word.find('?')
        && word[query..].contains('=')
    {
        word.truncate(query);
        word.push_str("?***");
    }
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment() -> Environment {
        Environment::from_pairs([
            ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG"),
            ("AWS_REGION", "us-east-1"),
            ("AZURE_STORAGE_SAS_KEY", "?sv=2022&sig=abc%2Fdef%3D"),
            ("GOOGLE_SERVICE_ACCOUNT_KEY", r#"{"private_key":"-----BEGIN x","client_email":"me@example.com"}"#),
            ("HF_TOKEN", "hf_abcdefgh"),
            ("PATH", "/bin"),
        ])
    }

    #[test]
    fn token_and_cache_are_found_where_the_hubs_tools_keep_them() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().display().to_string();
        for (path, token) in [(".cache/huggingface/token", "hf_of_home"), ("xdg/huggingface/token", "hf_of_xdg"), ("hf/token", "hf_of_hf"), ("t", "hf_of_path")]
        {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{token}\n")).unwrap();
        }
        let mut pairs = vec![("HOME".to_owned(), root.clone())];
        for (name, value, token, cache) in [
            ("PATH", "/bin".to_owned(), "hf_of_home", format!("{root}/.cache/huggingface/hub")),
            ("XDG_CACHE_HOME", format!("{root}/xdg"), "hf_of_xdg", format!("{root}/xdg/huggingface/hub")),
            ("HF_HOME", format!("{root}/hf"), "hf_of_hf", format!("{root}/hf/hub")),
            ("HF_TOKEN_PATH", format!("{root}/t"), "hf_of_path", format!("{root}/hf/hub")),
            ("HF_TOKEN", "hf_of_variable".to_owned(), "hf_of_variable", format!("{root}/hf/hub")),
            ("HF_HUB_CACHE", "/models".to_owned(), "hf_of_variable", "/models".to_owned()),
        ] {
            pairs.push((name.to_owned(), value));
            let found = Environment::of_user(pairs.clone());
            assert_eq!((found.get(HUB_TOKEN), found.hub_cache()), (Some(token), Some(PathBuf::from(cache))), "{name}");
            assert_eq!(found.secrets().redact(&format!("Bearer {token}")), "Bearer ***");
        }
        assert_eq!(Environment::of_user([("HOME".to_owned(), "/no/such".to_owned())]).get(HUB_TOKEN), None);
    }

    #[test]
    fn debug_shows_names_only_and_unrelated_variables_are_not_kept() {
        let text = format!("{:?}", environment());
        assert!(text.contains("AWS_SECRET_ACCESS_KEY") && !text.contains("wJalr") && !text.contains("hf_abc"), "{text}");
        assert_eq!(environment().get("PATH"), None);
        assert!(!format!("{:?}", environment().secrets()).contains("wJalr"));
    }

    #[test]
    fn secrets_queries_and_user_information_are_cut_out() {
        let secrets = environment().secrets();
        let text = "PUT https://me:pw@host/x?sig=abc%2Fdef%3D&a=b failed: wJalrXUtnFEMI/K7MDENG\nand -----BEGIN x, Bearer hf_abcdefgh, sig abc%2Fdef%3D";
        assert_eq!(secrets.redact(text), "PUT https://***@host/x?*** failed: *** and ***, Bearer ***, sig ***");
    }

    #[test]
    fn plain_values_stay_and_long_text_is_cut() {
        let secrets = environment().secrets();
        assert_eq!(secrets.redact("region us-east-1?"), "region us-east-1?");
        assert_eq!(secrets.redact(&"x".repeat(1000)).len(), MAX_TEXT + 3);
    }
}
