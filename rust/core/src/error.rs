//! The one error type of the crate; each variant maps to one Python exception.

use std::fmt;

/// What went wrong; the message names the value that came and what is accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// A parameter is out of range, contradicts another or is unknown.
    Config(String),
    /// A tensor has the wrong shape.
    Tensor(String),
    /// Scores are NaN, infinite or negative; nothing was written.
    Score(String),
    /// Calls in the wrong order, or state that cannot be used.
    Cache(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(text) | Self::Tensor(text) | Self::Score(text) | Self::Cache(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Error {}

/// Result with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

macro_rules! fail {
    ($kind:ident, $($text:tt)+) => {
        return Err($crate::error::Error::$kind(format!($($text)+)))
    };
}
pub(crate) use fail;
