//! Budgets, attention ledger and eviction decisions of `LiquidFusion`, without Python and without unsafe code.
//!
//! The crate owns every decision (what is accumulated, which tokens are heavy, which are sinks, which slots are free) and
//! works on plain slices, so that the same scores give the same tokens whoever owns the memory.
//!
//! - [`policy`]: the strategies, one file each, behind one trait and one registry;
//! - [`spec`]: a strategy with validated parameters; [`budget`]: how a budget is divided; [`sinks`]: what a sink is;
//!   [`worth`]: what heavy hitters are chosen by;
//! - [`ledger`]: the slots of all layers, rows and heads, their reuse queues and the eviction decisions;
//! - [`accumulate`]: attention probabilities into mass and peak; [`select`]: the k largest scores of many rows;
//! - [`codes`]: keys and values in 8, 4 or 2 bits.
#![forbid(unsafe_code)]

pub mod accumulate;
mod average;
pub mod budget;
pub mod codes;
mod decide;
pub mod error;
pub mod ledger;
pub mod policy;
pub mod select;
pub mod simd;
pub mod sinks;
pub mod spec;
pub mod threads;
pub mod view;
pub mod worth;

pub use error::{Error, Result};
