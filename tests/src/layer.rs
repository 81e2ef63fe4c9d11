//! Layers: tars written header by header, so that a test decides every byte.

use crate::tools::Packing;

/// One member of a tar.
#[derive(Clone, Debug)]
pub struct Member {
    name: String,
    kind: u8,
    mode: u32,
    owner: (u32, u32),
    mtime: u64,
    link: String,
    data: Vec<u8>,
    device: Option<(u32, u32)>,
    pax: Vec<(String, Vec<u8>)>,
    stated_size: Option<u64>,
}

impl Member {
    fn new(name: &str, kind: u8) -> Self {
        Self {
            name: name.to_owned(),
            kind,
            mode: 0o644,
            owner: (0, 0),
            mtime: 1_700_000_000,
            link: String::new(),
            data: Vec::new(),
            device: None,
            pax: Vec::new(),
            stated_size: None,
        }
    }

    /// A member of any type, also of none that there is.
    pub fn raw(name: &str, kind: u8, data: impl AsRef<[u8]>) -> Self {
        Self { data: data.as_ref().to_vec(), ..Self::new(name, kind) }
    }

    /// A regular file.
    pub fn file(name: &str, data: impl AsRef<[u8]>) -> Self {
        Self { data: data.as_ref().to_vec(), ..Self::new(name, b'0') }
    }

    /// A directory; its name ends with a slash as tar has it.
    pub fn dir(name: &str) -> Self {
        Self { mode: 0o755, ..Self::new(&format!("{}/", name.trim_end_matches('/')), b'5') }
    }

    /// A symbolic link.
    pub fn symlink(name: &str, target: &str) -> Self {
        Self { link: target.to_owned(), mode: 0o777, ..Self::new(name, b'2') }
    }

    /// A hard link.
    pub fn hardlink(name: &str, target: &str) -> Self {
        Self { link: target.to_owned(), ..Self::new(name, b'1') }
    }

    /// A character device.
    pub fn device(name: &str, major: u32, minor: u32) -> Self {
        Self { device: Some((major, minor)), ..Self::new(name, b'3') }
    }

    /// A named pipe.
    pub fn fifo(name: &str) -> Self {
        Self::new(name, b'6')
    }

    /// With a mode.
    #[must_use]
    pub fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    /// With an owner and a group.
    #[must_use]
    pub fn owner(self, user: u32, group: u32) -> Self {
        Self { owner: (user, group), ..self }
    }

    /// With a modification time, in seconds.
    #[must_use]
    pub fn mtime(self, mtime: u64) -> Self {
        Self { mtime, ..self }
    }

    /// With a size in its header that is not the data's.
    #[must_use]
    pub fn stating_size(self, size: u64) -> Self {
        Self { stated_size: Some(size), ..self }
    }

    /// With a PAX record.
    #[must_use]
    pub fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.to_owned(), value.as_ref().to_vec()));
        self
    }

    /// With an extended attribute.
    #[must_use]
    pub fn xattr(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax(&format!("SCHILY.xattr.{name}"), value)
    }

    fn write(&self, tar: &mut Vec<u8>) {
        let mut records = self.pax.clone();
        for (key, value) in [("path", &self.name), ("linkpath", &self.link)] {
            if value.len() > 100 || !value.is_ascii() {
                records.push((key.to_owned(), value.clone().into_bytes()));
            }
        }
        if !records.is_empty() {
            let body: Vec<u8> = records.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
            let head = Self { data: body, ..Self::new("./PaxHeaders/member", b'x') };
            head.write_plain(tar);
        }
        self.write_plain(tar);
    }

    fn write_plain(&self, tar: &mut Vec<u8>) {
        let mut header = [0_u8; 512];
        let mut put = |at: usize, bytes: &[u8], room: usize| {
            let bytes = &bytes[..bytes.len().min(room)];
            header[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, self.name.as_bytes(), 100);
        put(100, format!("{:07o}\0", self.mode).as_bytes(), 8);
        put(108, format!("{:07o}\0", self.owner.0).as_bytes(), 8);
        put(116, format!("{:07o}\0", self.owner.1).as_bytes(), 8);
        put(124, format!("{:011o}\0", self.stated_size.unwrap_or(self.data.len() as u64)).as_bytes(), 12);
        put(136, format!("{:011o}\0", self.mtime).as_bytes(), 12);
        put(148, b"        ", 8);
        put(156, &[self.kind], 1);
        put(157, self.link.as_bytes(), 100);
        put(257, b"ustar\x0000", 8);
        if let Some((major, minor)) = self.device {
            put(329, format!("{major:07o}\0").as_bytes(), 8);
            put(337, format!("{minor:07o}\0").as_bytes(), 8);
        }
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.extend_from_slice(&header);
        tar.extend_from_slice(&self.data);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself (POSIX pax).
fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    let mut record = format!("{length} {key}=").into_bytes();
    record.extend_from_slice(value);
    record.push(b'\n');
    record
}

/// A tar of the members with its end marker.
pub fn tar(members: &[Member]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for member in members {
        member.write(&mut bytes);
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

/// A layer: its tar, and what it is stored as.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The uncompressed tar.
    pub tar: Vec<u8>,
    /// How it is stored.
    pub packing: Packing,
    /// Where a foreign layer can be had; such a layer is not in the registry.
    pub urls: Vec<String>,
    /// Of the descriptor.
    pub annotations: Vec<(String, String)>,
}

impl Layer {
    /// A gzipped layer of the members.
    pub fn of(members: &[Member]) -> Self {
        Self::from_tar(tar(members))
    }

    /// A gzipped layer of any bytes.
    pub fn from_tar(tar: Vec<u8>) -> Self {
        Self { tar, packing: Packing::Gzip, urls: Vec::new(), annotations: Vec::new() }
    }

    /// A layer of one file that no compression makes smaller, always the same for the same seed.
    pub fn noise(seed: u64, bytes: usize) -> Self {
        Self::of(&[Member::dir("data"), Member::file(&format!("data/noise-{seed}"), noise(seed, bytes))])
    }

    /// Stored in another way.
    #[must_use]
    pub fn packed(self, packing: Packing) -> Self {
        Self { packing, ..self }
    }

    /// Foreign, to be had at the URL.
    #[must_use]
    pub fn foreign(self, url: &str) -> Self {
        Self { urls: vec![url.to_owned()], ..self }
    }

    /// With an annotation.
    #[must_use]
    pub fn annotated(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    /// The bytes as stored.
    pub fn blob(&self) -> Vec<u8> {
        self.packing.pack(&self.tar)
    }
}

/// Bytes that no compression makes smaller, always the same for the same seed (xorshift64*).
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        out.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// The types of a tar's headers as they stand there, extension headers included (`x` PAX, `L` and `K` GNU's long names).
pub fn header_types(tar: &[u8]) -> String {
    let mut types = String::new();
    let mut at = 0;
    while let Some(header) = tar.get(at..at + 512).filter(|header| header[0] != 0) {
        types.push(char::from(header[156]));
        let octal = String::from_utf8_lossy(&header[124..136]);
        let size = usize::from_str_radix(octal.trim_matches(['\0', ' ']), 8).expect("an octal size");
        at += 512 + size.next_multiple_of(512);
    }
    types
}
