//! Digests: `algorithm:hex` as the OCI image-spec's `descriptor.md` defines them, and the hasher that computes them.
//!
//! A [`Digest`] that exists is well formed, so it may be joined into a path or a URL without another check.

use std::fmt;
use std::str::FromStr;

use sha2::digest::Digest as _;
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Sha256, Sha512};

/// The hash algorithms that image-spec registers and that we compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// SHA-256, the one that everything uses.
    Sha256,
    /// SHA-512, which image-spec allows.
    Sha512,
}

impl Algorithm {
    /// The registered name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    fn hex_len(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// A well-formed digest: a known algorithm and its lower-case hex of the right length.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: Algorithm,
    hex: Box<str>,
}

/// Why a string is not a digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid digest {text:?}: {reason}")]
pub struct InvalidDigest {
    text: String,
    reason: &'static str,
}

impl Digest {
    /// The SHA-256 of bytes that are at hand.
    pub fn sha256(bytes: impl AsRef<[u8]>) -> Self {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(bytes.as_ref());
        hasher.finish()
    }

    /// A SHA-256 digest from its bare hex.
    pub fn from_sha256_hex(hex: &str) -> Result<Self, InvalidDigest> {
        format!("sha256:{hex}").parse()
    }

    /// The algorithm.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Whether it is of another algorithm than the one that registries use by themselves.
    pub fn is_rare(&self) -> bool {
        self.algorithm != Algorithm::Sha256
    }

    /// The hex part alone, lower case.
    pub fn hex(&self) -> &str {
        &self.hex
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // The text may be a hostile document's; an error must not carry megabytes of it.
        let fail = |reason| InvalidDigest { text: text.chars().take(160).collect(), reason };
        let (name, hex) = text.split_once(':').ok_or_else(|| fail("no algorithm"))?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return Err(fail("unknown algorithm")),
        };
        if hex.len() != algorithm.hex_len() {
            return Err(fail("wrong length"));
        }
        if !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(fail("not lower-case hex"));
        }
        Ok(Self { algorithm, hex: hex.into() })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Hashes bytes as they pass and counts them. A clone forks the state, so that two streams share a common prefix's cost.
#[derive(Clone, Debug)]
pub struct Hasher {
    state: State,
    size: u64,
}

#[derive(Clone, Debug)]
enum State {
    Sha256(Sha256),
    Sha512(Sha512),
}

/// What the first byte of a hasher's state says of the others. A form that changes, with the crate, gets another byte.
const FORM_SHA256: u8 = 1;
const FORM_SHA512: u8 = 2;

/// More bytes than any blob has. The algorithms count bits.
const SIZE_MAX: u64 = 1 << 60;

/// A state of the crate's own form: words, a number of blocks, a number of bytes behind these, and these bytes. The crate believes both
/// numbers, so they are looked at here.
fn deserialized<H: SerializableState>(bytes: &[u8], words: usize, blocks: &[u8], rest: u64) -> Option<H> {
    let state = <&SerializedState<H>>::try_from(bytes).ok()?;
    let numbers = bytes[words..].strip_prefix(blocks)?;
    (u64::from(*numbers.first()?) == rest).then(|| H::deserialize(state).ok()).flatten()
}

impl Hasher {
    /// An empty hasher.
    pub fn new(algorithm: Algorithm) -> Self {
        let state = match algorithm {
            Algorithm::Sha256 => State::Sha256(Sha256::new()),
            Algorithm::Sha512 => State::Sha512(Sha512::new()),
        };
        Self { state, size: 0 }
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.size += bytes.len() as u64;
        match &mut self.state {
            State::Sha256(state) => state.update(bytes),
            State::Sha512(state) => state.update(bytes),
        }
    }

    /// Bytes taken so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What it computes.
    pub fn algorithm(&self) -> Algorithm {
        match self.state {
            State::Sha256(_) => Algorithm::Sha256,
            State::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// The state, with which [`from_state`](Self::from_state) goes on in another process: at most 256 bytes, whose form is that of the
    /// crate behind it.
    pub fn state(&self) -> Vec<u8> {
        let (form, state) = match &self.state {
            State::Sha256(state) => (FORM_SHA256, state.serialize().to_vec()),
            State::Sha512(state) => (FORM_SHA512, state.serialize().to_vec()),
        };
        [&[form], self.size.to_le_bytes().as_slice(), &state].concat()
    }

    /// A hasher that has taken the bytes which another one had taken when it gave its [`state`](Self::state). None for bytes of
    /// another form. That they are true shows in the digest alone.
    pub fn from_state(bytes: &[u8]) -> Option<Self> {
        let (&form, rest) = bytes.split_first()?;
        let (size, state) = rest.split_first_chunk()?;
        let size = u64::from_le_bytes(*size);
        let state = match form {
            FORM_SHA256 => State::Sha256(deserialized(state, 32, &(size / 64).to_le_bytes(), size % 64)?),
            FORM_SHA512 => {
                let blocks = u128::from(size / 128).to_le_bytes();
                State::Sha512(deserialized(state, 64, &blocks, size % 128)?)
            }
            _ => return None,
        };
        (size < SIZE_MAX).then_some(Self { state, size })
    }

    /// The digest of all bytes taken.
    pub fn finish(self) -> Digest {
        let (algorithm, bytes) = match self.state {
            State::Sha256(state) => (Algorithm::Sha256, state.finalize().to_vec()),
            State::Sha512(state) => (Algorithm::Sha512, state.finalize().to_vec()),
        };
        let mut hex = String::with_capacity(bytes.len() * 2);
        for byte in bytes {
            for nibble in [byte >> 4, byte & 15] {
                hex.push(char::from_digit(u32::from(nibble), 16).expect("a nibble is a hex digit"));
            }
        }
        Digest { algorithm, hex: hex.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_well_formed_digests_parse() {
        let good = Digest::sha256(b"");
        assert_eq!(
            good.to_string(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert_eq!(good.to_string().parse::<Digest>(), Ok(good.clone()));
        let upper = good.to_string().to_uppercase();
        for bad in [
            "",
            "sha256",
            "sha256:",
            "sha256:../../etc/passwd",
            "md5:abcd",
            upper.as_str(),
            &good.to_string()[..70],
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_cloned_hasher_forks_the_stream() {
        let mut one = Hasher::new(Algorithm::Sha256);
        one.update(b"common ");
        let mut two = one.clone();
        one.update(b"left");
        two.update(b"right");
        assert_eq!(two.size(), 12);
        assert_eq!(one.finish(), Digest::sha256(b"common left"));
        assert_eq!(two.finish(), Digest::sha256(b"common right"));
    }

    #[test]
    fn a_hasher_goes_on_from_its_state_after_any_number_of_bytes() {
        let bytes: Vec<u8> = (0..300_u32).map(|at| at.to_le_bytes()[0]).collect();
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let mut whole = Hasher::new(algorithm);
            whole.update(&bytes);
            for at in 0..=bytes.len() {
                let mut before = Hasher::new(algorithm);
                before.update(&bytes[..at]);
                let state = before.state();
                assert!(state.len() <= 256, "{}", state.len());
                let mut after = Hasher::from_state(&state).unwrap();
                assert_eq!((after.size(), after.algorithm()), (at as u64, algorithm));
                after.update(&bytes[at..]);
                assert_eq!(after.finish(), whole.clone().finish());
            }
        }
    }

    #[test]
    fn what_is_no_state_makes_no_hasher() {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(&[7; 100]);
        let state = hasher.state();
        for end in 0..state.len() {
            assert!(Hasher::from_state(&state[..end]).is_none(), "{end}");
        }
        assert!(Hasher::from_state(&[state.as_slice(), &[0]].concat()).is_none());
        assert!(Hasher::from_state(&[&[3], &state[1..]].concat()).is_none(), "an unknown form");
        assert!(Hasher::from_state(&[&[2], &state[1..]].concat()).is_none(), "of another algorithm");
        // Whatever else is changed makes another digest, or no hasher, and breaks nothing.
        for at in 1..state.len() {
            let mut other = state.clone();
            other[at] ^= 0xff;
            if let Some(mut other) = Hasher::from_state(&other) {
                other.update(b"more");
                let _ = other.finish();
            }
        }
    }

    /// Workers of different builds give each other these bytes: where they change, so must the form's number.
    #[test]
    fn the_form_of_a_state_is_this_one() {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(&[b'a'; 65]);
        let hash = Digest::sha256(hasher.state());
        assert_eq!(hash.hex(), "0872ccd153ae41d15a3dff6e6f7bfeb5e42c68901bacdebfc1caf8be752a0c08");
    }
}
