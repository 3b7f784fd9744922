//! `full`: keep everything.

use super::{Parameters, Strategy};

pub(super) struct Full;

impl Strategy for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn summary(&self) -> &'static str {
        "every token stays; memory grows with the context"
    }

    fn defaults(&self) -> Parameters {
        Parameters::default()
    }

    fn bounded(&self) -> bool {
        false
    }

    fn scored(&self) -> bool {
        false
    }
}
