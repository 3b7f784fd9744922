//! Keys and values in 8, 4 or 2 bits: how a vector is coded, and the products that attention needs, without decoding in memory.
//!
//! A vector is turned by a rotation that spreads it over its coordinates ([`encode`]), each coordinate becomes one of 2^bits odd
//! integers, its *level*, and one scale per vector brings the levels back to the vector's length. Sums have one fixed order, so that
//! neither the threads nor the instruction set change a bit; `liquidfusion.compute.codes` is the same in torch.

use half::f16;

use crate::error::{Result, fail};
use crate::simd::{self, LANES, vectorised};
use crate::threads;
use crate::view::{View, ViewMut};

/// Slots that one thread takes at a time.
const BLOCK: usize = 256;
/// Slots whose levels are added together to an output.
const TOGETHER: usize = 4;

/// How many bits a coordinate takes: 8, 4 or 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bits(pub(crate) usize);

impl Bits {
    /// From their number.
    pub fn new(bits: i64) -> Result<Self> {
        match bits {
            8 | 4 | 2 => Ok(Self(bits as usize)),
            _ => fail!(Config, "bits must be 8, 4 or 2, got {bits}"),
        }
    }

    /// Distance of two levels in units of the vector's root mean square: loses least where coordinates are normally distributed.
    fn step(self) -> f32 {
        match self.0 {
            8 => 0.030_76,
            4 => 0.3352,
            _ => 0.9957,
        }
    }
}

/// Coded slots.
#[derive(Debug, Clone, Copy)]
pub struct Codes<'a> {
    /// Bits of a coordinate.
    pub bits: Bits,
    /// `[batch, kv_heads, slots, width * bits / 8]`; byte `j` holds the coordinates `j`, `j + bytes`, … from its lowest bits up.
    pub codes: View<'a, u8, 4>,
    /// `[batch, kv_heads, slots]`, not negative; 0 where a slot is empty.
    pub scales: View<'a, f16, 3>,
}

impl<'a> Codes<'a> {
    /// The codes and scales of each head, [`BLOCK`] slots at a time.
    fn blocks(self) -> impl Iterator<Item = impl Iterator<Item = (&'a [u8], &'a [f16])>> {
        let [_, _, slots, bytes] = self.codes.shape();
        let heads = self.codes.data().chunks(slots * bytes).zip(self.scales.data().chunks(slots));
        heads.map(move |(codes, scales)| codes.chunks(BLOCK * bytes).zip(scales.chunks(BLOCK)))
    }

    fn check(&self) -> Result<[usize; 4]> {
        let [batch, heads, slots, bytes] = self.codes.shape();
        self.scales.expect("scales", [batch, heads, slots])?;
        Ok([batch, heads, slots, bytes * 8 / self.bits.0])
    }
}

/// Coordinates of a coded vector: `head_dim` up to the next multiple of 8.
#[must_use]
pub fn width(head_dim: usize) -> usize {
    head_dim.next_multiple_of(8)
}

/// Whether a coordinate changes its sign before it is mixed with others; as in `liquidfusion.compute.codes`.
pub(crate) fn signs(width: usize) -> Vec<f32> {
    let mut state = 7_u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if state >> 63 == 0 { 1.0 } else { -1.0 }
    };
    std::iter::repeat_with(next).take(width).collect()
}

/// The powers of two that `width` is the sum of, largest first: what the rotation mixes.
fn blocks(width: usize) -> impl Iterator<Item = usize> {
    (0..usize::BITS).rev().map(|bit| 1 << bit).filter(move |block| width & block != 0)
}

/// Code vectors.
///
/// `states` `[batch, kv_heads, columns, head_dim]` minus `mu` `[kv_heads, head_dim]` into `codes`
/// `[batch, kv_heads, columns, width * bits / 8]` and `scales` `[batch, kv_heads, columns]`.
pub fn encode(
    states: View<'_, f32, 4>,
    mu: Option<View<'_, f32, 2>>,
    bits: Bits,
    mut codes: ViewMut<'_, u8, 4>,
    mut scales: ViewMut<'_, f16, 3>,
    threads: usize,
) -> Result<()> {
    let [batch, heads, columns, head_dim] = states.shape();
    let bytes = width(head_dim) * bits.0 / 8;
    codes.expect("codes", [batch, heads, columns, bytes])?;
    scales.expect("scales", [batch, heads, columns])?;
    if let Some(mu) = mu {
        mu.expect("mu", [heads, head_dim])?;
    }
    if states.data().is_empty() {
        return Ok(());
    }
    let signs = signs(width(head_dim));
    let rows = (states.data().chunks(columns * head_dim))
        .zip(codes.data().chunks_mut(columns * bytes))
        .zip(scales.data().chunks_mut(columns))
        .enumerate();
    let parts = rows.flat_map(|(row, ((states, codes), scales))| {
        let mu = mu.map(|mu| &mu.data()[row % heads * head_dim..][..head_dim]);
        (states.chunks(BLOCK * head_dim).zip(codes.chunks_mut(BLOCK * bytes)).zip(scales.chunks_mut(BLOCK)))
            .map(move |((states, codes), scales)| (states, mu, codes, scales))
    });
    threads::for_each(threads, parts, |(states, mu, codes, scales)| {
        encode_some(states, head_dim, mu, &signs, bits, codes, scales);
    });
    Ok(())
}

vectorised! {
    fn encode_some<'a>(
        states: &'a [f32],
        head_dim: usize,
        mu: Option<&'a [f32]>,
        signs: &'a [f32],
        bits: Bits,
        codes: &'a mut [u8],
        scales: &'a mut [f16],
    ) -> () {
        let (mut y, mut sums) = (vec![0.0; signs.len()], vec![0.0; signs.len()]);
        let bytes = codes.len() / scales.len();
        for ((x, codes), scale) in states.chunks(head_dim).zip(codes.chunks_mut(bytes)).zip(scales) {
            y.fill(0.0);
            y[..x.len()].copy_from_slice(x);
            if let Some(mu) = mu {
                y.iter_mut().zip(mu).for_each(|(y, mu)| *y -= mu);
            }
            rotate(&mut y, signs);
            *scale = quantise(&y, bits, codes, &mut sums);
        }
    }
}

/// Apply the rotation in place.
#[inline(always)]
pub(crate) fn rotate(y: &mut [f32], signs: &[f32]) {
    y.iter_mut().zip(signs).for_each(|(y, sign)| *y *= sign);
    mix(y);
}

/// Undo the rotation in place.
#[inline(always)]
pub(crate) fn unrotate(y: &mut [f32], signs: &[f32]) {
    mix(y);
    y.iter_mut().zip(signs).for_each(|(y, sign)| *y *= sign);
}

/// Mix coordinates by Hadamard matrices, each its own inverse.
#[inline(always)]
fn mix(y: &mut [f32]) {
    let (width, mut rest) = (y.len(), y);
    for block in blocks(width) {
        let (part, after) = rest.split_at_mut(block);
        let mut half = 1;
        while half < block {
            for pair in part.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                low.iter_mut().zip(high).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
            }
            half *= 2;
        }
        let norm = 1.0 / (block as f32).sqrt();
        for y in part {
            *y *= norm;
        }
        rest = after;
    }
}

/// Sum of squares, each block's by halves.
#[inline(always)]
fn sum_of_squares(y: &[f32], sums: &mut [f32]) -> f32 {
    sums.iter_mut().zip(y).for_each(|(sum, y)| *sum = y * y);
    let (mut total, mut rest) = (0.0, sums);
    for mut block in blocks(y.len()) {
        let (part, after) = rest.split_at_mut(block);
        while block > 1 {
            block /= 2;
            let (low, high) = part.split_at_mut(block);
            low.iter_mut().zip(high).for_each(|(a, b)| *a += *b);
        }
        total += part[0];
        rest = after;
    }
    total
}

/// Write the codes of a rotated vector and return its scale.
#[inline(always)]
pub(crate) fn quantise(y: &[f32], bits: Bits, codes: &mut [u8], sums: &mut [f32]) -> f16 {
    let norm = sum_of_squares(y, sums).sqrt();
    let (count, half, top) = (bits.0, (1 << (bits.0 - 1)) as f32, ((1 << bits.0) - 1) as f32);
    let rms = norm / (y.len() as f32).sqrt();
    let unit = if rms > 0.0 { bits.step() * rms } else { 1.0 };
    let mut squares = 0.0;
    codes.fill(0);
    for (part, y) in y.chunks_exact(codes.len()).enumerate() {
        for (code, y) in codes.iter_mut().zip(y) {
            let c = (y / unit + half).floor().clamp(0.0, top);
            *code |= (c as u8) << (count * part);
            squares += (2.0 * c - top) * (2.0 * c - top); // integers: exact
        }
    }
    let scale = norm / squares.sqrt();
    f16::from_f32(if norm.is_finite() { scale.min(f16::MAX.to_f32()) } else { scale })
}

/// Levels of one slot into the first coordinates of `to`.
#[inline(always)]
fn levels(bits: Bits, codes: &[u8], to: &mut [f32]) {
    let (count, top) = (bits.0, (1 << bits.0) - 1);
    for (part, to) in to.chunks_exact_mut(codes.len()).take(8 / count).enumerate() {
        let shift = (count * part) as i32;
        for (to, &code) in to.iter_mut().zip(codes) {
            *to = (2 * ((i32::from(code) >> shift) & top) - top) as f32;
        }
    }
}

/// Sum of products of vectors whose length is a multiple of [`LANES`].
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    for (a, b) in a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    simd::sum(sums)
}

/// Vectors of `width` coordinates, each followed by zeros up to a multiple of [`LANES`].
fn padded(vectors: &[f32], width: usize) -> Vec<f32> {
    let full = width.next_multiple_of(LANES);
    let mut to = vec![0.0; vectors.len() / width * full];
    for (to, vector) in to.chunks_mut(full).zip(vectors.chunks(width)) {
        to[..width].copy_from_slice(vector);
    }
    to
}

/// Products of queries with decoded keys: `query` `[batch, kv_heads, queries, width]`, rotated, into `out`
/// `[batch, kv_heads, queries, slots]`.
pub fn logits(query: View<'_, f32, 4>, keys: Codes<'_>, mut out: ViewMut<'_, f32, 4>, threads: usize) -> Result<()> {
    let [batch, heads, slots, width] = keys.check()?;
    let queries = query.shape()[2];
    query.expect("query", [batch, heads, queries, width])?;
    out.expect("out", [batch, heads, queries, slots])?;
    if out.data().is_empty() {
        return Ok(());
    }
    let (query, full) = (padded(query.data(), width), width.next_multiple_of(LANES));
    let heads = query.chunks(queries * full).zip(keys.blocks()).zip(out.data().chunks_mut(queries * slots));
    let parts = heads.flat_map(|((query, blocks), out)| {
        // Each part owns a range of slots of every query's row.
        let mut out: Vec<_> = out.chunks_mut(slots).map(|row| row.chunks_mut(BLOCK)).collect();
        blocks.map(move |(codes, scales)| (query, codes, scales, out.iter_mut().filter_map(Iterator::next).collect()))
    });
    threads::for_each(threads, parts, |(query, codes, scales, out)| {
        logits_of(keys.bits, query, codes, scales, out);
    });
    Ok(())
}

vectorised! {
    fn logits_of<'a>(bits: Bits, query: &'a [f32], codes: &'a [u8], scales: &'a [f16], out: Vec<&'a mut [f32]>) -> () {
        let (full, bytes, mut out) = (query.len() / out.len(), codes.len() / scales.len(), out);
        let mut key = vec![0.0; full];
        for (slot, (codes, scale)) in codes.chunks_exact(bytes).zip(scales).enumerate() {
            levels(bits, codes, &mut key);
            let scale = scale.to_f32();
            for (query, out) in query.chunks_exact(full).zip(&mut out) {
                out[slot] = scale * dot(query, &key);
            }
        }
    }
}

/// Sums of decoded values: `probabilities` `[batch, kv_heads, queries, slots]` into `out` `[batch, kv_heads, queries, width]`,
/// rotated.
pub fn outputs(
    probabilities: View<'_, f32, 4>,
    values: Codes<'_>,
    mut out: ViewMut<'_, f32, 4>,
    threads: usize,
) -> Result<()> {
    let [batch, heads, slots, width] = values.check()?;
    let queries = probabilities.shape()[2];
    probabilities.expect("probabilities", [batch, heads, queries, slots])?;
    out.expect("out", [batch, heads, queries, width])?;
    out.data().fill(0.0);
    if out.data().is_empty() || slots == 0 {
        return Ok(());
    }
    let full = width.next_multiple_of(LANES);
    let per_row = slots.div_ceil(BLOCK);
    let mut sums = vec![0.0; batch * heads * per_row * queries * full];
    let heads = probabilities.data().chunks(queries * slots).zip(values.blocks());
    let parts = heads.zip(sums.chunks_mut(per_row * queries * full)).flat_map(|((probabilities, blocks), sums)| {
        (blocks.zip(sums.chunks_mut(queries * full)).enumerate())
            .map(move |(block, ((codes, scales), sums))| (probabilities, block * BLOCK, codes, scales, sums))
    });
    threads::for_each(threads, parts, |(probabilities, first, codes, scales, sums)| {
        let looks = probabilities.chunks_exact(slots).map(|looks| &looks[first..]).collect();
        add_outputs(values.bits, looks, codes, scales, sums);
    });
    for (out, sums) in out.data().chunks_mut(queries * width).zip(sums.chunks(per_row * queries * full)) {
        for sums in sums.chunks(queries * full) {
            for (out, sums) in out.chunks_mut(width).zip(sums.chunks(full)) {
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
            }
        }
    }
    Ok(())
}

vectorised! {
    /// Add to the `sums` of each query what some slots bring; `looks[i]` are those of query `i` at them.
    fn add_outputs<'a>(bits: Bits, looks: Vec<&'a [f32]>, codes: &'a [u8], scales: &'a [f16], sums: &'a mut [f32]) -> () {
        let (full, bytes) = (sums.len() / looks.len(), codes.len() / scales.len());
        let mut values = vec![0.0; TOGETHER * full];
        let few = codes.chunks(TOGETHER * bytes).zip(scales.chunks(TOGETHER)).enumerate();
        for (i, (codes, scales)) in few {
            for (value, codes) in values.chunks_exact_mut(full).zip(codes.chunks_exact(bytes)) {
                levels(bits, codes, value);
            }
            let [first, second, third, fourth]: [&[f32]; TOGETHER] = std::array::from_fn(|i| &values[i * full..][..full]);
            for (looks, sums) in looks.iter().zip(sums.chunks_exact_mut(full)) {
                let mut weights = [0.0; TOGETHER];
                for (weight, (look, scale)) in weights.iter_mut().zip(looks[i * TOGETHER..].iter().zip(scales)) {
                    *weight = look * scale.to_f32();
                }
                let levels = (first.iter().zip(second)).zip(third.iter().zip(fourth));
                for (sum, ((a, b), (c, d))) in sums.iter_mut().zip(levels) {
                    *sum += (weights[0] * a + weights[1] * b) + (weights[2] * c + weights[3] * d);
                }
            }
        }
    }
}

/// Squared lengths of decoded vectors, without `mu`, into `out` `[batch, kv_heads, slots]`.
pub fn squares(codes: Codes<'_>, mut out: ViewMut<'_, f32, 3>, threads: usize) -> Result<()> {
    let [batch, heads, slots, _] = codes.check()?;
    out.expect("out", [batch, heads, slots])?;
    if out.data().is_empty() {
        return Ok(());
    }
    let heads = codes.blocks().zip(out.data().chunks_mut(slots));
    let parts = heads.flat_map(|(blocks, out)| blocks.zip(out.chunks_mut(BLOCK)));
    threads::for_each(threads, parts, |((part, scales), out)| squares_of(codes.bits, part, scales, out));
    Ok(())
}

vectorised! {
    fn squares_of<'a>(bits: Bits, codes: &'a [u8], scales: &'a [f16], out: &'a mut [f32]) -> () {
        let (count, bytes) = (bits.0, codes.len() / scales.len());
        let top = (1 << count) - 1;
        for (out, (codes, scale)) in out.iter_mut().zip(codes.chunks_exact(bytes).zip(scales)) {
            let mut sum = 0;
            for part in 0..8 / count {
                for &code in codes {
                    let level = 2 * (i32::from(code >> (count * part)) & top) - top;
                    sum += level * level;
                }
            }
            *out = scale.to_f32() * scale.to_f32() * sum as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Decoded vectors by the description, in double precision.
    fn decoded(codes: &[u8], scales: &[f16], bits: usize) -> Vec<Vec<f64>> {
        let bytes = codes.len() / scales.len();
        let level = |code: u8, part: usize| {
            f64::from(2 * (i32::from(code) >> (bits * part) & ((1 << bits) - 1)) - (1 << bits) + 1)
        };
        let vector = |codes: &[u8]| {
            (0..8 / bits)
                .flat_map(|part| codes.iter().map(move |&c| level(c, part)).collect::<Vec<_>>())
                .collect::<Vec<_>>()
        };
        codes
            .chunks(bytes)
            .zip(scales)
            .map(|(c, s)| vector(c).iter().map(|x| x * f64::from(s.to_f32())).collect())
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn products_agree_with_decoded_vectors(
            heads in 1..4_usize, slots in 1..300_usize, eighths in 1..18_usize, queries in 1..5_usize,
            which in 0..3_usize, seed in any::<u64>(), threads in 1..4_usize,
        ) {
            let (bits, width) = ([8, 4, 2][which], 8 * eighths);
            let bytes = width * bits / 8;
            let mut state = seed | 1;
            let mut next = || { state ^= state << 13; state ^= state >> 7; state ^= state << 17; state };
            let codes: Vec<u8> = (0..heads * slots * bytes).map(|_| next() as u8).collect();
            let scales: Vec<f16> = (0..heads * slots).map(|_| f16::from_f32((next() % 100) as f32 / 64.0)).collect();
            let query: Vec<f32> = (0..heads * queries * width).map(|_| (next() % 2001) as f32 / 1000.0 - 1.0).collect();
            let looks: Vec<f32> = (0..heads * queries * slots).map(|_| (next() % 1001) as f32 / 1e5).collect();
            let coded = Codes {
                bits: Bits::new(bits as i64).unwrap(),
                codes: View::new("codes", &codes, [1, heads, slots, bytes]).unwrap(),
                scales: View::new("scales", &scales, [1, heads, slots]).unwrap(),
            };
            let plain = decoded(&codes, &scales, bits);
            let (mut found, mut summed, mut lengths) =
                (vec![f32::NAN; heads * queries * slots], vec![f32::NAN; heads * queries * width], vec![f32::NAN; heads * slots]);
            let query_view = View::new("query", &query, [1, heads, queries, width]).unwrap();
            logits(query_view, coded, ViewMut::new("out", &mut found, [1, heads, queries, slots]).unwrap(), threads).unwrap();
            let looks_view = View::new("looks", &looks, [1, heads, queries, slots]).unwrap();
            outputs(looks_view, coded, ViewMut::new("out", &mut summed, [1, heads, queries, width]).unwrap(), threads).unwrap();
            squares(coded, ViewMut::new("out", &mut lengths, [1, heads, slots]).unwrap(), threads).unwrap();
            let close = |a: f32, b: f64, size: f64| (f64::from(a) - b).abs() <= 1e-5 * size + 1e-6;
            for h in 0..heads {
                for q in 0..queries {
                    let query = &query[(h * queries + q) * width..][..width];
                    let looks = &looks[(h * queries + q) * slots..][..slots];
                    for s in 0..slots {
                        let terms = || query.iter().zip(&plain[h * slots + s]).map(|(&a, b)| f64::from(a) * b);
                        prop_assert!(close(found[(h * queries + q) * slots + s], terms().sum(), terms().map(f64::abs).sum()));
                    }
                    for i in 0..width {
                        let terms = || looks.iter().zip(&plain[h * slots..]).map(|(&a, b)| f64::from(a) * b[i]);
                        prop_assert!(close(summed[(h * queries + q) * width + i], terms().sum(), terms().map(f64::abs).sum()));
                    }
                }
                for s in 0..slots {
                    let sum: f64 = plain[h * slots + s].iter().map(|x| x * x).sum();
                    prop_assert!(close(lengths[h * slots + s], sum, sum));
                }
            }
        }

        #[test]
        fn coding_keeps_length_and_direction(head_dim in 1..150_usize, which in 0..3_usize, seed in any::<u64>(), exponent in -3..5_i32) {
            let bits = [8, 4, 2][which];
            let mut state = seed | 1;
            let mut next = || { state ^= state << 13; state ^= state >> 7; state ^= state << 17; state };
            let states: Vec<f32> = (0..3 * head_dim).map(|_| ((next() % 2001) as f32 / 1000.0 - 1.0) * 10_f32.powi(exponent)).collect();
            let bytes = width(head_dim) * bits / 8;
            let (mut codes, mut scales) = (vec![0; 3 * bytes], vec![f16::ZERO; 3]);
            encode(
                View::new("states", &states, [1, 1, 3, head_dim]).unwrap(), None, Bits::new(bits as i64).unwrap(),
                ViewMut::new("codes", &mut codes, [1, 1, 3, bytes]).unwrap(), ViewMut::new("scales", &mut scales, [1, 1, 3]).unwrap(), 2,
            ).unwrap();
            let signs = signs(width(head_dim));
            for (x, vector) in states.chunks(head_dim).zip(decoded(&codes, &scales, bits)) {
                let mut y = vec![0.0; signs.len()];
                y[..head_dim].copy_from_slice(x);
                rotate(&mut y, &signs);
                let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
                let (length, back) = (norm(&mut x.iter().map(|&x| f64::from(x))), norm(&mut vector.iter().copied()));
                prop_assert!((length - back).abs() <= 2e-3 * length + 1e-4, "{length} {back}");
                let error = norm(&mut vector.iter().zip(&y).map(|(a, &b)| a - f64::from(b)));
                prop_assert!(error <= [0.05, 0.5, 0.95][which] * length + 1e-3, "{error} {length}");
            }
        }
    }

    #[test]
    fn what_cannot_be() {
        assert!(Bits::new(5).unwrap_err().to_string().contains('5'));
        assert_eq!(blocks(88).collect::<Vec<_>>(), [64, 16, 8]);
        let codes = Codes {
            bits: Bits(4),
            codes: View::new("codes", &[0; 8], [1, 1, 2, 4]).unwrap(),
            scales: View::new("scales", &[f16::ZERO; 1], [1, 1, 1]).unwrap(),
        };
        assert!(squares(codes, ViewMut::new("out", &mut [0.0; 2], [1, 1, 2]).unwrap(), 1).is_err());
    }
}
