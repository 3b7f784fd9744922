//! `tova`: what the last query looked at.
//!
//! Heavy hitters whose mass fades at once, so that it is the probability which the newest query gave: each query drops the tokens
//! it cared for least. The paper averages this over all heads of a layer; here each kv head decides for itself, by the mean of the
//! query heads that share it.

use super::{Parameters, Strategy, WINDOW_SIZE};
use crate::budget::Shares;

pub(super) struct Tova;

impl Strategy for Tova {
    fn name(&self) -> &'static str {
        "tova"
    }

    fn summary(&self) -> &'static str {
        "the tokens that the last query looked at most stay"
    }

    fn paper(&self) -> &'static str {
        "https://arxiv.org/abs/2401.06104"
    }

    fn defaults(&self) -> Parameters {
        Parameters { window_size: Some(WINDOW_SIZE), ..Parameters::default() }
    }

    fn mass_decay(&self, _: &Parameters) -> f64 {
        0.0
    }

    fn shares(&self, _: &Parameters) -> Option<Shares> {
        Some(Shares::HEAVY)
    }
}
