//! Directories that appear whole or not at all: built beside their place and renamed into it.
//!
//! While it is built a directory is called `.NAME.PID-N.occystrap-partial` and is locked by the process that builds it. The
//! lock dies with the process, so the next run with the same destination can tell what a killed one left, and removes it.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FlockOperation, Mode, RenameFlags, chmod, flock, renameat_with};
use rustix::io::Errno;

use super::OutputError;
use crate::atomic::{parent, partial_name, partials, replaceable};
use crate::unpack::tree;

/// A directory that is being built. Dropped before it is published, it is removed.
#[derive(Debug)]
pub(super) struct StagedDir {
    path: PathBuf,
    destination: PathBuf,
    /// Held locked as long as the directory is not in its place.
    _lock: File,
    published: bool,
}

/// Where directories are built now, by whatever this process runs.
static UNPUBLISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
/// One of them is gone.
static GONE: Condvar = Condvar::new();

/// Waits until all directories that are being built are published or removed, for a process that is about to end and has given
/// its work up: threads that write to them find that out by and by. After `patience` it removes them itself.
pub fn remove_unpublished(patience: Duration) {
    let waited = GONE.wait_timeout_while(unpublished(), patience, |unpublished| !unpublished.is_empty());
    let (unpublished, _) = waited.unwrap_or_else(PoisonError::into_inner);
    for path in unpublished.iter() {
        remove(path);
    }
}

/// What a publication that failed says.
type Result<T> = std::result::Result<T, OutputError>;

impl StagedDir {
    /// An empty directory that is to become `destination`. When that is a symbolic link, its target is what gets replaced.
    /// One that exists and is not empty is refused, unless it is to be replaced.
    /// So is one that could not be replaced in the end.
    pub(super) fn create(destination: &Path, replace: bool) -> Result<Self> {
        std::fs::create_dir_all(parent(destination)).map_err(fail("create the parent of", destination))?;
        let destination = replaceable(destination).map_err(fail("write to", destination))?;
        refuse_taken(&destination, replace)?;
        let fail = |what| fail(what, &destination);
        let directory = parent(&destination);
        let name = destination.file_name().ok_or(io::ErrorKind::InvalidFilename.into());
        let name = name.map_err(fail("create"))?;
        remove_abandoned(&directory, name);
        loop {
            let path = directory.join(partial_name(name, std::process::id()));
            match std::fs::create_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                result => result.map_err(fail("create a directory beside"))?,
            }
            // Between its creation and its lock another run may have taken it for abandoned.
            let lock = File::open(&path).map(|lock| {
                let locked = flock(&lock, FlockOperation::NonBlockingLockExclusive);
                locked.is_ok_and(|()| is_same(&lock, &path)).then_some(lock)
            });
            match lock {
                Ok(Some(lock)) => {
                    unpublished().push(path.clone());
                    return Ok(Self { path, destination, _lock: lock, published: false });
                }
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(fail("lock a directory beside")(error)),
            }
        }
    }

    /// Where it is built.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The same directory, to become another one beside the first.
    #[must_use]
    pub(super) fn destined(mut self, destination: PathBuf) -> Self {
        self.destination = destination;
        self
    }

    /// Puts the directory in its place. What is there is replaced in one step, and lost only then, if that was asked for.
    /// It keeps who may do what there.
    pub(super) fn publish(self, replace: bool) -> Result<()> {
        if let Ok(replaced) = std::fs::metadata(&self.destination) {
            let set = std::fs::set_permissions(&self.path, replaced.permissions());
            set.map_err(fail("replace", &self.destination))?;
        }
        self.put(replace)
    }

    /// The same with a directory that is the root of an unpacked tree, and has the rights that its image says.
    pub(super) fn publish_tree(self) -> Result<()> {
        self.put(true)
    }

    fn put(mut self, replace: bool) -> Result<()> {
        let fail = |source| OutputError::Io { what: "replace", path: self.destination.clone(), source };
        // This replaces an empty directory, but no other.
        match rustix::fs::rename(&self.path, &self.destination) {
            Ok(()) => {
                self.published = true;
                return Ok(());
            }
            Err(Errno::NOTEMPTY | Errno::EXIST) if replace => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                return Err(OutputError::Taken { path: self.destination.clone() });
            }
            Err(errno) => return Err(fail(errno.into())),
        }
        match renameat_with(CWD, &self.path, CWD, &self.destination, RenameFlags::EXCHANGE) {
            // What was there has the partial name now, and goes when this value does.
            Ok(()) => Ok(()),
            Err(Errno::INVAL | Errno::NOSYS) => {
                // A file system that cannot exchange: for a moment there is nothing at the destination.
                let name = self.destination.file_name().unwrap_or_default();
                let aside = parent(&self.destination).join(partial_name(name, std::process::id()));
                std::fs::rename(&self.destination, &aside).map_err(fail)?;
                if let Err(error) = std::fs::rename(&self.path, &self.destination) {
                    let _ = std::fs::rename(&aside, &self.destination);
                    return Err(fail(error));
                }
                unpublished().retain(|path| *path != self.path);
                unpublished().push(aside.clone());
                self.path = aside;
                Ok(())
            }
            Err(errno) => Err(fail(errno.into())),
        }
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        if !self.published {
            remove(&self.path);
        }
        unpublished().retain(|path| *path != self.path);
        GONE.notify_all();
    }
}

fn unpublished() -> std::sync::MutexGuard<'static, Vec<PathBuf>> {
    UNPUBLISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits, though not for long, until nobody else holds `shared`.
pub(super) fn wait_for_others<T>(shared: &Arc<T>) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while Arc::strong_count(shared) > 1 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// An error that names what was being done to `path`.
pub(super) fn fail(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OutputError + use<> {
    let path = path.to_owned();
    move |source| OutputError::Io { what, path, source }
}

/// Whether something at `path` stands in the way of a new directory.
fn refuse_taken(path: &Path, replace: bool) -> Result<()> {
    let mut entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail("write to", path)(error)),
    };
    match entries.next() {
        Some(_) if !replace => Err(OutputError::Taken { path: path.to_owned() }),
        _ => Ok(()),
    }
}

fn is_same(file: &File, path: &Path) -> bool {
    let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    file.metadata().is_ok_and(|one| path.metadata().is_ok_and(|two| identity(one) == identity(two)))
}

/// Removes directories that nobody holds a lock of: what killed runs with the same destination left.
fn remove_abandoned(directory: &Path, name: &OsStr) {
    for entry in partials(directory, name) {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        match lock_abandoned(&path) {
            Ok(Some(_lock)) => remove(&path),
            Ok(None) => {}
            // Another run's, or gone meanwhile.
            Err(error) => tracing::debug!("cannot tell whether {} is abandoned: {error}", path.display()),
        }
    }
}

/// The lock of a directory that nobody else holds; None where somebody does.
fn lock_abandoned(path: &Path) -> io::Result<Option<File>> {
    let locked = |file: File| flock(&file, FlockOperation::NonBlockingLockExclusive).ok().map(|()| file);
    match File::open(path) {
        // The root of a complete tree may be one that its own owner cannot read. It stays so if somebody is about to
        // publish it, even if that happens now: what is open is the same directory under any name.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let permissions = std::fs::symlink_metadata(path)?.permissions();
            // Readable by now: somebody else is asking the same, and will put back what he found.
            if Mode::from_raw_mode(permissions.mode()).contains(Mode::RUSR) {
                return Ok(None);
            }
            chmod(path, Mode::RWXU)?;
            let file = File::open(path)?;
            let held = file.try_clone()?;
            let locked = locked(file);
            if locked.is_none() {
                held.set_permissions(permissions)?;
            }
            Ok(locked)
        }
        result => Ok(locked(result?)),
    }
}

/// Removes a directory or file of ours. What stays is the user's to remove, so he hears of it.
pub(super) fn remove(path: &Path) {
    let is_directory = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
    match if is_directory { tree::remove(path) } else { std::fs::remove_file(path) } {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!("failed to remove {}: {error}", path.display());
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atomic::tests::names;
    use crate::unpack::tests::without_capabilities;

    #[test]
    fn a_directory_appears_only_when_it_is_published() {
        let dir = tempfile::tempdir().unwrap();
        let destination = dir.path().join("deep/out");
        let staged = StagedDir::create(&destination, false).unwrap();
        std::fs::write(staged.path().join("file"), "new").unwrap();
        assert!(!destination.exists());
        staged.publish(false).unwrap();
        assert_eq!(names(&destination), ["file"]);
        assert_eq!(names(&dir.path().join("deep")), ["out"]);
    }

    #[test]
    fn what_is_there_is_refused_or_replaced_in_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let destination = dir.path().join("out");
        std::fs::create_dir(&destination).unwrap();
        let staged = StagedDir::create(&destination, false).unwrap();
        std::fs::write(destination.join("old"), "").unwrap();
        assert!(matches!(StagedDir::create(&destination, false), Err(OutputError::Taken { .. })));
        assert!(matches!(staged.publish(false), Err(OutputError::Taken { .. })), "it came meanwhile");
        assert_eq!(names(&destination), ["old"]);
        let staged = StagedDir::create(&destination, true).unwrap();
        std::fs::write(staged.path().join("new"), "").unwrap();
        assert_eq!(names(&destination), ["old"]);
        staged.publish(true).unwrap();
        assert_eq!(names(&destination), ["new"]);
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn what_a_killed_run_left_is_removed_and_what_a_living_one_has_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let destination = dir.path().join("out");
        let alive = StagedDir::create(&destination, false).unwrap();
        let dead = dir.path().join(partial_name("out".as_ref(), 1));
        std::fs::create_dir_all(dead.join("sealed/inner")).unwrap();
        std::fs::set_permissions(dead.join("sealed"), std::fs::Permissions::from_mode(0o000)).unwrap();
        let other = dir.path().join(".out.txt.occystrap-partial");
        std::fs::create_dir(&other).unwrap();
        drop(StagedDir::create(&destination, false).unwrap());
        assert!(!dead.exists() && alive.path().exists() && other.exists());
    }

    #[test]
    fn without_any_right_of_root_what_a_killed_run_left_is_removed_whatever_its_modes() {
        without_capabilities(|| {
            let dir = tempfile::tempdir().unwrap();
            let destination = dir.path().join("out");
            let set =
                |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
            for mode in [0o000, 0o111, 0o444, 0o600] {
                let dead = dir.path().join(partial_name("out".as_ref(), 1));
                for inner in ["sealed/inner", "sealed/empty"] {
                    std::fs::create_dir_all(dead.join(inner)).unwrap();
                }
                std::fs::write(dead.join("sealed/inner/file"), "").unwrap();
                for sealed in ["sealed/inner", "sealed/empty", "sealed", ""] {
                    set(&dead.join(sealed), mode);
                }
                drop(StagedDir::create(&destination, false).unwrap());
                assert_eq!(names(dir.path()), [""; 0], "{mode:o}");
            }
        });
    }

    #[test]
    fn a_complete_tree_that_nobody_may_read_stays_so_while_its_run_lives() {
        without_capabilities(|| {
            let dir = tempfile::tempdir().unwrap();
            let destination = dir.path().join("out");
            let alive = StagedDir::create(&destination, false).unwrap();
            std::fs::write(alive.path().join("file"), "").unwrap();
            std::fs::set_permissions(alive.path(), PermissionsExt::from_mode(0o000)).unwrap();
            drop(StagedDir::create(&destination, false).unwrap());
            assert_eq!(alive.path().metadata().unwrap().permissions().mode() & 0o7777, 0);
            alive.publish_tree().unwrap();
            assert_eq!(destination.metadata().unwrap().permissions().mode() & 0o7777, 0);
            // What is replaced is removed, too.
            StagedDir::create(&dir.path().join("other"), false)
                .unwrap()
                .destined(destination)
                .publish_tree()
                .unwrap();
            assert_eq!(names(dir.path()), ["out"]);
        });
    }

    #[test]
    fn what_cannot_be_replaced_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("nothing", &link).unwrap();
        let long = dir.path().join("new").join("x".repeat(256));
        for path in [&*link, Path::new("/proc"), &*long] {
            assert!(
                matches!(StagedDir::create(path, true), Err(OutputError::Io { .. })),
                "{}",
                path.display()
            );
        }
    }

    #[test]
    fn a_file_is_not_replaced_by_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        for replace in [false, true] {
            assert!(matches!(StagedDir::create(&file, replace), Err(OutputError::Io { .. })));
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }
}
