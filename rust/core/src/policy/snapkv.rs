//! `snapkv`: what the latest queries looked at, and its surroundings.
//!
//! The paper compresses a prompt once: by the attention of its last 32 queries, each token taking the largest of its neighbourhood,
//! while the tokens of those queries stay. A bounded cache goes on deciding after the prompt, so the hard window of 32 queries becomes
//! an exponential one of the same length, and a decision protects the latest 32 tokens, or half of what stays if that is less. The
//! paper decides per query head; here the query heads that share a kv head decide together, by their mean.

use super::{Parameters, Strategy, WINDOW_SIZE};
use crate::budget::{Shares, Split};
use crate::worth::Worth;

/// Queries whose attention counts, and tokens that are protected.
const WINDOW: usize = 32;

/// Neighbours to either side: the paper's kernel of 7 positions.
const REACH: usize = 3;

pub(super) struct SnapKv;

impl Strategy for SnapKv {
    fn name(&self) -> &'static str {
        "snapkv"
    }

    fn summary(&self) -> &'static str {
        "the latest 32 tokens, and those in whose neighbourhood their queries looked most, stay"
    }

    fn paper(&self) -> &'static str {
        "https://arxiv.org/abs/2404.14469"
    }

    fn defaults(&self) -> Parameters {
        Parameters { window_size: Some(WINDOW_SIZE), ..Parameters::default() }
    }

    fn mass_decay(&self, _: &Parameters) -> f64 {
        1.0 - 1.0 / WINDOW as f64
    }

    fn shares(&self, _: &Parameters) -> Option<Shares> {
        Some(Shares::HEAVY)
    }

    fn split(&self, keep: usize, _: &Parameters) -> Split {
        let recent = WINDOW.min(keep / 2).max(1);
        Split { sinks: 0, recent, peak: 0, mass: keep - recent }
    }

    fn worth(&self) -> Worth {
        Worth::Pooled(REACH)
    }
}
