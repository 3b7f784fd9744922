//! Random sequences of calls, resets, reorderings, restores and bad scores against the naive core; its module states the invariants.
//!
//! Run: `cargo +nightly fuzz run --fuzz-dir rust/fuzz ledger -- -max_total_time=600 -max_len=4096`
#![no_main]

#[path = "../../core/tests/machine/mod.rs"]
mod machine;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| machine::run(bytes));
