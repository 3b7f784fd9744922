//! `local`: a sliding window.

use super::{Parameters, Strategy, WINDOW_SIZE};

pub(super) struct Local;

impl Strategy for Local {
    fn name(&self) -> &'static str {
        "local"
    }

    fn summary(&self) -> &'static str {
        "only the latest tokens stay"
    }

    fn defaults(&self) -> Parameters {
        Parameters { window_size: Some(WINDOW_SIZE), ..Parameters::default() }
    }

    fn scored(&self) -> bool {
        false
    }
}
