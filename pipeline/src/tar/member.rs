//! One member of a tar: what its headers resolve to, and what a filter made of it.

use super::header::{Block, Dialect};
use super::sparse::Sparse;
use super::{BLOCK, Records, Time, number};

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A file with data, sparse ones included.
    Regular,
    /// Another name of a file that stands earlier in the tar.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharacterDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// PAX records for all members that follow. It is no file: filters of files pass it by.
    Global,
    /// Anything else, by its type flag. It may have data.
    Other(u8),
}

impl Kind {
    /// Whether bytes follow the headers. Go and Python ignore the sizes that other kinds may claim.
    pub fn has_data(self) -> bool {
        matches!(self, Self::Regular | Self::Other(_))
    }
}

/// Where a member's data comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Content {
    /// From the tar, behind the headers.
    #[default]
    Stored,
    /// From what the pass kept aside of an earlier member.
    Kept {
        /// The first byte's place among all bytes that were kept.
        start: u64,
        /// In bytes, as stored in the tar.
        length: u64,
    },
}

/// A member with resolved metadata: the header, overridden by global records, overridden by its own.
///
/// Methods that change it mark it as edited; an edited member is encoded anew where an unedited one is copied raw.
#[derive(Clone, Debug)]
pub struct Member {
    pub(super) offset: u64,
    pub(super) block: Block,
    pub(super) dialect: Dialect,
    /// The header is one block, and what it means depends on no other.
    pub(super) plain: bool,
    pub(super) flag: u8,
    pub(super) kind: Kind,
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) uname: Vec<u8>,
    pub(super) gname: Vec<u8>,
    pub(super) mode: u32,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) mtime: Time,
    pub(super) mtime_is_global: bool,
    pub(super) major: i64,
    pub(super) minor: i64,
    /// atime and ctime of GNU and star headers, where set.
    pub(super) header_times: [Option<i64>; 2],
    pub(super) stored: u64,
    pub(super) size: u64,
    pub(super) sparse: Option<Sparse>,
    pub(super) records: Records,
    pub(super) content: Content,
    pub(super) edits: Edits,
}

/// What was changed, as far as the encoder must know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Edits {
    /// Counts changes.
    pub(super) count: u32,
    /// The modification time is not the source's.
    pub(super) mtime: bool,
    /// Something that lies outside the header's time fields is not the source's.
    pub(super) other: bool,
}

impl Default for Member {
    fn default() -> Self {
        Self {
            offset: 0,
            block: [0; BLOCK],
            dialect: Dialect::Ustar,
            plain: true,
            flag: b'0',
            kind: Kind::Regular,
            path: Vec::new(),
            link: Vec::new(),
            uname: Vec::new(),
            gname: Vec::new(),
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            mtime_is_global: false,
            major: 0,
            minor: 0,
            header_times: [None; 2],
            stored: 0,
            size: 0,
            sparse: None,
            records: Records::default(),
            content: Content::default(),
            edits: Edits::default(),
        }
    }
}

impl Member {
    /// Of its first header block, in bytes from the beginning of the tar.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its name as written, with any `./` or trailing `/`.
    pub fn path(&self) -> &[u8] {
        &self.path
    }

    /// The target of a symbolic or hard link.
    pub fn link(&self) -> &[u8] {
        &self.link
    }

    /// Permission bits, and whatever else the mode field holds.
    pub fn mode(&self) -> u32 {
        self.mode
    }

    /// The numeric owner.
    pub fn uid(&self) -> i64 {
        self.uid
    }

    /// The numeric group.
    pub fn gid(&self) -> i64 {
        self.gid
    }

    /// The owner's name.
    pub fn uname(&self) -> &[u8] {
        &self.uname
    }

    /// The group's name.
    pub fn gname(&self) -> &[u8] {
        &self.gname
    }

    /// The modification time.
    pub fn mtime(&self) -> Time {
        self.mtime
    }

    /// Whether the modification time comes from a global header, which some readers (Go) ignore.
    pub fn mtime_is_global(&self) -> bool {
        self.mtime_is_global
    }

    /// Major and minor number of a device.
    pub fn device(&self) -> (i64, i64) {
        (self.major, self.minor)
    }

    /// The size of the file, in bytes: of a sparse one with its holes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The size of what the tar stores of it, in bytes without padding.
    pub fn stored_size(&self) -> u64 {
        self.stored
    }

    /// The map of a sparse file.
    pub fn sparse(&self) -> Option<&Sparse> {
        self.sparse.as_ref()
    }

    /// Its PAX records, those included that the other methods have already applied.
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// Where its data comes from.
    pub fn content(&self) -> Content {
        self.content
    }

    /// Whether anything was changed.
    pub fn is_edited(&self) -> bool {
        self.edits.count > 0
    }

    /// How many changes were made: filters that made none in between left it equal.
    pub fn edit_count(&self) -> u32 {
        self.edits.count
    }

    /// Sets the modification time.
    pub fn set_mtime(&mut self, mtime: Time) {
        self.mtime = mtime;
        self.mtime_is_global = false;
        self.records.remove(b"mtime");
        self.edits.mtime = true;
        self.edits.count += 1;
    }

    /// Removes a PAX record, and says whether there was one.
    pub fn remove_record(&mut self, key: &[u8]) -> bool {
        let removed = !self.records.is_empty() && self.records.remove(key);
        if removed {
            self.edits.other = true;
            self.edits.count += 1;
        }
        removed
    }

    /// Gives a global header no time of its own: those that we write have none. Says whether it had one.
    pub fn remove_global_time(&mut self) -> bool {
        debug_assert_eq!(self.kind, Kind::Global);
        let had_time = number::field(&self.block[super::header::MTIME]).is_some_and(|time| time != 0);
        if had_time {
            self.block[super::header::MTIME].fill(0);
            self.edits.other = true;
            self.edits.count += 1;
        }
        had_time
    }

    /// Removes atime and ctime from a GNU or star header, and says whether there were any.
    pub fn remove_header_times(&mut self) -> bool {
        let removed = self.header_times != [None; 2];
        if removed {
            self.header_times = [None; 2];
            self.edits.count += 1;
        }
        removed
    }

    /// Points a link to another target.
    pub fn set_link(&mut self, link: &[u8]) {
        self.link.clear();
        self.link.extend_from_slice(link);
        self.records.remove(b"linkpath");
        self.edits.other = true;
        self.edits.count += 1;
    }

    /// Becomes what another member was, under its own name and at its own place.
    pub fn become_copy_of(&mut self, other: &Self, content: Content) {
        let mut copy = other.clone();
        std::mem::swap(&mut copy.path, &mut self.path);
        copy.offset = self.offset;
        copy.content = content;
        copy.plain = false;
        copy.edits = Edits { count: self.edits.count + 1, mtime: self.edits.mtime, other: true };
        *self = copy;
    }

    /// About how much memory a clone takes, in bytes.
    pub(crate) fn memory(&self) -> usize {
        let segments = match &self.sparse {
            Some(Sparse::InHeaders(segments)) => size_of_val(segments.as_slice()),
            Some(Sparse::InData) | None => 0,
        };
        size_of::<Self>() + self.path.len() + self.link.len() + self.records.size() + segments
    }

    /// Has it encoded anew although nothing is different: for tests of the encoder.
    #[doc(hidden)]
    pub fn force_encoding(&mut self) {
        self.edits.other = true;
        self.edits.count += 1;
    }
}
