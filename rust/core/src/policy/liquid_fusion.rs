//! `liquid_fusion`: sinks, a recent window, and heavy hitters by two scores: fading mass and peak attention.
//!
//! The fading mass keeps the text fluent; the peak keeps what was looked at hard once and may be asked for later.

use super::{Parameters, Strategy, WINDOW_SIZE};
use crate::sinks::Sinks;

pub(super) struct LiquidFusion;

impl Strategy for LiquidFusion {
    fn name(&self) -> &'static str {
        "liquid_fusion"
    }

    fn summary(&self) -> &'static str {
        "the first tokens, the latest ones, and those with the largest fading attention mass or peak attention stay"
    }

    fn defaults(&self) -> Parameters {
        Parameters {
            window_size: Some(WINDOW_SIZE),
            sink_size: Some(4),
            sink_update_rate: Some(0.1),
            heavy_ratio: Some(0.2),
            recent_ratio: Some(0.3),
            peak_ratio: Some(0.5),
            sinks: Some(Sinks::Pinned),
            value_weighted: Some(false),
        }
    }
}
