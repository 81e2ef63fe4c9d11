//! Content of an upload that is held in memory until the registry has it.

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};

use crate::blob::{BlobError, BlobSummary, ByteStream, LayerPiece, LayerStream};
use crate::digest::{Digest, Hasher};

/// What comes in smaller pieces than this, in bytes, is copied together.
const PIECE_MIN: usize = 64 * 1024;

/// Bytes in the pieces in which they came, so that little is copied.
#[derive(Clone, Debug, Default)]
pub(super) struct Chunks {
    pieces: Vec<Bytes>,
    size: u64,
}

impl Chunks {
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn is_empty(&self) -> bool {
        self.size == 0
    }

    fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.size += bytes.len() as u64;
            self.pieces.push(bytes);
        }
    }

    /// All but the first bytes.
    pub(super) fn tail(&self, mut skip: u64) -> Self {
        let mut rest = Self::default();
        for piece in &self.pieces {
            match usize::try_from(skip) {
                Ok(skipped) if skipped < piece.len() => {
                    rest.push(piece.slice(skipped..));
                    skip = 0;
                }
                _ => skip -= piece.len() as u64,
            }
        }
        rest
    }

    /// What a request's body is made of.
    pub(super) fn stream(&self) -> ByteStream {
        stream::iter(self.pieces.clone()).map(Ok).boxed()
    }
}

impl From<Bytes> for Chunks {
    fn from(bytes: Bytes) -> Self {
        let mut chunks = Self::default();
        chunks.push(bytes);
        chunks
    }
}

/// Where the bytes come from, and at their end their sum.
pub(super) struct Pieces {
    content: Content,
    summary: Option<BlobSummary>,
    /// Bytes that came and were not wanted yet.
    rest: Bytes,
    passed: u64,
    /// Of the bytes that have passed, where somebody wants to know.
    hasher: Option<Hasher>,
}

enum Content {
    Layer(LayerStream),
    Blob(ByteStream, BlobSummary),
}

impl Pieces {
    pub(super) fn of_layer(stream: LayerStream) -> Self {
        Self::of(Content::Layer(stream))
    }

    pub(super) fn of_blob(stream: ByteStream, digest: &Digest, size: u64) -> Self {
        let summary = BlobSummary { digest: digest.clone(), size };
        Self::of(Content::Blob(stream, summary))
    }

    fn of(content: Content) -> Self {
        Self { content, summary: None, rest: Bytes::new(), passed: 0, hasher: None }
    }

    /// The same, hashed, which begin behind the bytes that the hasher has taken.
    pub(super) fn hashed(self, hasher: Hasher) -> Self {
        Self { passed: hasher.size(), hasher: Some(hasher), ..self }
    }

    /// The state of the hash of all that has passed.
    pub(super) fn hasher(&self) -> Option<Hasher> {
        self.hasher.clone()
    }

    /// Passes what a session has already. False if that are not the bytes that `known` has taken, or there are not so many.
    pub(super) async fn go_on_at(&mut self, known: &Hasher, committed: u64) -> Result<bool, BlobError> {
        if !self.pass(known.size()).await? {
            return Ok(false);
        }
        let is_same = self.hasher().is_some_and(|hasher| hasher.finish() == known.clone().finish());
        Ok(is_same && self.pass(committed).await?)
    }

    /// Drops bytes until so many have passed. False if there are not so many, or there were more already.
    async fn pass(&mut self, end: u64) -> Result<bool, BlobError> {
        while self.passed < end {
            if self.take(end - self.passed).await?.is_none() {
                return Ok(false);
            }
        }
        Ok(self.passed == end)
    }

    /// The digest, as soon as it is known.
    pub(super) fn digest(&self) -> Option<&Digest> {
        match &self.content {
            Content::Layer(_) => self.summary.as_ref().map(|summary| &summary.digest),
            Content::Blob(_, summary) => Some(&summary.digest),
        }
    }

    /// The digest, where it was known before the bytes.
    pub(super) fn known_digest(&self) -> Option<Digest> {
        match &self.content {
            Content::Layer(_) => None,
            Content::Blob(_, summary) => Some(summary.digest.clone()),
        }
    }

    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        self.take(u64::MAX).await
    }

    /// The next bytes, at most so many. None at the end.
    async fn take(&mut self, most: u64) -> Result<Option<Bytes>, BlobError> {
        if self.rest.is_empty() {
            match self.come().await? {
                Some(bytes) => self.rest = bytes,
                None => return Ok(None),
            }
        }
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(self.rest.len());
        let bytes = self.rest.split_to(most);
        self.passed += bytes.len() as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&bytes);
        }
        Ok(Some(bytes))
    }

    async fn come(&mut self) -> Result<Option<Bytes>, BlobError> {
        if self.summary.is_some() {
            return Ok(None);
        }
        let summary = match &mut self.content {
            Content::Layer(stream) => match stream.next().await? {
                LayerPiece::Data(bytes) => return Ok(Some(bytes)),
                LayerPiece::End(summary) => summary,
            },
            Content::Blob(stream, summary) => match stream.next().await {
                Some(bytes) => return bytes.map(Some),
                None => summary.clone(),
            },
        };
        if summary.size != self.passed {
            return Err(BlobError::Size { expected: summary.size, actual: self.passed });
        }
        self.summary = Some(summary);
        Ok(None)
    }

    /// At least `wanted` bytes, or all that is left. Empty at the end.
    pub(super) async fn gather(&mut self, wanted: usize) -> Result<Chunks, BlobError> {
        self.gather_onto(Chunks::default(), wanted).await
    }

    /// Adds to what was gathered until it is at least `wanted` bytes.
    pub(super) async fn gather_onto(
        &mut self,
        mut chunks: Chunks,
        wanted: usize,
    ) -> Result<Chunks, BlobError> {
        // Each piece costs more than its bytes, so what comes in crumbs is put together.
        let mut crumbs = BytesMut::new();
        while chunks.size() + (crumbs.len() as u64) < wanted as u64 {
            match self.next().await? {
                Some(bytes) if bytes.len() < PIECE_MIN => {
                    crumbs.extend_from_slice(&bytes);
                    if crumbs.len() >= PIECE_MIN {
                        chunks.push(crumbs.split().freeze());
                    }
                }
                Some(bytes) => {
                    chunks.push(crumbs.split().freeze());
                    chunks.push(bytes);
                }
                None => break,
            }
        }
        chunks.push(crumbs.freeze());
        Ok(chunks)
    }

    /// The sum of all bytes, once they have all come.
    pub(super) fn summary(&self) -> Option<BlobSummary> {
        self.summary.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_comes_byte_by_byte_is_held_in_few_pieces() {
        let bytes: Vec<u8> = (0..200_000).map(|at: u32| at.to_le_bytes()[0]).collect();
        let crumbs: Vec<_> = bytes.iter().map(|byte| Ok(Bytes::copy_from_slice(&[*byte]))).collect();
        let large = vec![7; 100_000];
        let pieces = stream::iter(crumbs).chain(stream::iter([Ok(Bytes::from(large.clone()))]));
        let (size, digest) = (300_000, Digest::sha256("x"));
        let mut pieces = Pieces::of_blob(pieces.boxed(), &digest, size);
        let gathered = pieces.gather(1 << 20).await.unwrap();
        assert!(gathered.pieces.len() <= 6, "{}", gathered.pieces.len());
        assert!(gathered.pieces.concat() == [bytes, large].concat());
        assert_eq!(pieces.summary().unwrap().size, size);
    }
}
