//! Layouts that a caller lends to the coordinator for one call (`LendLayout`): nothing of them is copied but what is asked for.
//!
//! | what | where |
//! |---|---|
//! | who asks: a layout that lies at the other side | [`borrow`] |
//! | who is asked: a layout of this machine | [`answer`] |
//! | the bytes of one ask, in pieces, with credit | `line` |

pub mod answer;
pub mod borrow;
mod line;

use occy_proto::v1::{self, LendFailure, LendFault, LendLayoutRequest, LendLayoutResponse};

use self::line::Frame;
use super::convert::split;
use crate::lent::{LentError, LentFault};

/// Asks that are open at once.
pub const ASKS: usize = 64;
/// Layers that are on their way at once: each has at most one that is read and one that is written, so that there are always asks
/// left for one of them to go on with.
pub const LAYERS: usize = 16;
/// Bytes of an entry of `index.json`.
const ENTRY_MAX: usize = 64 * 1024;
/// Bytes of what a failure says.
const TEXT_MAX: usize = 2048;

/// A failure, for the other side.
fn failure(error: LentError) -> LendFailure {
    let LentError { message, hint, fault } = error;
    let fault = match fault {
        LentFault::Missing => LendFault::Missing,
        LentFault::Broken => LendFault::Broken,
        LentFault::Refused => LendFault::Refused,
        LentFault::Machine => LendFault::Machine,
        LentFault::Full => LendFault::Full,
    };
    let cut = |text: &str| split(text, TEXT_MAX).0.to_owned();
    LendFailure { message: cut(&message), hint: cut(&hint.unwrap_or_default()), fault: fault.into() }
}

/// The same, back.
fn lent_error(failure: &LendFailure) -> LentError {
    let cut = |text: &str| split(text, TEXT_MAX).0.to_owned();
    LentError {
        message: cut(&failure.message),
        hint: Some(cut(&failure.hint)).filter(|hint| !hint.is_empty()),
        fault: match failure.fault() {
            LendFault::Missing => LentFault::Missing,
            LendFault::Broken => LentFault::Broken,
            LendFault::Refused => LentFault::Refused,
            LendFault::Machine | LendFault::Unspecified => LentFault::Machine,
            LendFault::Full => LentFault::Full,
        },
    }
}

impl Frame for LendLayoutRequest {
    fn piece(piece: v1::LendPiece) -> Self {
        Self { part: Some(v1::lend_layout_request::Part::Piece(piece)) }
    }

    fn end(end: v1::LendEnd) -> Self {
        Self { part: Some(v1::lend_layout_request::Part::End(end)) }
    }

    fn credit(credit: v1::LendCredit) -> Self {
        Self { part: Some(v1::lend_layout_request::Part::Credit(credit)) }
    }
}

impl Frame for LendLayoutResponse {
    fn piece(piece: v1::LendPiece) -> Self {
        Self { part: Some(v1::lend_layout_response::Part::Piece(piece)) }
    }

    fn end(end: v1::LendEnd) -> Self {
        Self { part: Some(v1::lend_layout_response::Part::End(end)) }
    }

    fn credit(credit: v1::LendCredit) -> Self {
        Self { part: Some(v1::lend_layout_response::Part::Credit(credit)) }
    }
}

#[cfg(test)]
mod tests;
