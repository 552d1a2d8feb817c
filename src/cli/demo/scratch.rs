//! The folder of a UNIX socket between the demo's two processes.
//!
//! The destination creates it and removes it as soon as the demo has connected. It notices when the demo has ended, so
//! the folder is removed even if the demo is killed before that. The demo removes it if the destination could not.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Maximum length in bytes of the path of a UNIX socket (unix(7)), without the terminating zero.
const MAX_PATH: usize = 107;

/// The path of this run's socket.
///
/// # Errors
/// The path for temporary files is no folder, or its path is too long for a socket.
pub(super) fn socket_path() -> Result<PathBuf, String> {
    socket_in(&std::env::temp_dir())
}

fn socket_in(temporary: &Path) -> Result<PathBuf, String> {
    let place = temporary.display();
    if !temporary.is_dir() {
        return Err(format!("{place} is no folder: set TMPDIR to one that can be written"));
    }
    let path = temporary.join(format!("ramwire-demo-{}", std::process::id())).join("guest.sock");
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        return Err(format!(
            "{}: a socket's path has at most {MAX_PATH} bytes and this one {length}: set TMPDIR to a shorter one",
            path.display()
        ));
    }
    Ok(path)
}

/// A socket's folder, removed with all its files.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    /// Makes the folder of `socket`.
    ///
    /// # Errors
    /// The error as text, with the folder.
    pub(super) fn make(socket: &Path) -> Result<Self, String> {
        let folder = socket.parent().unwrap_or(socket);
        let made = DirBuilder::new().mode(0o700).create(folder);
        made.map(|()| Self::of(socket)).map_err(|error| {
            let place = folder.display();
            format!("{place}: making the folder: {error}; set TMPDIR to a folder that can be written")
        })
    }

    /// The folder of `socket`, which another process creates.
    pub(super) fn of(socket: &Path) -> Self {
        Self(socket.parent().map_or_else(PathBuf::new, Path::to_owned))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_folder_that_does_not_do_is_named_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(100));
        for (folder, says) in
            [(dir.path().join("missing"), "is no folder"), (long.clone(), "at most 107 bytes")]
        {
            let _ = std::fs::create_dir(&long);
            let error = socket_in(&folder).unwrap_err();
            assert!(error.contains(says) && error.contains("set TMPDIR"), "{error}");
        }
        let socket = socket_in(dir.path()).unwrap();
        let folder = Scratch::make(&socket).unwrap();
        assert!(Scratch::make(&socket).map(drop).unwrap_err().contains("making the folder"));
        std::fs::write(&socket, "").unwrap();
        drop(folder);
        assert!(!socket.parent().unwrap().exists());
    }
}
