//! Vector instructions, chosen when the program runs, so that one portable wheel uses what the machine has.
//!
//! Plain loops under [`dispatch`] are compiled once per instruction set and vectorised by the compiler. Only what the compiler
//! cannot do by itself, writing the indices of matching elements side by side, is a method of [`Lanes`].

use std::sync::OnceLock;

use pulp::{Arch, NullaryFnOnce};

/// The widest instruction set both the machine and this crate know.
fn arch() -> Arch {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    *ARCH.get_or_init(Arch::new)
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

/// Operations written per instruction set.
pub(crate) trait Lanes: Copy {
    /// Write the indices of the keys above (or else below) `bound` to `out`, ascending, as many as fit, and return how many were written.
    fn indices<const ABOVE: bool>(self, keys: &[i32], bound: i32, out: &mut [i32]) -> usize;
}

/// Work compiled for each instruction set.
pub(crate) trait Work {
    /// What comes out.
    type Output;

    /// Do it; mark it `#[inline(always)]`, and everything it calls in loops.
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

struct With<W, L>(W, L);

impl<W: Work, L: Lanes> NullaryFnOnce for With<W, L> {
    type Output = W::Output;

    #[inline(always)]
    fn call(self) -> W::Output {
        self.0.run(self.1)
    }
}

/// Run `work` with the widest instructions there are.
pub(crate) fn dispatch<W: Work>(work: W) -> W::Output {
    match arch() {
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Arch::V4(simd) => simd.vectorize(With(work, Avx2(*simd))),
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Arch::V3(simd) => simd.vectorize(With(work, Avx2(simd))),
        other => other.dispatch(With(work, Portable)),
    }
}

/// Any machine.
#[derive(Clone, Copy)]
struct Portable;

#[inline(always)]
fn indices_from<const ABOVE: bool>(first: usize, keys: &[i32], bound: i32, out: &mut [i32], mut count: usize) -> usize {
    for (i, &key) in keys.iter().enumerate().skip(first) {
        let Some(next) = out.get_mut(count) else { break };
        // Always written, kept only if it matches: no branch to predict.
        *next = i as i32;
        count += usize::from(if ABOVE { key > bound } else { key < bound });
    }
    count
}

impl Lanes for Portable {
    #[inline(always)]
    fn indices<const ABOVE: bool>(self, keys: &[i32], bound: i32, out: &mut [i32]) -> usize {
        indices_from::<ABOVE>(0, keys, bound, out, 0)
    }
}

/// x86 with AVX2.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
#[derive(Clone, Copy)]
struct Avx2(pulp::x86::V3);

/// For every mask of eight lanes the lanes that are set, first ones first.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
static SET_LANES: [[u8; 16]; 256] = {
    let mut table = [[0; 16]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut next) = (0, 0);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                table[mask][next] = lane;
                next += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    table
};

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
impl Lanes for Avx2 {
    #[inline(always)]
    fn indices<const ABOVE: bool>(self, keys: &[i32], bound: i32, out: &mut [i32]) -> usize {
        let Self(simd) = self;
        let (avx, avx2) = (simd.avx, simd.avx2);
        let (bounds, eight) = (avx._mm256_set1_epi32(bound), avx._mm256_set1_epi32(8));
        let mut first = avx._mm256_setzero_si256();
        let (eights, _) = keys.as_chunks::<8>();
        let (mut count, mut done) = (0, 8 * eights.len());
        // Eight are written, whatever matches.
        let last = out.len().wrapping_sub(8);
        for (i, &eight_keys) in eights.iter().enumerate() {
            if out.len() < 8 || count > last {
                done = 8 * i;
                break;
            }
            let keys = pulp::cast(eight_keys);
            let (more, less) = if ABOVE { (keys, bounds) } else { (bounds, keys) };
            let matches = avx2._mm256_cmpgt_epi32(more, less);
            let mask = avx._mm256_movemask_ps(avx._mm256_castsi256_ps(matches)) as usize;
            let lanes = avx2._mm256_cvtepu8_epi32(pulp::cast(SET_LANES[mask & 255]));
            let indices = avx2._mm256_add_epi32(lanes, first);
            out[count..count + 8].copy_from_slice(&pulp::cast::<_, [i32; 8]>(indices));
            count += mask.count_ones() as usize;
            first = avx2._mm256_add_epi32(first, eight);
        }
        indices_from::<ABOVE>(done, keys, bound, out, count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Indices<'a, const ABOVE: bool>(&'a [i32], i32);

    impl<const ABOVE: bool> Work for Indices<'_, ABOVE> {
        type Output = Vec<i32>;

        fn run<L: Lanes>(self, lanes: L) -> Vec<i32> {
            let mut out = vec![0; self.0.len()];
            let count = lanes.indices::<ABOVE>(self.0, self.1, &mut out);
            out.truncate(count);
            out
        }
    }

    #[test]
    fn indices_agree_with_a_filter() {
        let keys: Vec<i32> = (0..203).map(|i: i32| i.wrapping_mul(0x9E37_79B1_u32 as i32) >> 1 & 0xff).collect();
        for len in [0, 1, 7, 8, 9, 64, 203] {
            for bound in [-1, 0, 100, 200, 300] {
                let naive = |matches: &dyn Fn(i32) -> bool| -> Vec<i32> {
                    (0..len).filter(|&i| matches(keys[i])).map(|i| i as i32).collect()
                };
                let (above, below) = (naive(&|key| key > bound), naive(&|key| key < bound));
                assert_eq!(dispatch(Indices::<true>(&keys[..len], bound)), above);
                assert_eq!(dispatch(Indices::<false>(&keys[..len], bound)), below);
                assert_eq!(Indices::<true>(&keys[..len], bound).run(Portable), above);
                assert_eq!(Indices::<false>(&keys[..len], bound).run(Portable), below);
            }
        }
    }
}
