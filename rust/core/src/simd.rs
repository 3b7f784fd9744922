//! Vector instructions, chosen when the program runs, so that one portable wheel uses what the machine has.
//!
//! Plain loops in [`vectorised`] functions are compiled once per instruction set and vectorised by the compiler.

use std::sync::OnceLock;

use pulp::{Arch, WithSimd};

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
    *ARCH.get_or_init(|| match (&*std::env::var(VARIABLE).unwrap_or_default(), Arch::new()) {
        ("scalar", _) => Arch::Scalar,
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        ("avx2", Arch::V4(simd)) => Arch::V3(*simd),
        (_, widest) => widest,
    })
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
        Arch::V4(_) => "avx512",
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Arch::V3(_) => "avx2",
        #[cfg(target_arch = "aarch64")]
        Arch::Neon(_) => "neon",
        _ => "scalar",
    }
}

/// Run `work`, which must be `#[inline(always)]`, compiled for the widest instructions there are.
pub(crate) fn dispatch<W: WithSimd>(work: W) -> W::Output {
    arch().dispatch(work)
}

/// Numbers that are summed side by side, whatever the vectors' width, so that every instruction set gives the same sums.
pub(crate) const LANES: usize = 16;

/// The sum of each, in one fixed order.
///
/// Not inlined: the compiler would see pairs being added here, and work in pairs before as well instead of by the vector.
#[inline(never)]
pub(crate) fn sums(lanes: &[[f32; LANES]], to: &mut [f32]) {
    for (to, lanes) in to.iter_mut().zip(lanes) {
        let mut eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
        for n in [4, 2, 1] {
            for i in 0..n {
                eight[i] += eight[i + n];
            }
        }
        *to = eight[0];
    }
}

/// The sum of all.
pub(crate) fn sum(lanes: [f32; LANES]) -> f32 {
    let mut total = [0.0];
    sums(&[lanes], &mut total);
    total[0]
}

/// A function that is compiled for each instruction set; what it calls in loops must be `#[inline(always)]`.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$life:lifetime>($($arg:ident: $type:ty),+ $(,)?) -> $out:ty $body:block) => {
        $(#[$meta])*
        $vis fn $name<$life>($($arg: $type),+) -> $out {
            struct Work<$life>($($type,)+ std::marker::PhantomData<&$life ()>);
            impl<$life> pulp::NullaryFnOnce for Work<$life> {
                type Output = $out;

                #[inline(always)]
                fn call(self) -> $out {
                    let Self($($arg,)+ _) = self;
                    $body
                }
            }
            $crate::simd::dispatch(Work($($arg,)+ std::marker::PhantomData))
        }
    };
}
pub(crate) use vectorised;

/// The places of all `keys` below `bound`, ascending, in `room`, whose contents do not matter.
pub(crate) fn places<'a>(keys: &[i32], bound: i32, room: &'a mut Vec<i32>) -> &'a mut [i32] {
    if room.len() < keys.len() {
        room.resize(keys.len(), 0);
    }
    let out = &mut room[..keys.len()];
    let (done, mut count) = match arch() {
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Arch::V4(simd) => simd.vectorize(avx2::Places { keys, bound, out, simd: *simd }),
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Arch::V3(simd) => simd.vectorize(avx2::Places { keys, bound, out, simd }),
        _ => (0, 0),
    };
    for (i, &key) in keys.iter().enumerate().skip(done) {
        // Always written, kept only if it is meant: no branch to predict.
        out[count] = i as i32;
        count += usize::from(key < bound);
    }
    &mut room[..count]
}

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
mod avx2 {
    //! x86 with AVX2, or more.

    use pulp::{NullaryFnOnce, x86::V3};

    /// Find [`super::places`] of all whole eights; returns how many keys that were, and how many places.
    pub(super) struct Places<'a> {
        pub(super) keys: &'a [i32],
        pub(super) bound: i32,
        pub(super) out: &'a mut [i32],
        pub(super) simd: V3,
    }

    /// For every set of eight lanes the lanes that are in it, a byte each, first ones lowest.
    static MEMBERS: [i64; 256] = {
        let mut table = [0; 256];
        let mut set = 0;
        while set < 256 {
            let (mut lane, mut next) = (0, 0);
            while lane < 8 {
                if set >> lane & 1 == 1 {
                    table[set] |= lane << (8 * next);
                    next += 1;
                }
                lane += 1;
            }
            set += 1;
        }
        table
    };

    impl NullaryFnOnce for Places<'_> {
        type Output = (usize, usize);

        #[inline(always)]
        fn call(self) -> (usize, usize) {
            let Self { keys, bound, out, simd: V3 { avx, avx2, .. } } = self;
            let (keys, _) = keys.as_chunks::<8>();
            let (bounds, eight) = (avx._mm256_set1_epi32(bound), avx._mm256_set1_epi32(8));
            let (mut first, mut count) = (avx._mm256_set1_epi32(0), 0);
            for &keys in keys {
                let meant = avx2._mm256_cmpgt_epi32(bounds, pulp::cast(keys));
                let set = avx._mm256_movemask_ps(avx._mm256_castsi256_ps(meant)) as usize & 255;
                let members = avx2._mm256_cvtepu8_epi32(pulp::cast([MEMBERS[set], 0]));
                // Eight are written, whatever is meant: no more were found than read, so there is room.
                let own = avx2._mm256_add_epi32(members, first);
                out[count..count + 8].copy_from_slice(&pulp::cast::<_, [i32; 8]>(own));
                first = avx2._mm256_add_epi32(first, eight);
                count += set.count_ones() as usize;
            }
            (8 * keys.len(), count)
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use super::*;

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

    #[test]
    fn places_are_those_of_a_filter() {
        for len in [0, 1, 7, 8, 9, 17, 64, 131] {
            for bound in [i32::MIN, -3, 0, 20, 96, i32::MAX] {
                let keys: Vec<i32> = (0..len).map(|i| if i % 5 == 3 { i32::MAX } else { i * 7919 % 101 - 4 }).collect();
                let naive: Vec<i32> = (0..len).filter(|&i| keys[i as usize] < bound).collect();
                everywhere(|| {
                    assert_eq!(places(&keys, bound, &mut vec![7; 5]), naive);
                });
            }
        }
    }
}
