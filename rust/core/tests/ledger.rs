//! The whole ledger against the naive core, over random configurations and calls.

mod machine;

use std::process::{Command, Stdio};

use liquidfusion_core::simd::VARIABLE;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 400 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_naive_core(bytes in proptest::collection::vec(any::<u8>(), 1..if cfg!(miri) { 400 } else { 6000 })) {
        machine::run(&bytes);
    }
}

/// The same without vector instructions.
#[test]
#[cfg_attr(miri, ignore = "Miri starts no processes")]
fn agrees_without_vectors() {
    if std::env::var_os(VARIABLE).is_some() {
        return;
    }
    let mut again = Command::new(std::env::current_exe().expect("tests have a path"));
    let status = again.arg("agrees_with_the_naive_core").env(VARIABLE, "scalar").stdout(Stdio::null()).status();
    assert!(status.expect("it starts").success());
}
