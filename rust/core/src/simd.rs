//! Vector instructions, chosen when the program runs, so that one portable wheel uses what the machine has.
//!
//! Plain loops under [`dispatch`] are compiled once per instruction set and vectorised by the compiler. Only what the compiler
//! cannot do by itself, writing matching elements side by side, is a method of [`Lanes`].

use std::ops::Range;
use std::sync::OnceLock;

use pulp::{Arch, NullaryFnOnce, Simd, WithSimd};

use crate::error::{Result, fail};

/// Caps the instruction set: `avx2` or `scalar`. What is chosen never depends on it, only the time does.
pub const VARIABLE: &str = "LIQUIDFUSION_SIMD";

/// The widest instruction set both the machine and this crate know, or what [`VARIABLE`] says.
fn arch() -> Arch {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    #[cfg(test)]
    if let Some(arch) = tests::FORCED.get() {
        return arch;
    }
    *ARCH.get_or_init(|| capped(Arch::new(), &std::env::var(VARIABLE).unwrap_or_default()))
}

/// Whether [`VARIABLE`] is unset or says something that this crate knows.
///
/// # Errors
///
/// `Error::Config` names the value and what is accepted.
pub fn check() -> Result<()> {
    known(&std::env::var(VARIABLE).unwrap_or_default())
}

fn known(cap: &str) -> Result<()> {
    match cap {
        "" | "avx2" | "scalar" => Ok(()),
        _ => fail!(Config, "{VARIABLE} must be avx2 or scalar, got {cap}"),
    }
}

fn capped(widest: Arch, cap: &str) -> Arch {
    match (widest, cap) {
        (_, "scalar") => Arch::Scalar,
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        (Arch::V4(simd), "avx2") => Arch::V3(*simd),
        _ => widest,
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

/// What a look at keys finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Look {
    /// Keys below the window.
    pub(crate) below: usize,
    /// Keys in the window.
    pub(crate) inside: usize,
    /// The largest key, as an unsigned number.
    pub(crate) worst: u32,
}

/// As many marks in a word of 64 keys are written down one by one, without a branch.
const SPARSE: usize = 4;

/// Operations written per instruction set.
pub(crate) trait Lanes: Copy {
    /// Vectors of numbers.
    type Simd: Simd;

    /// From how many keys on a look at a window takes less than counting again and again.
    const LOOKS_FROM: usize;

    fn simd(self) -> Self::Simd;

    /// Mark the keys above (or else below) `bound`: key `i` in bit `i % 64` of word `i / 64`; no bit is set behind the last.
    fn mark<const ABOVE: bool>(self, keys: &[i32], bound: i32, marks: &mut [u64]);

    /// Write the indices of a word's marks to `to`, ascending, the first key's being `first`, as many as fit; returns how many.
    fn expand_word(self, word: u64, first: i32, to: &mut [i32]) -> usize;

    /// Write the indices of marks to `out`, ascending, as many as fit, and return how many were written.
    #[inline(always)]
    fn expand(self, marks: &[u64], out: &mut [i32]) -> usize {
        let mut count = 0;
        for (i, &word) in marks.iter().enumerate() {
            let (first, marked, rest) = ((64 * i) as i32, word.count_ones() as usize, &mut out[count..]);
            match rest.first_chunk_mut::<SPARSE>() {
                Some(to) if marked <= SPARSE => {
                    let mut word = word;
                    for next in to {
                        *next = first + word.trailing_zeros() as i32;
                        word &= word.wrapping_sub(1);
                    }
                    count += marked;
                }
                _ => count += self.expand_word(word, first, rest),
            }
        }
        count
    }

    /// Write the indices of the keys below `bound`, ascending, and what `values` hold there, side by side to `out`; returns how many.
    /// All slices have one length.
    fn pack(self, keys: &[i32], bound: i32, values: [&[i32]; 2], out: [&mut [i32]; 3]) -> usize;

    /// For each of sixteen numbers, how many of `others` are below it.
    fn below(self, numbers: &[i32; 16], others: &[i32]) -> [u32; 16];

    /// Count the keys, none of which is negative, and write those in the window side by side to `near`, which is as long as `keys`.
    fn look(self, keys: &[i32], window: Range<i32>, near: &mut [i32]) -> Look;
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
        Arch::V4(simd) => simd.vectorize(With(work, Avx512(simd))),
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Arch::V3(simd) => simd.vectorize(With(work, Avx2(simd))),
        other => other.dispatch(Any(work)),
    }
}

/// Any machine.
#[derive(Clone, Copy)]
struct Portable<S>(S);

/// Mark the keys from `first` on, a multiple of 64.
#[inline(always)]
fn mark_from<const ABOVE: bool>(first: usize, keys: &[i32], bound: i32, marks: &mut [u64]) {
    for (word, keys) in marks[first / 64..].iter_mut().zip(keys[first..].chunks(64)) {
        let bits = keys.iter().map(|&key| u64::from(if ABOVE { key > bound } else { key < bound }));
        *word = bits.enumerate().fold(0, |word, (i, bit)| word | bit << i);
    }
}

/// Write the indices of the bits that are set, the lowest being `first`, as many as fit.
#[inline(always)]
fn expand_bits(mut word: u64, first: i32, to: &mut [i32]) -> usize {
    let fit = to.len().min(word.count_ones() as usize);
    for next in &mut to[..fit] {
        *next = first + word.trailing_zeros() as i32;
        word &= word.wrapping_sub(1);
    }
    fit
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
        // Always written, kept only if it matches: no branch to predict.
        (indices[count], a[count], b[count]) = (i as i32, value_a, value_b);
        count += usize::from(key < bound);
    }
    count
}

/// Look at the keys from `first` on, those before having been found to be as `found` says.
#[inline(always)]
fn look_from(first: usize, keys: &[i32], window: &Range<i32>, near: &mut [i32], mut found: Look) -> Look {
    for &key in &keys[first..] {
        found.below += usize::from(key < window.start);
        found.worst = found.worst.max(key as u32);
        near[found.inside] = key;
        found.inside += usize::from(window.contains(&key));
    }
    found
}

impl<S: Simd> Lanes for Portable<S> {
    type Simd = S;

    const LOOKS_FROM: usize = usize::MAX;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn mark<const ABOVE: bool>(self, keys: &[i32], bound: i32, marks: &mut [u64]) {
        mark_from::<ABOVE>(0, keys, bound, marks);
    }

    #[inline(always)]
    fn expand_word(self, word: u64, first: i32, to: &mut [i32]) -> usize {
        expand_bits(word, first, to)
    }

    #[inline(always)]
    fn pack(self, keys: &[i32], bound: i32, values: [&[i32]; 2], out: [&mut [i32]; 3]) -> usize {
        pack_from(0, keys, bound, values, out, 0)
    }

    #[inline(always)]
    fn below(self, numbers: &[i32; 16], others: &[i32]) -> [u32; 16] {
        let mut counts = [0; 16];
        for &other in others {
            for (count, &number) in counts.iter_mut().zip(numbers) {
                *count += u32::from(other < number);
            }
        }
        counts
    }

    #[inline(always)]
    fn look(self, keys: &[i32], window: Range<i32>, near: &mut [i32]) -> Look {
        look_from(0, keys, &window, near, Look { below: 0, inside: 0, worst: 0 })
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

    /// Packing takes three times what counting does; it pays where the first-level cache does not hold the keys.
    const LOOKS_FROM: usize = 1 << 13;

    #[inline(always)]
    fn simd(self) -> pulp::x86::V3 {
        self.0
    }

    #[inline(always)]
    fn mark<const ABOVE: bool>(self, keys: &[i32], bound: i32, marks: &mut [u64]) {
        let Self(simd) = self;
        let (avx, avx2) = (simd.avx, simd.avx2);
        let bounds = avx._mm256_set1_epi32(bound);
        let (words, _) = keys.as_chunks::<64>();
        for (mark, keys) in marks.iter_mut().zip(words) {
            let mut bytes = [0; 8];
            for (byte, &keys) in bytes.iter_mut().zip(keys.as_chunks::<8>().0) {
                let keys = pulp::cast(keys);
                let (more, less) = if ABOVE { (keys, bounds) } else { (bounds, keys) };
                let matches = avx2._mm256_cmpgt_epi32(more, less);
                *byte = avx._mm256_movemask_ps(avx._mm256_castsi256_ps(matches)) as u8;
            }
            *mark = u64::from_le_bytes(bytes);
        }
        mark_from::<ABOVE>(64 * words.len(), keys, bound, marks);
    }

    #[inline(always)]
    fn expand_word(self, word: u64, first: i32, to: &mut [i32]) -> usize {
        let Self(simd) = self;
        let (avx, avx2) = (simd.avx, simd.avx2);
        let (mut firsts, eight) = (avx._mm256_set1_epi32(first), avx._mm256_set1_epi32(8));
        let mut written = 0;
        for (i, byte) in word.to_le_bytes().into_iter().enumerate() {
            // Eight are written, whatever is marked.
            let Some(to) = to[written..].first_chunk_mut::<8>() else {
                return written + expand_bits(word >> (8 * i), first + 8 * i as i32, &mut to[written..]);
            };
            let lanes = avx2._mm256_cvtepu8_epi32(pulp::cast([SET_LANES[usize::from(byte)], 0]));
            *to = pulp::cast(avx2._mm256_add_epi32(lanes, firsts));
            written += byte.count_ones() as usize;
            firsts = avx2._mm256_add_epi32(firsts, eight);
        }
        written
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

    #[inline(always)]
    fn below(self, numbers: &[i32; 16], others: &[i32]) -> [u32; 16] {
        let Self(simd) = self;
        let (avx, avx2) = (simd.avx, simd.avx2);
        let [first, second]: [[i32; 8]; 2] = pulp::cast(*numbers);
        let (first, second) = (pulp::cast(first), pulp::cast(second));
        let mut counts = [avx._mm256_setzero_si256(); 2];
        for &other in others {
            let other = avx._mm256_set1_epi32(other);
            counts[0] = avx2._mm256_sub_epi32(counts[0], avx2._mm256_cmpgt_epi32(first, other));
            counts[1] = avx2._mm256_sub_epi32(counts[1], avx2._mm256_cmpgt_epi32(second, other));
        }
        pulp::cast(counts)
    }

    #[inline(always)]
    fn look(self, keys: &[i32], window: Range<i32>, near: &mut [i32]) -> Look {
        let Self(simd) = self;
        let (avx, avx2) = (simd.avx, simd.avx2);
        let (starts, ends) = (avx._mm256_set1_epi32(window.start), avx._mm256_set1_epi32(window.end));
        let mut below = avx._mm256_setzero_si256();
        let mut worst = below;
        let near = &mut near[..keys.len()];
        let room = near.len().saturating_sub(8);
        let (eights, _) = keys.as_chunks::<8>();
        let mut inside = 0;
        for &keys in eights {
            let keys = pulp::cast(keys);
            worst = avx2._mm256_max_epu32(worst, keys);
            let before = avx2._mm256_cmpgt_epi32(starts, keys);
            below = avx2._mm256_sub_epi32(below, before);
            let matches = avx2._mm256_andnot_si256(before, avx2._mm256_cmpgt_epi32(ends, keys));
            let mask = avx._mm256_movemask_ps(avx._mm256_castsi256_ps(matches)) as usize & 255;
            let lanes = avx2._mm256_cvtepu8_epi32(pulp::cast([SET_LANES[mask], 0]));
            // As in `pack`.
            let at = inside.min(room);
            let packed = avx2._mm256_permutevar8x32_epi32(keys, lanes);
            near[at..at + 8].copy_from_slice(&pulp::cast::<_, [i32; 8]>(packed));
            inside += mask.count_ones() as usize;
        }
        let below = pulp::cast::<_, [u32; 8]>(below).iter().sum::<u32>() as usize;
        let worst = pulp::cast::<_, [u32; 8]>(worst).into_iter().fold(0, u32::max);
        look_from(8 * eights.len(), keys, &window, near, Look { below, inside, worst })
    }
}

/// x86 with AVX-512.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
#[derive(Clone, Copy)]
struct Avx512(pulp::x86::V4);

/// The numbers of sixteen lanes.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
const SIXTEEN: [i32; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
impl Lanes for Avx512 {
    type Simd = pulp::x86::V4;

    const LOOKS_FROM: usize = 0;

    #[inline(always)]
    fn simd(self) -> pulp::x86::V4 {
        self.0
    }

    #[inline(always)]
    fn mark<const ABOVE: bool>(self, keys: &[i32], bound: i32, marks: &mut [u64]) {
        let avx512 = self.0.avx512f;
        let bounds = avx512._mm512_set1_epi32(bound);
        let (words, _) = keys.as_chunks::<64>();
        for (mark, keys) in marks.iter_mut().zip(words) {
            let mut parts = [0u16; 4];
            for (part, &keys) in parts.iter_mut().zip(keys.as_chunks::<16>().0) {
                let keys = pulp::cast(keys);
                *part = if ABOVE {
                    avx512._mm512_cmpgt_epi32_mask(keys, bounds)
                } else {
                    avx512._mm512_cmplt_epi32_mask(keys, bounds)
                };
            }
            *mark = pulp::cast(parts);
        }
        mark_from::<ABOVE>(64 * words.len(), keys, bound, marks);
    }

    #[inline(always)]
    fn expand_word(self, word: u64, first: i32, to: &mut [i32]) -> usize {
        let avx512 = self.0.avx512f;
        let sixteen = avx512._mm512_set1_epi32(16);
        let mut indices = avx512._mm512_add_epi32(pulp::cast(SIXTEEN), avx512._mm512_set1_epi32(first));
        let mut written = 0;
        for (i, part) in pulp::cast::<_, [u16; 4]>(word).into_iter().enumerate() {
            // Sixteen are written, whatever is marked.
            let Some(to) = to[written..].first_chunk_mut::<16>() else {
                return written + expand_bits(word >> (16 * i), first + 16 * i as i32, &mut to[written..]);
            };
            *to = pulp::cast(avx512._mm512_maskz_compress_epi32(part, indices));
            written += part.count_ones() as usize;
            indices = avx512._mm512_add_epi32(indices, sixteen);
        }
        written
    }

    #[inline(always)]
    fn pack(self, keys: &[i32], bound: i32, values: [&[i32]; 2], out: [&mut [i32]; 3]) -> usize {
        let avx512 = self.0.avx512f;
        let (bounds, sixteen) = (avx512._mm512_set1_epi32(bound), avx512._mm512_set1_epi32(16));
        let mut first = pulp::cast(SIXTEEN);
        let len = keys.len();
        let [indices, a, b] = out.map(|out| &mut out[..len]);
        let room = len.saturating_sub(16);
        let (whole, _) = keys.as_chunks::<16>();
        let [values_a, values_b] = values;
        let values = values_a.as_chunks::<16>().0.iter().zip(values_b.as_chunks::<16>().0);
        let mut count = 0;
        for (&keys, (&value_a, &value_b)) in whole.iter().zip(values) {
            let mask = avx512._mm512_cmplt_epi32_mask(pulp::cast(keys), bounds);
            // As with AVX2.
            let at = count.min(room);
            let values = [(&mut *indices, first), (&mut *a, pulp::cast(value_a)), (&mut *b, pulp::cast(value_b))];
            for (out, value) in values {
                let packed: [i32; 16] = pulp::cast(avx512._mm512_maskz_compress_epi32(mask, value));
                out[at..at + 16].copy_from_slice(&packed);
            }
            count += mask.count_ones() as usize;
            first = avx512._mm512_add_epi32(first, sixteen);
        }
        pack_from(16 * whole.len(), keys, bound, [values_a, values_b], [indices, a, b], count)
    }

    #[inline(always)]
    fn below(self, numbers: &[i32; 16], others: &[i32]) -> [u32; 16] {
        let avx512 = self.0.avx512f;
        let (numbers, one) = (pulp::cast(*numbers), avx512._mm512_set1_epi32(1));
        let mut counts = avx512._mm512_setzero_si512();
        for &other in others {
            let below = avx512._mm512_cmpgt_epi32_mask(numbers, avx512._mm512_set1_epi32(other));
            counts = avx512._mm512_mask_add_epi32(counts, below, counts, one);
        }
        pulp::cast(counts)
    }

    #[inline(always)]
    fn look(self, keys: &[i32], window: Range<i32>, near: &mut [i32]) -> Look {
        let avx512 = self.0.avx512f;
        let (starts, ends) = (avx512._mm512_set1_epi32(window.start), avx512._mm512_set1_epi32(window.end));
        let (zero, one) = (avx512._mm512_setzero_si512(), avx512._mm512_set1_epi32(1));
        let (mut worst, mut reached) = (zero, zero);
        let near = &mut near[..keys.len()];
        let room = near.len().saturating_sub(16);
        let (whole, _) = keys.as_chunks::<16>();
        let mut inside = 0;
        for &keys in whole {
            let keys = pulp::cast(keys);
            worst = avx512._mm512_max_epu32(worst, keys);
            let from_start = avx512._mm512_cmpge_epi32_mask(keys, starts);
            // In the vector, as there is one port to take masks out by.
            reached = avx512._mm512_mask_add_epi32(reached, from_start, reached, one);
            let mask = avx512._mm512_mask_cmplt_epi32_mask(from_start, keys, ends);
            // As in `pack`.
            let at = inside.min(room);
            let packed: [i32; 16] = pulp::cast(avx512._mm512_maskz_compress_epi32(mask, keys));
            near[at..at + 16].copy_from_slice(&packed);
            inside += mask.count_ones() as usize;
        }
        let reached = pulp::cast::<_, [u32; 16]>(reached).iter().sum::<u32>() as usize;
        let worst = avx512._mm512_reduce_max_epu32(worst);
        let done = 16 * whole.len();
        look_from(done, keys, &window, near, Look { below: done - reached, inside, worst })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// What `arch` says on this thread.
        pub(super) static FORCED: Cell<Option<Arch>> = const { Cell::new(None) };
    }

    /// Run a test, which must stay on its thread, with every instruction set there is here.
    pub(crate) fn everywhere(test: impl Fn()) {
        for cap in ["", "avx2", "scalar"] {
            FORCED.set(Some(capped(Arch::new(), cap)));
            test();
        }
        FORCED.set(None);
    }

    struct Marked<'a, const ABOVE: bool>(&'a [i32], i32, usize);

    impl<const ABOVE: bool> Work for Marked<'_, ABOVE> {
        type Output = Vec<i32>;

        #[inline(always)]
        fn run<L: Lanes>(self, lanes: L) -> Vec<i32> {
            let Self(keys, bound, room) = self;
            let (mut marks, mut out) = (vec![u64::MAX; keys.len().div_ceil(64)], vec![-1; room]);
            lanes.mark::<ABOVE>(keys, bound, &mut marks);
            let count = lanes.expand(&marks, &mut out);
            out.truncate(count);
            out
        }
    }

    struct Pack<'a>(&'a [i32], i32, [&'a [i32]; 2]);

    impl Work for Pack<'_> {
        type Output = [Vec<i32>; 3];

        #[inline(always)]
        fn run<L: Lanes>(self, lanes: L) -> [Vec<i32>; 3] {
            let [mut indices, mut a, mut b] = [0; 3].map(|zero| vec![zero; self.0.len()]);
            let count = lanes.pack(self.0, self.1, self.2, [&mut indices, &mut a, &mut b]);
            [indices, a, b].map(|mut out| {
                out.truncate(count);
                out
            })
        }
    }

    struct LookAt<'a>(&'a [i32], Range<i32>);

    impl Work for LookAt<'_> {
        type Output = (Look, Vec<i32>);

        #[inline(always)]
        fn run<L: Lanes>(self, lanes: L) -> (Look, Vec<i32>) {
            let mut near = vec![0; self.0.len()];
            let look = lanes.look(self.0, self.1, &mut near);
            near.truncate(look.inside);
            (look, near)
        }
    }

    const LENGTHS: [usize; 9] = [0, 1, 7, 8, 17, 64, 131, 192, 203];

    fn keys() -> Vec<i32> {
        (0..203).map(|i: i32| i * 7919 % 257).collect()
    }

    #[test]
    fn packing_agrees_with_a_filter() {
        let keys = keys();
        let (a, b): (Vec<i32>, Vec<i32>) = (0..203).map(|i| (-i, i * i)).unzip();
        everywhere(|| {
            for (len, bound) in LENGTHS.into_iter().flat_map(|len| [-1, 0, 100, 300].map(|bound| (len, bound))) {
                let chosen: Vec<usize> = (0..len).filter(|&i| keys[i] < bound).collect();
                let of = |values: &[i32]| chosen.iter().map(|&i| values[i]).collect::<Vec<_>>();
                let naive = [chosen.iter().map(|&i| i as i32).collect(), of(&a), of(&b)];
                assert_eq!(dispatch(Pack(&keys[..len], bound, [&a[..len], &b[..len]])), naive);
            }
        });
    }

    #[test]
    fn marks_agree_with_a_filter() {
        let keys = keys();
        everywhere(|| {
            for (len, bound) in LENGTHS.into_iter().flat_map(|len| [-1, 0, 3, 100, 250, 300].map(|bound| (len, bound)))
            {
                let naive = |matches: &dyn Fn(i32) -> bool, room| {
                    let indices = (0..len).filter(|&i| matches(keys[i])).map(|i| i as i32);
                    indices.take(room).collect::<Vec<_>>()
                };
                for room in [0, len / 3, len] {
                    let keys = &keys[..len];
                    assert_eq!(dispatch(Marked::<true>(keys, bound, room)), naive(&|key| key > bound, room));
                    assert_eq!(dispatch(Marked::<false>(keys, bound, room)), naive(&|key| key < bound, room));
                }
            }
        });
    }

    #[test]
    fn a_look_agrees_with_a_filter() {
        let keys = keys();
        everywhere(|| {
            for (len, window) in LENGTHS.into_iter().flat_map(|len| [0..0, 0..300, 40..90, 256..400].map(|w| (len, w)))
            {
                let keys = &keys[..len];
                let near: Vec<i32> = keys.iter().copied().filter(|key| window.contains(key)).collect();
                let below = keys.iter().filter(|&&key| key < window.start).count();
                let worst = keys.iter().copied().max().unwrap_or(0) as u32;
                let naive = (Look { below, inside: near.len(), worst }, near);
                assert_eq!(dispatch(LookAt(keys, window)), naive);
            }
        });
    }
}
