//! `liquid_fusion`: sinks, a recent window, and heavy hitters by two scores: fading mass and peak attention.
//!
//! The fading mass keeps the text fluent; the peak keeps what was looked at hard once and may be asked for later. Neither counts
//! looks from nearby, which every token gets; both are weighted with what a look moves: long values, short keys. The defaults were
//! chosen by measurement, see docs/quality.md.

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
            sink_update_rate: Some(0.3),
            heavy_ratio: Some(0.75),
            recent_ratio: Some(0.25),
            peak_ratio: Some(0.6),
            sinks: Some(Sinks::Pinned),
            value_weighted: Some(true),
            look_gap: Some(8),
            // The budget.
            peak_reach: None,
            averaged: Some(true),
            age_half_life: Some(4096),
        }
    }
}
