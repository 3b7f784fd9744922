//! `streaming`: attention sinks and a recent window.

use super::{Parameters, Strategy, WINDOW_SIZE};

pub(super) struct Streaming;

impl Strategy for Streaming {
    fn name(&self) -> &'static str {
        "streaming"
    }

    fn summary(&self) -> &'static str {
        "the first tokens and the latest ones stay"
    }

    fn paper(&self) -> &'static str {
        "https://arxiv.org/abs/2309.17453"
    }

    fn defaults(&self) -> Parameters {
        Parameters { window_size: Some(WINDOW_SIZE), sink_size: Some(4), ..Parameters::default() }
    }

    fn scored(&self) -> bool {
        false
    }
}
