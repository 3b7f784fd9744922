//! Budgets, attention ledger and eviction decisions of `LiquidFusion`, without Python and without unsafe code.
#![forbid(unsafe_code)]

pub mod accumulate;
pub mod codes;
mod decide;
pub mod error;
mod head;
pub mod ledger;
pub mod params;
mod score;
pub mod select;
pub mod simd;
pub mod spec;
pub mod split;
pub mod strategy;
pub mod threads;
pub mod view;

pub use error::{Error, Result};
