//! Vector instructions, chosen when the program runs, so that one portable wheel uses what the machine has.
//!
//! Plain loops under [`dispatch`] are compiled once per instruction set and vectorised by the compiler. Only what it cannot do by itself,
//! moving chosen elements side by side, is written out.

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

/// Vectors, and what the compiler cannot make of a plain loop by itself.
pub(crate) trait Lanes: Copy {
    /// Vectors of numbers.
    type Simd: Simd;

    fn simd(self) -> Self::Simd;

    /// Copy of each list in `from` what has a key above the smallest number there is and below `bound`, side by side and in order, and
    /// return how much that is. All have one length; what is behind the copies in `to` means nothing.
    fn pack<const N: usize>(self, keys: &[i32], bound: i32, from: [&[i32]; N], to: [&mut [i32]; N]) -> usize;
}

/// As [`Lanes::pack`], from the `first` one on, `count` having been copied of those before.
#[inline(always)]
fn pack_from<const N: usize>(
    first: usize,
    keys: &[i32],
    bound: i32,
    from: [&[i32]; N],
    to: &mut [&mut [i32]; N],
    mut count: usize,
) -> usize {
    for (i, &key) in keys.iter().enumerate().skip(first) {
        // Always written, kept only if it is meant: no branch to predict.
        for list in 0..N {
            to[list][count] = from[list][i];
        }
        count += usize::from((key > i32::MIN) & (key < bound));
    }
    count
}

/// Work compiled for each instruction set.
pub(crate) trait Work {
    /// What comes out.
    type Output;

    /// Do it; mark it `#[inline(always)]`, and everything it calls in loops.
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// Any machine.
#[derive(Clone, Copy)]
struct Portable<S>(S);

impl<S: Simd> Lanes for Portable<S> {
    type Simd = S;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn pack<const N: usize>(self, keys: &[i32], bound: i32, from: [&[i32]; N], mut to: [&mut [i32]; N]) -> usize {
        pack_from(0, keys, bound, from, &mut to, 0)
    }
}

struct With<W>(W);

impl<W: Work> WithSimd for With<W> {
    type Output = W::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> W::Output {
        self.0.run(Portable(simd))
    }
}

/// Run `work` with the widest instructions there are.
pub(crate) fn dispatch<W: Work>(work: W) -> W::Output {
    match arch() {
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Arch::V4(simd) => simd.vectorize(avx2::With(work, simd, *simd)),
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Arch::V3(simd) => simd.vectorize(avx2::With(work, simd, simd)),
        other => other.dispatch(With(work)),
    }
}

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
mod avx2 {
    //! x86 with AVX2, or more.

    use pulp::{NullaryFnOnce, Simd, x86::V3};

    use super::{Lanes, Work, pack_from};

    pub(super) struct With<W, S>(pub(super) W, pub(super) S, pub(super) V3);

    impl<W: Work, S: Simd> NullaryFnOnce for With<W, S> {
        type Output = W::Output;

        #[inline(always)]
        fn call(self) -> W::Output {
            self.0.run(Avx2(self.1, self.2))
        }
    }

    #[derive(Clone, Copy)]
    struct Avx2<S>(S, V3);

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

    impl<S: Simd> Lanes for Avx2<S> {
        type Simd = S;

        #[inline(always)]
        fn simd(self) -> S {
            self.0
        }

        #[inline(always)]
        fn pack<const N: usize>(self, keys: &[i32], bound: i32, from: [&[i32]; N], to: [&mut [i32]; N]) -> usize {
            let V3 { avx, avx2, .. } = self.1;
            let (from, mut to) = (from.map(|list| &list[..keys.len()]), to.map(|list| &mut list[..keys.len()]));
            let whole = keys.len() / 8;
            let eights = from.map(|list| &list.as_chunks::<8>().0[..whole]);
            let room = keys.len().saturating_sub(8);
            let (least, bounds) = (avx._mm256_set1_epi32(i32::MIN), avx._mm256_set1_epi32(bound));
            let mut count = 0;
            for (i, &keys) in keys.as_chunks::<8>().0[..whole].iter().enumerate() {
                let meant = avx2._mm256_and_si256(
                    avx2._mm256_cmpgt_epi32(pulp::cast(keys), least),
                    avx2._mm256_cmpgt_epi32(bounds, pulp::cast(keys)),
                );
                let set = avx._mm256_movemask_ps(avx._mm256_castsi256_ps(meant)) as usize & 255;
                let members = avx2._mm256_cvtepu8_epi32(pulp::cast([MEMBERS[set], 0]));
                // Eight are written, whatever is meant. There is room, as no more were written than read; saying so spares checks.
                let at = count.min(room);
                for list in 0..N {
                    let packed = avx2._mm256_permutevar8x32_epi32(pulp::cast(eights[list][i]), members);
                    to[list][at..at + 8].copy_from_slice(&pulp::cast::<_, [i32; 8]>(packed));
                }
                count += set.count_ones() as usize;
            }
            pack_from(8 * whole, keys, bound, from, &mut to, count)
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

    struct Pack<'a>(&'a [i32], i32, [&'a [i32]; 2]);

    impl Work for Pack<'_> {
        type Output = [Vec<i32>; 2];

        #[inline(always)]
        fn run<L: Lanes>(self, lanes: L) -> Self::Output {
            let [mut a, mut b] = self.2.map(|list| vec![7; list.len()]);
            let count = lanes.pack(self.0, self.1, self.2, [&mut a, &mut b]);
            [a, b].map(|mut list| {
                list.truncate(count);
                list
            })
        }
    }

    #[test]
    fn packing_agrees_with_a_filter() {
        for len in [0, 1, 7, 8, 9, 17, 64, 131] {
            for bound in [i32::MIN, -3, 0, 20, 96, i32::MAX] {
                let keys: Vec<i32> = (0..len).map(|i| if i % 5 == 3 { i32::MIN } else { i * 7919 % 101 - 4 }).collect();
                let lists: [Vec<i32>; 2] = [(0..len).collect(), (0..len).map(|i| -i * i).collect()];
                let lists = lists.each_ref().map(|list| &list[..]);
                let kept = |list: &[i32]| -> Vec<i32> {
                    let meant = |key: i32| key != i32::MIN && key < bound;
                    list.iter().zip(&keys).filter(|&(_, &key)| meant(key)).map(|(&value, _)| value).collect()
                };
                everywhere(|| assert_eq!(dispatch(Pack(&keys, bound, lists)), lists.map(kept)));
            }
        }
    }
}
