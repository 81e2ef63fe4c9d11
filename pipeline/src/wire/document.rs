//! Small documents, a manifest or a config, in pieces that fit into a message.

use bytes::{Bytes, BytesMut};
use occy_proto::v1::DocumentChunk;

use super::{CHUNK, WireError};
use crate::manifest::MAX_DOCUMENT;

/// A document in pieces; at least one, and the last is marked.
pub fn pieces(mut document: Bytes) -> impl Iterator<Item = DocumentChunk> {
    let mut is_done = false;
    std::iter::from_fn(move || {
        if is_done {
            return None;
        }
        let data = document.split_to(CHUNK.min(document.len()));
        is_done = document.is_empty();
        Some(DocumentChunk { data, last: is_done })
    })
}

/// A document that is coming in pieces.
#[derive(Debug, Default)]
pub struct Document {
    bytes: BytesMut,
    is_whole: bool,
}

impl Document {
    /// The next piece; `what` is for messages.
    pub fn take(&mut self, chunk: &DocumentChunk, what: &'static str) -> Result<(), WireError> {
        self.take_up_to(MAX_DOCUMENT, chunk, what)
    }

    /// The next piece of a document that may have `limit` bytes.
    pub fn take_up_to(
        &mut self,
        limit: usize,
        chunk: &DocumentChunk,
        what: &'static str,
    ) -> Result<(), WireError> {
        if self.is_whole {
            return Err(WireError::elements(format!("{what} comes twice")));
        }
        if self.bytes.len() + chunk.data.len() > limit {
            return Err(WireError::TooLarge { what, limit });
        }
        self.bytes.extend_from_slice(&chunk.data);
        self.is_whole = chunk.last;
        Ok(())
    }

    /// The whole of it; None if no piece has come.
    pub fn finish(self, what: &'static str) -> Result<Option<Bytes>, WireError> {
        match self.is_whole {
            true => Ok(Some(self.bytes.freeze())),
            false if self.bytes.is_empty() => Ok(None),
            false => Err(WireError::elements(format!("{what} has no end"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_comes_back_as_it_was() {
        for length in [0, 1, CHUNK, CHUNK + 1] {
            let bytes = Bytes::from(vec![7; length]);
            let mut document = Document::default();
            for piece in pieces(bytes.clone()) {
                assert!(piece.data.len() <= CHUNK);
                document.take(&piece, "it").unwrap();
            }
            assert_eq!(document.finish("it").unwrap(), Some(bytes));
        }
    }

    #[test]
    fn a_document_without_its_last_piece_is_refused() {
        let mut document = Document::default();
        assert_eq!(Document::default().finish("it").unwrap(), None);
        document.take(&DocumentChunk { data: Bytes::from_static(b"x"), last: false }, "it").unwrap();
        assert!(document.finish("it").is_err());
    }
}
