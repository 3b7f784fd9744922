//! What an attention sink is: a token that is never evicted because the model parks its attention there.
//!
//! Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", <https://arxiv.org/abs/2309.17453>.

use crate::error::{Result, fail};

/// How the sinks are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sinks {
    /// The first `sink_size` tokens, for ever. While fewer are stored, the recent window gets their share.
    #[default]
    Pinned,
    /// At each decision the `sink_size` tokens with the largest mass outside the recent window; the first tokens before any decision.
    Adaptive,
}

impl Sinks {
    /// The name used in Python.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pinned => "pinned",
            Self::Adaptive => "adaptive",
        }
    }

    /// Parse the name used in Python.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "pinned" => Ok(Self::Pinned),
            "adaptive" => Ok(Self::Adaptive),
            _ => fail!(Config, "sinks must be \"pinned\" or \"adaptive\", got {name:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for sinks in [Sinks::Pinned, Sinks::Adaptive] {
            assert_eq!(Sinks::parse(sinks.name()), Ok(sinks));
        }
        assert!(Sinks::parse("pin").unwrap_err().to_string().contains("\"pin\""));
    }
}
