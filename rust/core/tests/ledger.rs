//! The whole ledger against the naive core, over random configurations and calls.

mod machine;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 400 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_naive_core(bytes in proptest::collection::vec(any::<u8>(), 1..if cfg!(miri) { 400 } else { 6000 })) {
        machine::run(&bytes);
    }
}
