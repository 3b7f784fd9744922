//! `h2o`: heavy hitters by accumulated attention, and a recent window of the same size.

use super::{Parameters, Strategy, WINDOW_SIZE};

pub(super) struct H2o;

impl Strategy for H2o {
    fn name(&self) -> &'static str {
        "h2o"
    }

    fn summary(&self) -> &'static str {
        "the tokens that gathered the most attention and the latest ones stay"
    }

    fn paper(&self) -> &'static str {
        "https://arxiv.org/abs/2306.14048"
    }

    fn defaults(&self) -> Parameters {
        Parameters {
            window_size: Some(WINDOW_SIZE),
            heavy_ratio: Some(0.5),
            recent_ratio: Some(0.5),
            ..Parameters::default()
        }
    }
}
