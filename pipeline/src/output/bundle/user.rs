//! Whom a container runs as: `Config.User` of the image, looked up in the users and groups of its own tree.

use std::io;
use std::path::Path;

use crate::unpack;

/// A database of users or groups may have this many bytes.
const LARGEST: u64 = 16 * 1024 * 1024;

/// Whom a container runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) additional_gids: Vec<u32>,
    /// The home directory, where the tree knows the user.
    pub(super) home: Option<String>,
}

/// Why nobody can be found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UserError {
    /// The image wants a name that its own tree does not know.
    #[error("the image runs as {user:?}, and its {database} has no {missing:?}")]
    Unknown {
        /// As the config has it.
        user: String,
        /// Where it was looked for.
        database: &'static str,
        /// Which part is unknown.
        missing: String,
    },
    /// The database cannot be read.
    #[error("failed to read {database} of the tree: {source}")]
    Io {
        /// Which.
        database: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
}

const PASSWD: &str = "etc/passwd";
const GROUP: &str = "etc/group";

impl User {
    /// Finds `user`, `uid`, `user:group` and every mixture of them in the tree at `rootfs`; nothing is uid 0.
    pub(super) fn find(text: &str, rootfs: &Path) -> Result<Self, UserError> {
        let (name, group) = match text.split_once(':') {
            Some((name, group)) => (name, Some(group).filter(|group| !group.is_empty())),
            None => (text, None),
        };
        let is_name = |text: &str| !text.is_empty() && number(text).is_none();
        let passwd = read(rootfs, PASSWD, is_name(name))?;
        let groups = read(rootfs, GROUP, group.is_some_and(is_name))?;
        let entry = fields(&passwd).find(|fields| match (name, number(name)) {
            ("", _) => number(fields[2]) == Some(0),
            (_, Some(uid)) => number(fields[2]) == Some(uid),
            (name, None) => fields[0] == name,
        });
        let unknown = |database, missing: &str| UserError::Unknown {
            user: text.to_owned(),
            database,
            missing: missing.to_owned(),
        };
        let mut found = match &entry {
            Some(fields) => Self {
                uid: number(fields[2]).ok_or_else(|| unknown(PASSWD, name))?,
                gid: fields.get(3).and_then(|gid| number(gid)).unwrap_or(0),
                home: fields.get(5).filter(|home| home.starts_with('/')).map(|home| (*home).to_owned()),
                additional_gids: Vec::new(),
            },
            None if name.is_empty() => Self::default(),
            None => Self { uid: number(name).ok_or_else(|| unknown(PASSWD, name))?, ..Self::default() },
        };
        match group {
            Some(group) => {
                let by_name = fields(&groups).find(|fields| fields[0] == group);
                let gid = by_name.and_then(|fields| number(fields[2])).or_else(|| number(group));
                found.gid = gid.ok_or_else(|| unknown(GROUP, group))?;
            }
            None => {
                let user = entry.map_or("", |fields| fields[0]);
                let member = |fields: &Vec<&str>| {
                    fields.get(3).is_some_and(|users| users.split(',').any(|one| one == user))
                };
                let gids = fields(&groups).filter(|fields| !user.is_empty() && member(fields));
                found.additional_gids = gids.filter_map(|fields| number(fields[2])).collect();
                found.additional_gids.sort_unstable();
                found.additional_gids.dedup();
            }
        }
        Ok(found)
    }
}

/// A database of the tree. One that cannot be read is as good as empty where no name has to be found in it.
fn read(rootfs: &Path, database: &'static str, is_needed: bool) -> Result<String, UserError> {
    let bytes = match unpack::read_in_root(rootfs, database.as_bytes(), LARGEST) {
        Ok(bytes) => bytes.unwrap_or_default(),
        Err(source) if is_needed => return Err(UserError::Io { database, source }),
        Err(error) => {
            tracing::warn!("failed to read {database} of the tree, which is taken for empty: {error}");
            Vec::new()
        }
    };
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The lines that are entries: at least a name, a password and a number.
fn fields(database: &str) -> impl Iterator<Item = Vec<&str>> {
    database
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split(':').collect::<Vec<_>>())
        .filter(|fields| fields.len() >= 3)
}

/// An id. 2^32 - 1 is none: to the kernel it means "no change".
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|&id| id != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\n# no:x:7:7::/:\nbroken\napp:x:1000:100:App:/home/app:/bin/sh\n";
        std::fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
        let group = "root:x:0:\nusers:x:100:\naudio:x:29:app,other\nvideo:x:44:app\n";
        std::fs::write(dir.path().join("etc/group"), group).unwrap();
        dir
    }

    #[test]
    fn users_are_names_or_numbers_of_the_image_itself() {
        let dir = tree();
        let user = |uid, gid, gids: &[u32], home: Option<&str>| User {
            uid,
            gid,
            additional_gids: gids.to_vec(),
            home: home.map(str::to_owned),
        };
        for (text, expected) in [
            ("", user(0, 0, &[], Some("/root"))),
            ("root", user(0, 0, &[], Some("/root"))),
            ("app", user(1000, 100, &[29, 44], Some("/home/app"))),
            ("1000", user(1000, 100, &[29, 44], Some("/home/app"))),
            ("app:", user(1000, 100, &[29, 44], Some("/home/app"))),
            ("app:audio", user(1000, 29, &[], Some("/home/app"))),
            ("app:55", user(1000, 55, &[], Some("/home/app"))),
            ("4242", user(4242, 0, &[], None)),
            ("4242:users", user(4242, 100, &[], None)),
        ] {
            assert_eq!(User::find(text, dir.path()).unwrap(), expected, "{text}");
        }
        for unknown in ["nobody", "app:nogroup", "-1", "4294967295", "no"] {
            assert!(matches!(User::find(unknown, dir.path()), Err(UserError::Unknown { .. })), "{unknown}");
        }
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(User::find("", empty.path()).unwrap(), User::default());
        assert_eq!(User::find("5:6", empty.path()).unwrap(), user(5, 6, &[], None));
        assert!(User::find("app", empty.path()).is_err());
    }

    #[test]
    fn databases_that_are_no_files_matter_to_names_only() {
        let dir = tempfile::tempdir().unwrap();
        for database in [PASSWD, GROUP] {
            std::fs::create_dir_all(dir.path().join(database)).unwrap();
        }
        let user = |uid, gid| User { uid, gid, ..User::default() };
        for (text, expected) in
            [("", user(0, 0)), ("0:0", user(0, 0)), ("5", user(5, 0)), ("5:6", user(5, 6))]
        {
            assert_eq!(User::find(text, dir.path()).unwrap(), expected, "{text}");
        }
        for (text, database) in [("app", PASSWD), ("app:6", PASSWD), ("5:users", GROUP)] {
            match User::find(text, dir.path()) {
                Err(UserError::Io { database: named, .. }) => assert_eq!(named, database, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn databases_are_the_images_own_wherever_their_links_point() {
        let dir = tree();
        let etc = dir.path().join("etc");
        std::fs::rename(etc.join("passwd"), dir.path().join("users")).unwrap();
        std::os::unix::fs::symlink("/users", etc.join("passwd")).unwrap();
        assert_eq!(User::find("app", dir.path()).unwrap().uid, 1000);
        std::fs::remove_file(etc.join("passwd")).unwrap();
        std::os::unix::fs::symlink("../../../../../../../../../etc/passwd", etc.join("passwd")).unwrap();
        assert!(
            User::find("daemon", dir.path()).is_err(),
            "a loop in the image, and nothing of this machine"
        );
    }
}
