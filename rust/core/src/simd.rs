//! Vector instructions, chosen when the program runs, so that one portable wheel uses what the machine has.
//!
//! Plain loops under [`dispatch`] are compiled once per instruction set and vectorised by the compiler.

use std::sync::OnceLock;

use pulp::{Arch, Simd, WithSimd};

use crate::error::{Result, fail};

/// Caps the instruction set: `avx2` or `scalar`. What is chosen never depends on it, only the time does.
pub const VARIABLE: &str = "LIQUIDFUSION_SIMD";

/// The widest instruction set that the machine and this crate know, or none at all if [`VARIABLE`] says so.
fn arch() -> Arch {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    #[cfg(test)]
    if tests::SCALAR.get() {
        return Arch::Scalar;
    }
    *ARCH.get_or_init(
        || if std::env::var(VARIABLE).is_ok_and(|cap| cap == "scalar") { Arch::Scalar } else { Arch::new() },
    )
}

/// Whether [`VARIABLE`] is unset or says something that this crate knows.
///
/// # Errors
///
/// `Error::Config` names the value and what is accepted.
pub fn check() -> Result<()> {
    match &*std::env::var(VARIABLE).unwrap_or_default() {
        "" | "avx2" | "scalar" => Ok(()),
        cap => fail!(Config, "{VARIABLE} must be avx2 or scalar, got {cap}"),
    }
}

/// Name of the instruction set in use.
#[must_use]
pub fn name() -> &'static str {
    match arch() {
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Arch::V3(_) => "avx2",
        #[cfg(target_arch = "aarch64")]
        Arch::Neon(_) => "neon",
        _ => "scalar",
    }
}

/// Work compiled for each instruction set.
pub(crate) trait Work {
    /// What comes out.
    type Output;

    /// Do it; mark it `#[inline(always)]`, and everything it calls in loops.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

struct With<W>(W);

impl<W: Work> WithSimd for With<W> {
    type Output = W::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> W::Output {
        self.0.run(simd)
    }
}

/// Run `work` with the widest instructions there are.
pub(crate) fn dispatch<W: Work>(work: W) -> W::Output {
    arch().dispatch(With(work))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    thread_local! {
        /// Whether this thread does without vector instructions.
        pub(super) static SCALAR: Cell<bool> = const { Cell::new(false) };
    }

    /// Run a test, which must stay on its thread, with and without vector instructions.
    pub(crate) fn everywhere(test: impl Fn()) {
        for scalar in [false, true] {
            SCALAR.set(scalar);
            test();
        }
        SCALAR.set(false);
    }
}
