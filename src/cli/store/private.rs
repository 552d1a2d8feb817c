//! Files and folders that only their owner may read: they hold guest memory.
//!
//! A folder may already exist, with files in it and with access for others. Each written file is a new one, so that no
//! other process has it open; links are refused, since their targets are not ours to change.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::super::output::note;
use super::{EARLY, MANIFEST, StoreError, TAIL, failed};

/// Bits of a mode that give others access.
const OTHERS: u32 = 0o077;
/// A folder in which every user may create files, such as /tmp.
const STICKY: u32 = 0o1000;

/// The folder: created with mode 0700, or access for others is removed if it holds only a guest of ours.
///
/// # Errors
/// [`StoreError::Shared`] for an open folder that others may use, [`StoreError::Io`].
pub(super) fn folder(path: &Path) -> Result<(), StoreError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(failed(path, "making the folder"))?;
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path);
    let opened = opened.map_err(failed(path, "opening"))?;
    let mode = opened.metadata().map_err(failed(path, "looking at"))?.mode() & 0o7777;
    if mode & OTHERS == 0 {
        return Ok(());
    }
    let foreign = foreign(path)?;
    if foreign.is_some() || mode & STICKY != 0 {
        let may_close = mode & STICKY == 0 && !is_of_the_system(path);
        return Err(StoreError::Shared { path: path.to_owned(), mode, foreign, may_close });
    }
    let closed = opened.set_permissions(Permissions::from_mode(0o700));
    closed.map_err(failed(path, "closing it to others (chmod 700)"))?;
    note!("ramwire: {} was open to others (mode {mode:04o}); its mode is 0700 now", path.display());
    Ok(())
}

/// True for the root and the folders in it: without access for others to `/` or `/etc` a machine no longer works.
fn is_of_the_system(path: &Path) -> bool {
    path.canonicalize().is_ok_and(|whole| whole.ancestors().count() <= 2)
}

/// The name of a file in the folder that `receive` has not created.
fn foreign(path: &Path) -> Result<Option<String>, StoreError> {
    let entries = fs::read_dir(path).map_err(failed(path, "listing"))?;
    for entry in entries {
        let name = entry.map_err(failed(path, "listing"))?.file_name().to_string_lossy().into_owned();
        let plain = name.strip_suffix(".new").unwrap_or(&name);
        if !is_ram(plain) && ![MANIFEST, EARLY, TAIL, super::LOCK].contains(&plain) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// True for the name of a RAM block's file.
fn is_ram(name: &str) -> bool {
    let block = name.strip_prefix("ram-").and_then(|rest| rest.strip_suffix(".bin"));
    block.is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Removes the RAM files of a guest that never arrived; anything other than a file is left alone.
///
/// # Errors
/// [`StoreError::Io`].
pub(super) fn remove_ram(folder: &Path) -> Result<(), StoreError> {
    let entries = fs::read_dir(folder).map_err(failed(folder, "listing"))?;
    for entry in entries {
        let entry = entry.map_err(failed(folder, "listing"))?;
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && is_ram(&entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path()).map_err(failed(&entry.path(), "removing the old file"))?;
        }
    }
    Ok(())
}

/// A new, empty file of mode 0600, which replaces an existing one.
///
/// # Errors
/// [`StoreError::NotPlain`] for anything other than a file, [`StoreError::Io`].
pub(super) fn create(path: &Path) -> Result<File, StoreError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => {
            is_plain(path, &other.map_err(failed(path, "looking at"))?)?;
            fs::remove_file(path).map_err(failed(path, "removing the old file"))?;
        }
    }
    let options = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).to_owned();
    options.open(path).map_err(failed(path, "making"))
}

/// The file that other processes lock too, so an existing one is kept; its mode becomes 0600.
///
/// # Errors
/// As [`create`].
pub(super) fn lock_file(path: &Path) -> Result<File, StoreError> {
    let mut options = OpenOptions::new();
    let file = plain(path, options.read(true).write(true).create(true).truncate(false).mode(0o600))?;
    let meta = file.metadata().map_err(failed(path, "looking at"))?;
    if meta.nlink() > 1 {
        return Err(StoreError::NotPlain {
            path: path.to_owned(),
            is: "a file with a second name (hard link)",
        });
    }
    if meta.mode() & OTHERS != 0 {
        file.set_permissions(Permissions::from_mode(0o600)).map_err(failed(path, "closing it to others"))?;
    }
    Ok(file)
}

/// Opens a file of the folder, never through a link.
///
/// # Errors
/// As [`create`].
pub(super) fn plain(path: &Path, options: &mut OpenOptions) -> Result<File, StoreError> {
    // Without O_NONBLOCK opening a pipe would wait here for its other end.
    let opened = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let file = match opened {
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            return Err(StoreError::NotPlain { path: path.to_owned(), is: "a symbolic link" });
        }
        other => other.map_err(failed(path, "opening"))?,
    };
    is_plain(path, &file.metadata().map_err(failed(path, "looking at"))?)?;
    Ok(file)
}

fn is_plain(path: &Path, meta: &fs::Metadata) -> Result<(), StoreError> {
    let kind = meta.file_type();
    let is = match () {
        () if kind.is_file() => return Ok(()),
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_dir() => "a folder",
        () if kind.is_fifo() || kind.is_socket() => "a pipe or socket",
        () => "a device",
    };
    Err(StoreError::NotPlain { path: PathBuf::from(path), is })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::symlink;

    use super::super::Store;
    use super::*;

    /// Neither is changed, nor is the operator advised to change it.
    #[test]
    fn folders_of_the_system_are_not_to_be_closed() {
        for path in ["/", "/usr", "/../usr/."] {
            let before = mode(Path::new(path));
            let error = folder(Path::new(path)).unwrap_err().to_string();
            assert!(error.contains("name a folder of its own") && !error.contains("chmod"), "{error}");
            assert_eq!(mode(Path::new(path)), before);
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("letter"), "").unwrap();
        set_mode(dir.path(), 0o755);
        let error = folder(dir.path()).unwrap_err().to_string();
        assert!(error.contains("chmod 700"), "{error}");
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn an_open_folder_of_ours_is_closed_and_its_files_are_new() {
        let dir = tempfile::tempdir().unwrap();
        set_mode(dir.path(), 0o755);
        for name in ["lock", "manifest.json", "tail.bin.new", "ram-007.bin"] {
            fs::write(dir.path().join(name), "old").unwrap();
            set_mode(&dir.path().join(name), 0o666);
        }
        let ram = dir.path().join("ram-007.bin");
        let mut opened_before = File::open(&ram).unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(mode(dir.path()), 0o700);
        assert_eq!(mode(&dir.path().join("lock")), 0o600);
        store.put("tail.bin", b"state").unwrap();
        io::Write::write_all(&mut create(&ram).unwrap(), b"secret").unwrap();
        for name in ["tail.bin", "ram-007.bin"] {
            assert_eq!(mode(&dir.path().join(name)), 0o600, "{name}");
        }
        let mut seen = String::new();
        io::Read::read_to_string(&mut opened_before, &mut seen).unwrap();
        assert_eq!(seen, "old", "who had the file open before sees nothing of the guest");
    }

    #[test]
    fn an_open_folder_with_other_things_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shared");
        fs::create_dir(&path).unwrap();
        for (name, before) in [(Some("notes"), 0o755), (None, 0o1777)] {
            name.into_iter().for_each(|name| fs::write(path.join(name), "").unwrap());
            set_mode(&path, before);
            let error = Store::open(&path).unwrap_err().to_string();
            // A folder that is meant to be shared, such as /tmp, is not for the operator to restrict.
            assert_eq!(error.contains("chmod 700"), name.is_some(), "{error}");
            assert!(name.is_none_or(|name| error.contains(name)), "{error}");
            assert_eq!(mode(&path), before);
            name.into_iter().for_each(|name| fs::remove_file(path.join(name)).unwrap());
        }
    }

    #[test]
    fn links_and_what_is_no_file_are_refused_and_what_they_name_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (target, guest) = (dir.path().join("target"), dir.path().join("guest"));
        fs::write(&target, "theirs").unwrap();
        set_mode(&target, 0o644);
        let store = Store::open(&guest).unwrap();
        let refused = |result: Result<(), StoreError>, word: &str| {
            let error = result.unwrap_err();
            assert!(matches!(error, StoreError::NotPlain { .. }), "{error}");
            assert!(error.to_string().contains(word) && error.to_string().contains("remove it"), "{error}");
        };
        for name in ["ram-000.bin", "tail.bin.new", "manifest.json"] {
            symlink(&target, guest.join(name)).unwrap();
        }
        refused(create(&guest.join("ram-000.bin")).map(drop), "symbolic link");
        refused(store.put("tail.bin", b"state"), "symbolic link");
        refused(store.manifest().map(drop), "symbolic link");
        fs::create_dir(guest.join("ram-001.bin")).unwrap();
        refused(create(&guest.join("ram-001.bin")).map(drop), "a folder");
        drop(store);
        for (word, make) in [("symbolic", true), ("hard link", false)] {
            fs::remove_file(guest.join("lock")).unwrap();
            if make {
                symlink(&target, guest.join("lock"))
            } else {
                fs::hard_link(&target, guest.join("lock"))
            }
            .unwrap();
            refused(Store::open(&guest).map(drop), word);
        }
        assert_eq!((fs::read_to_string(&target).unwrap().as_str(), mode(&target)), ("theirs", 0o644));
    }
}
