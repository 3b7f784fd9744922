//! `random`: a uniform sample of the history, as a control.
//!
//! Every token has a number of its own, by layer, kv head and position; the newest token and those with the largest numbers stay. So
//! each (layer, kv head) holds another sample, and a batch row the same one as alone.

use super::{Parameters, Strategy, WINDOW_SIZE};
use crate::budget::Shares;
use crate::worth::Worth;

pub(super) struct Random;

impl Strategy for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn summary(&self) -> &'static str {
        "the newest token and a uniform sample of all others stay: a control"
    }

    fn defaults(&self) -> Parameters {
        Parameters { window_size: Some(WINDOW_SIZE), ..Parameters::default() }
    }

    fn scored(&self) -> bool {
        false
    }

    fn shares(&self, _: &Parameters) -> Option<Shares> {
        Some(Shares::HEAVY)
    }

    fn worth(&self) -> Worth {
        Worth::Random
    }
}
