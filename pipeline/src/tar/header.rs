//! One header block: where its fields lie, which format wrote it, and its checksum.

use std::ops::Range;

use super::{BLOCK, number};

pub(super) type Block = [u8; BLOCK];

pub(super) const NAME: Range<usize> = 0..100;
pub(super) const MODE: Range<usize> = 100..108;
pub(super) const UID: Range<usize> = 108..116;
pub(super) const GID: Range<usize> = 116..124;
pub(super) const SIZE: Range<usize> = 124..136;
pub(super) const MTIME: Range<usize> = 136..148;
pub(super) const CHECKSUM: Range<usize> = 148..156;
pub(super) const FLAG: usize = 156;
pub(super) const LINK: Range<usize> = 157..257;
pub(super) const MAGIC: Range<usize> = 257..265;
pub(super) const UNAME: Range<usize> = 265..297;
pub(super) const GNAME: Range<usize> = 297..329;
pub(super) const MAJOR: Range<usize> = 329..337;
pub(super) const MINOR: Range<usize> = 337..345;
pub(super) const PREFIX: Range<usize> = 345..500;

pub(super) const GNU_ATIME: Range<usize> = 345..357;
pub(super) const GNU_CTIME: Range<usize> = 357..369;
pub(super) const GNU_SPARSE: Range<usize> = 386..482;
pub(super) const GNU_SPARSE_EXTENDED: usize = 482;
pub(super) const GNU_REAL_SIZE: Range<usize> = 483..495;
/// In a block that continues the map of an old GNU sparse file.
pub(super) const CONTINUED_SPARSE: Range<usize> = 0..504;
pub(super) const CONTINUED_EXTENDED: usize = 504;

pub(super) const STAR_PREFIX: Range<usize> = 345..476;
pub(super) const STAR_ATIME: Range<usize> = 476..488;
pub(super) const STAR_CTIME: Range<usize> = 488..500;

pub(super) const USTAR_MAGIC: &[u8; 8] = b"ustar\x0000";

/// Who wrote a header, as far as the meaning of its fields depends on that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// Before POSIX: no owner names, no devices, no prefix.
    V7,
    /// POSIX, also as the header of a PAX member.
    Ustar,
    /// atime, ctime and a sparse map in the place of the prefix.
    Gnu,
    /// A shorter prefix, then atime and ctime.
    Star,
}

impl Dialect {
    pub(super) fn of(block: &Block) -> Self {
        match &block[MAGIC] {
            b"ustar  \0" => Self::Gnu,
            [b'u', b's', b't', b'a', b'r', 0, ..] if block[508..].starts_with(b"tar\0") => Self::Star,
            [b'u', b's', b't', b'a', b'r', 0, ..] => Self::Ustar,
            _ => Self::V7,
        }
    }
}

/// The numbers of a header, all of which must parse: Go and Python refuse a header for any that does not.
pub(super) struct Numbers {
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) size: i64,
    pub(super) mtime: i64,
    pub(super) major: i64,
    pub(super) minor: i64,
}

impl Numbers {
    /// The numbers, or the name of one that is malformed.
    pub(super) fn parse(block: &Block) -> Result<Self, &'static str> {
        let field = |range: Range<usize>, name| number::field(&block[range]).ok_or(name);
        let has_devices = Dialect::of(block) != Dialect::V7;
        Ok(Self {
            mode: field(MODE, "mode")?,
            uid: field(UID, "uid")?,
            gid: field(GID, "gid")?,
            size: field(SIZE, "size")?,
            mtime: field(MTIME, "mtime")?,
            major: if has_devices { field(MAJOR, "major device number")? } else { 0 },
            minor: if has_devices { field(MINOR, "minor device number")? } else { 0 },
        })
    }
}

/// The bytes before the first NUL.
pub(super) fn text(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    &bytes[..end]
}

/// Whether the header's checksum is right: the sum of the unsigned bytes, or of the signed ones, as SunOS summed them.
pub(super) fn checksum_matches(block: &Block) -> bool {
    let Some(stored) = number::octal(&block[CHECKSUM]) else { return false };
    let unsigned = unsigned_sum(block);
    if stored == i64::from(unsigned) {
        return true;
    }
    // A byte of 128 or more counts 256 less as a signed one.
    let field = &block[CHECKSUM];
    let high = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte >= 0x80).count() as i64;
    stored == i64::from(unsigned) - 256 * (high(block) - high(field))
}

/// Computes and writes the checksum.
pub(super) fn seal(block: &mut Block) {
    let sum = unsigned_sum(block);
    number::write_octal(&mut block[CHECKSUM.start..CHECKSUM.end - 1], i64::from(sum));
    block[CHECKSUM.end - 1] = b' ';
}

/// The sum of all bytes, with spaces for the checksum itself.
fn unsigned_sum(block: &Block) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>();
    sum(block) - sum(&block[CHECKSUM]) + 8 * u32::from(b' ')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signed_and_unsigned_checksums_are_accepted() {
        let mut block = [0; BLOCK];
        block[..4].copy_from_slice(b"\xff\xfeab");
        seal(&mut block);
        assert!(checksum_matches(&block));
        let unsigned = i64::from(unsigned_sum(&block));
        number::write_octal(&mut block[CHECKSUM], unsigned - 512);
        assert!(checksum_matches(&block));
        number::write_octal(&mut block[CHECKSUM], unsigned - 511);
        assert!(!checksum_matches(&block));
    }
}
