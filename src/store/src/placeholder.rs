//! Files that consoles and file managers leave in folders by themselves, which say nothing about what the folder is used for.

use super::ObjectInfo;

/// Names of files, in lower case, that file managers write beside those of their users.
const FILES: [&str; 5] = ["thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"];

/// Names of folders, in lower case, that operating systems and network drives keep for themselves.
const FOLDERS: [&str; 9] =
    [".spotlight-v100", ".trashes", ".fseventsd", ".temporaryitems", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"];

/// Whether the object is a placeholder: an empty one (a console's marker for a folder, say), a hidden file (`.DS_Store`, `.keep`,
/// `.emptyFolderPlaceholder`), or one that a file manager writes by itself (`Thumbs.db`, `desktop.ini`). What lies in a hidden folder is no
/// placeholder, unless the folder is the operating system's own.
pub fn is_placeholder(object: &ObjectInfo) -> bool {
    let key = object.key.to_lowercase();
    let (folders, name) = key.rsplit_once('/').unwrap_or(("", &key));
    let of_the_system = || folders.split('/').any(|folder| FOLDERS.contains(&folder));
    object.size == 0 || name.starts_with('.') || FILES.contains(&name) || of_the_system()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_told_from_files_of_people() {
        let is = |key: &str, size| is_placeholder(&ObjectInfo { key: key.to_owned(), size, etag: None });
        for key in
            [".DS_Store", "a/.keep", ".emptyFolderPlaceholder", ".bzEmpty", "Thumbs.db", "sub/desktop.ini", "._lora.safetensors", "@eaDir/lora@SynoEAStream"]
        {
            assert!(is(key, 6148), "{key}");
        }
        assert!(is("sub", 0) && is("sub_$folder$", 0));
        for key in ["lora.safetensors", "notes.txt", ".git/config", "a.b/c", "thumbs.db/x", "keep"] {
            assert!(!is(key, 10), "{key}");
        }
    }
}
