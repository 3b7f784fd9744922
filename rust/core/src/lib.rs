//! Budgets, attention ledger and eviction decisions of `LiquidFusion`, without Python and without unsafe code.
//!
//! The crate owns every decision about what stays in a cache, on plain slices, so that the same scores give the same tokens whoever owns
//! the memory, on any number of threads and with any vector instructions.
//!
//! # Map
//!
//! ```text
//! params    the table of parameters: name, kind, range, help          strategy  the strategies, a row of data each
//! spec      a row with its parameters resolved                         split     how many tokens of each kind stay
//! ledger/   slots and reuse queues of all heads: call (begin, finish), chunk, rows (release, copy, reorder, restore, grow)
//! head      what one head shows     decide   which candidates stay     score     what they are worth, a type per answer
//! select    the k largest, by counting           simd  vector instructions, chosen at run time
//! accumulate  attention probabilities into mass and peak      codes  keys and values in 8, 4 or 2 bits
//! attend    softmax of a block of products, and a whole decode step
//! threads, view, error                what they say
//! ```
//!
//! A decision flows one way: `Ledger` shows a `Head` to `decide`, which holds a contest for each kind of token that stays: a `Score` says
//! what the candidates are worth, `select` finds where to cut, and those that were not taken go on to the next contest. Who is left at the
//! end is evicted.
//!
//! # Words
//!
//! - **slot**: one place for a token's key and value; **position**: a token's index in its own sequence, -1 where there is none.
//! - **row**: a sequence of the batch; **kv head**: a key-value head of a layer; **head**: one (layer, row, kv head), which decides for itself.
//! - **call**: one call of the model; **chunk**: what a call brings to a row if it is two tokens or more; **column**: a place in the chunk,
//!   padding included; **rank**: the number of a real token among those that its row gets in the call, -1 for padding.
//! - **seen**: how many real tokens a row has had so far.
//! - **look**: the attention probability that one query gives one token. **mass**: a token's looks summed, fading; **peak**: the strongest
//!   of them, fading; **distinctness**: how far its key points from the mean of all keys that are held.
//! - **sinks**, **recent**, **heavy hitters**: the first tokens, the latest, and those chosen by distinctness, peak and mass.
//! - **queue**: the slots of a head that are overwritten next; **victim**: a token in it; **interval**: how many tokens before its slot is
//!   needed a victim is chosen.
//! - **candidate**: a token about which is decided: stored and not queued, or a column. **contest**: the choice of those that stay for one
//!   reason. **worth**: what a contest goes by. **ordinal**: an integer that compares like a worth. **cut**: from which ordinal on
//!   candidates are taken.
#![forbid(unsafe_code)]

pub mod accumulate;
pub mod attend;
pub mod coded;
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
