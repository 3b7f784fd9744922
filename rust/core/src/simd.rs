//! Vector instructions, chosen when the program runs, so that one portable wheel uses what the machine has.
//!
//! Plain loops under [`dispatch`] are compiled once per instruction set and vectorised by the compiler. Only what the compiler
//! cannot do by itself, writing the indices of matching elements side by side, is a method of [`Lanes`].

use std::sync::OnceLock;

use pulp::{Arch, NullaryFnOnce, Simd, WithSimd};

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
    /// Vectors of numbers.
    type Simd: Simd;

    fn simd(self) -> Self::Simd;

    /// Write the indices of the keys above (or else below) `bound` to `out`, ascending, as many as fit, and return how many were written.
    fn indices<const ABOVE: bool>(self, keys: &[i32], bound: i32, out: &mut [i32]) -> usize;

    /// Write the indices of the keys below `bound`, ascending, and what `values` hold there, side by side to `out`; returns how many.
    /// All slices have one length.
    fn pack(self, keys: &[i32], bound: i32, values: [&[i32]; 2], out: [&mut [i32]; 3]) -> usize;
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

/// Work with whatever vectors there are.
struct Any<W>(W);

impl<W: Work> WithSimd for Any<W> {
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
        Arch::V4(simd) => simd.vectorize(With(work, Avx2(*simd))),
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Arch::V3(simd) => simd.vectorize(With(work, Avx2(simd))),
        other => other.dispatch(Any(work)),
    }
}

/// Any machine.
#[derive(Clone, Copy)]
struct Portable<S>(S);

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

#[inline(always)]
fn pack_from(
    first: usize,
    keys: &[i32],
    bound: i32,
    values: [&[i32]; 2],
    out: [&mut [i32]; 3],
    mut count: usize,
) -> usize {
    let [indices, a, b] = out;
    let values = values[0].iter().zip(values[1]);
    for (i, (&key, (&value_a, &value_b))) in keys.iter().zip(values).enumerate().skip(first) {
        (indices[count], a[count], b[count]) = (i as i32, value_a, value_b);
        count += usize::from(key < bound);
    }
    count
}

impl<S: Simd> Lanes for Portable<S> {
    type Simd = S;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn indices<const ABOVE: bool>(self, keys: &[i32], bound: i32, out: &mut [i32]) -> usize {
        indices_from::<ABOVE>(0, keys, bound, out, 0)
    }

    #[inline(always)]
    fn pack(self, keys: &[i32], bound: i32, values: [&[i32]; 2], out: [&mut [i32]; 3]) -> usize {
        pack_from(0, keys, bound, values, out, 0)
    }
}

/// x86 with AVX2.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
#[derive(Clone, Copy)]
struct Avx2(pulp::x86::V3);

/// For every mask of eight lanes the lanes that are set, a byte each, first ones lowest.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
static SET_LANES: [i64; 256] = {
    let mut table = [0; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut next) = (0, 0);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                table[mask] |= lane << (8 * next);
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
    type Simd = pulp::x86::V3;

    #[inline(always)]
    fn simd(self) -> pulp::x86::V3 {
        self.0
    }

    #[inline(always)]
    fn indices<const ABOVE: bool>(self, keys: &[i32], bound: i32, out: &mut [i32]) -> usize {
        let Self(simd) = self;
        let (avx, avx2) = (simd.avx, simd.avx2);
        let (bounds, eight) = (avx._mm256_set1_epi32(bound), avx._mm256_set1_epi32(8));
        let mut first = avx._mm256_setzero_si256();
        let (pairs, _) = keys.as_chunks::<16>();
        let (mut count, mut done) = (0, 16 * pairs.len());
        for (i, keys) in pairs.iter().enumerate() {
            // Eight are written for each half, whatever matches.
            let Some(to) = out.get_mut(count..).and_then(|rest| rest.first_chunk_mut::<16>()) else {
                done = 16 * i;
                break;
            };
            let mut written = 0;
            for half in keys.as_chunks::<8>().0 {
                let half = pulp::cast(*half);
                let (more, less) = if ABOVE { (half, bounds) } else { (bounds, half) };
                let matches = avx2._mm256_cmpgt_epi32(more, less);
                let mask = avx._mm256_movemask_ps(avx._mm256_castsi256_ps(matches)) as usize & 255;
                let indices = avx2._mm256_add_epi32(avx2._mm256_cvtepu8_epi32(pulp::cast([SET_LANES[mask], 0])), first);
                to[written..written + 8].copy_from_slice(&pulp::cast::<_, [i32; 8]>(indices));
                written += mask.count_ones() as usize;
                first = avx2._mm256_add_epi32(first, eight);
            }
            count += written;
        }
        indices_from::<ABOVE>(done, keys, bound, out, count)
    }

    #[inline(always)]
    fn pack(self, keys: &[i32], bound: i32, values: [&[i32]; 2], out: [&mut [i32]; 3]) -> usize {
        let Self(simd) = self;
        let (avx, avx2) = (simd.avx, simd.avx2);
        let (bounds, eight) = (avx._mm256_set1_epi32(bound), avx._mm256_set1_epi32(8));
        let mut first = avx._mm256_setzero_si256();
        let len = keys.len();
        let [indices, a, b] = out.map(|out| &mut out[..len]);
        let room = len.saturating_sub(8);
        let (eights, _) = keys.as_chunks::<8>();
        let [values_a, values_b] = values;
        let values = values_a.as_chunks::<8>().0.iter().zip(values_b.as_chunks::<8>().0);
        let mut count = 0;
        for (eight_keys, (value_a, value_b)) in eights.iter().zip(values) {
            let matches = avx2._mm256_cmpgt_epi32(bounds, pulp::cast(*eight_keys));
            let mask = avx._mm256_movemask_ps(avx._mm256_castsi256_ps(matches)) as usize & 255;
            let lanes = avx2._mm256_cvtepu8_epi32(pulp::cast([SET_LANES[mask], 0]));
            // Eight are written, whatever matches; there is room, as eight were read for every eight at most that were written. Saying
            // so here spares three checks.
            let at = count.min(room);
            indices[at..at + 8].copy_from_slice(&pulp::cast::<_, [i32; 8]>(avx2._mm256_add_epi32(lanes, first)));
            for (out, value) in [(&mut *a, value_a), (&mut *b, value_b)] {
                let packed = avx2._mm256_permutevar8x32_epi32(pulp::cast(*value), lanes);
                out[at..at + 8].copy_from_slice(&pulp::cast::<_, [i32; 8]>(packed));
            }
            count += mask.count_ones() as usize;
            first = avx2._mm256_add_epi32(first, eight);
        }
        pack_from(8 * eights.len(), keys, bound, [values_a, values_b], [indices, a, b], count)
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

    struct Pack<'a>(&'a [i32], i32, [&'a [i32]; 2]);

    impl Work for Pack<'_> {
        type Output = [Vec<i32>; 3];

        fn run<L: Lanes>(self, lanes: L) -> [Vec<i32>; 3] {
            let [mut indices, mut a, mut b] = [0; 3].map(|zero| vec![zero; self.0.len()]);
            let count = lanes.pack(self.0, self.1, self.2, [&mut indices, &mut a, &mut b]);
            [indices, a, b].map(|mut out| {
                out.truncate(count);
                out
            })
        }
    }

    #[test]
    fn packing_agrees_with_a_filter() {
        let keys: Vec<i32> = (0..203).map(|i: i32| i * 7919 % 257).collect();
        let (a, b): (Vec<i32>, Vec<i32>) = (0..203).map(|i| (-i, i * i)).unzip();
        for len in [0, 1, 7, 8, 9, 64, 203] {
            for bound in [-1, 0, 100, 300] {
                let chosen: Vec<usize> = (0..len).filter(|&i| keys[i] < bound).collect();
                let of = |values: &[i32]| chosen.iter().map(|&i| values[i]).collect::<Vec<_>>();
                let naive = [chosen.iter().map(|&i| i as i32).collect(), of(&a), of(&b)];
                let work = || Pack(&keys[..len], bound, [&a[..len], &b[..len]]);
                assert_eq!(dispatch(work()), naive);
                assert_eq!(work().run(Portable(pulp::Scalar)), naive);
            }
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
                assert_eq!(Indices::<true>(&keys[..len], bound).run(Portable(pulp::Scalar)), above);
                assert_eq!(Indices::<false>(&keys[..len], bound).run(Portable(pulp::Scalar)), below);
            }
        }
    }
}
