//! A decode step over coded slots: as [`crate::attend::step`], and nothing is decoded beyond a block that stays in the first-level cache.
//!
//! Queries are rotated once and outputs back once. What all keys of a head have in common, `mu`, adds the same to all products of a query:
//! softmax does not see it, so it counts for the keys' lengths alone.

use half::{bf16, f16};
use pulp::{Simd, WithSimd};

use crate::attend::{Number, Scores, Token, WORTH_THREADS, Window, look, softmax_row};
use crate::codes::{Bits, quantise, rotate, signs, unrotate, width};
use crate::error::{Result, fail};
use crate::simd::{self, LANES, sums};
use crate::threads;
use crate::view::{View, ViewMut};

/// Sums of products that grow side by side, since one addition waits for the one before.
const CHAINS: usize = 4;

/// Slots that are worked on together, one in each lane: coordinates of `LANES` slots, so that no sum over a vector is left to do.
type Block = [[f32; LANES]];

/// Coded keys or values.
#[derive(Debug)]
pub struct Coded<'a> {
    /// Bits of a coordinate.
    pub bits: Bits,
    /// As [`crate::codes::Codes`] has them, `[batch, kv_heads, slots, width * bits / 8]`.
    pub codes: ViewMut<'a, u8, 4>,
    /// `[batch, kv_heads, slots]`.
    pub scales: ViewMut<'a, f16, 3>,
    /// The first slots' vectors, centred and rotated but not coded, `[batch, kv_heads, first slots, width]`; none of no slot.
    pub first: Option<ViewMut<'a, bf16, 4>>,
}

impl Coded<'_> {
    fn check(&self, name: &str, [batch, heads, slots]: [usize; 3], dim: usize) -> Result<()> {
        let width = width(dim);
        self.codes.expect(&format!("{name} codes"), [batch, heads, slots, width * self.bits.0 / 8])?;
        self.scales.expect(&format!("{name} scales"), [batch, heads, slots])?;
        if let Some(first) = &self.first {
            let count = first.shape()[2];
            first.expect(&format!("{name} first"), [batch, heads, count, width])?;
            if count > slots {
                fail!(Tensor, "{name} first must have at most {slots} slots, got {count}");
            }
        }
        Ok(())
    }

    /// The vectors of each (row, kv head).
    fn heads(&mut self, dim: usize) -> impl Iterator<Item = Vectors<'_>> {
        let ([_, _, slots, bytes], bits) = (self.codes.shape(), self.bits);
        let count = self.first.as_ref().map_or(0, |first| first.shape()[2]) * width(dim);
        let mut rest = self.first.as_mut().map_or(&mut [][..], |first| first.data());
        let heads = self.codes.data().chunks_mut(slots * bytes).zip(self.scales.data().chunks_mut(slots));
        heads.map(move |(codes, scales)| {
            let (first, after) = std::mem::take(&mut rest).split_at_mut(count);
            rest = after;
            Vectors { bits, bytes, codes, scales, first }
        })
    }
}

/// What a layer holds.
#[derive(Debug)]
pub struct Held<'a> {
    /// Keys.
    pub keys: Coded<'a>,
    /// Values.
    pub values: Coded<'a>,
    /// What is subtracted from keys before they are coded, `[kv_heads, key_dim]`.
    pub mu: Option<View<'a, f32, 2>>,
    /// Positions `[batch, kv_heads, slots]`, the new token's among them; -1 for an empty slot.
    pub positions: View<'a, i32, 3>,
}

/// The keys or values of one (row, kv head).
struct Vectors<'a> {
    bits: Bits,
    bytes: usize,
    codes: &'a mut [u8],
    scales: &'a mut [f16],
    first: &'a mut [bf16],
}

impl Vectors<'_> {
    /// Code a vector into a slot.
    #[inline(always)]
    fn write(&mut self, slot: usize, x: &[f32], mu: &[f32], signs: &[f32]) {
        let y = rotated(x, mu, signs);
        if let Some(first) = self.first.chunks_exact_mut(y.len()).nth(slot) {
            first.iter_mut().zip(&y).for_each(|(first, y)| *first = bf16::from_f32(*y));
        }
        let (codes, mut sums) = (&mut self.codes[slot * self.bytes..][..self.bytes], vec![0.0; y.len()]);
        self.scales[slot] = quantise(&y, self.bits, codes, &mut sums);
    }

    /// Levels of the slots from `start` on into `block` and their scales into `scales`; 0 for those that there are not.
    #[inline(always)]
    fn read(&self, start: usize, block: &mut Block, scales: &mut [f32; LANES]) {
        let held = self.scales[start..].iter().map(|scale| scale.to_f32()).chain(std::iter::repeat(0.0));
        scales.iter_mut().zip(held).for_each(|(to, scale)| *to = scale);
        levels(self.bits, &self.codes[start * self.bytes..], block);
    }

    /// Put what is not coded over the levels of the slots from `start` on, where it is `seen`.
    #[inline(always)]
    fn read_first(&self, start: usize, block: &mut Block, scales: &mut [f32; LANES], seen: impl Fn(usize) -> bool) {
        let first = self.first.chunks_exact(block.len()).enumerate().skip(start);
        for (lane, (slot, first)) in first.take(LANES).enumerate() {
            if seen(slot) {
                block.iter_mut().zip(first).for_each(|(to, x)| to[lane] = x.get());
                scales[lane] = 1.0;
            }
        }
    }
}

/// A vector minus `mu`, if that is not empty, rotated.
#[inline(always)]
fn rotated(x: &[f32], mu: &[f32], signs: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; signs.len()];
    y[..x.len()].copy_from_slice(x);
    y.iter_mut().zip(mu).for_each(|(y, mu)| *y -= mu);
    rotate(&mut y, signs);
    y
}

/// For each slot of a block the sum over its coordinates of `term`, which gets their number and value.
#[inline(always)]
fn total<S: Simd>(simd: S, block: &Block, term: impl Fn(usize, S::f32s) -> S::f32s) -> [f32; LANES] {
    let mut sums = [[simd.splat_f32s(0.0); LANES]; CHAINS];
    for (few, coordinates) in block.as_chunks::<CHAINS>().0.iter().enumerate() {
        for (i, (sum, coordinate)) in sums.iter_mut().zip(coordinates).enumerate() {
            for (sum, x) in sum.iter_mut().zip(S::as_simd_f32s(coordinate).0) {
                *sum = simd.add_f32s(*sum, term(few * CHAINS + i, *x));
            }
        }
    }
    let mut lanes = [0.0; LANES];
    for (i, lane) in S::as_mut_simd_f32s(&mut lanes).0.iter_mut().enumerate() {
        *lane = simd.add_f32s(simd.add_f32s(sums[0][i], sums[1][i]), simd.add_f32s(sums[2][i], sums[3][i]));
    }
    lanes
}

/// Add each coordinate of a block's slots, times their factors, to that slot's lane.
#[inline(always)]
fn add<S: Simd>(simd: S, totals: &mut Block, block: &Block, factors: &[f32; LANES]) {
    let factors = S::as_simd_f32s(factors).0;
    for (total, coordinate) in totals.iter_mut().zip(block) {
        let numbers = S::as_mut_simd_f32s(total).0.iter_mut().zip(S::as_simd_f32s(coordinate).0);
        for ((total, x), factor) in numbers.zip(factors) {
            *total = simd.add_f32s(*total, simd.mul_f32s(*x, *factor));
        }
    }
}

/// Levels of [`LANES`] slots, or of as many as have codes, side by side: those of coordinate `i` into `to[i]`.
#[inline(always)]
fn levels(bits: Bits, codes: &[u8], to: &mut [[f32; LANES]]) {
    let (bytes, top) = (to.len() * bits.0 / 8, (1 << bits.0) - 1);
    for first in (0..bytes).step_by(4) {
        let (own, mut words) = (4.min(bytes - first), [0; LANES]);
        for (word, codes) in words.iter_mut().zip(codes.chunks_exact(bytes)) {
            *word = match codes[first..] {
                [a, b, c, d, ..] => i32::from_le_bytes([a, b, c, d]),
                [a, b, ..] => i32::from_le_bytes([a, b, 0, 0]),
                _ => 0,
            };
        }
        for (byte, part) in (0..own).flat_map(|byte| (0..8 / bits.0).map(move |part| (byte, part))) {
            let shift = 8 * byte + bits.0 * part;
            for (to, word) in to[first + byte + part * bytes].iter_mut().zip(&words) {
                *to = (2 * ((word >> shift) & top) - top) as f32;
            }
        }
    }
}

/// One (row, kv head) of a decode step.
struct Head<'a> {
    query: &'a [f32],
    key: &'a [f32],
    value: &'a [f32],
    mu: &'a [f32],
    /// Signs of the rotations of keys and of values.
    signs: [&'a [f32]; 2],
    slot: usize,
    position: i32,
    oldest: i32,
    scale: f32,
    keys: Vectors<'a>,
    values: Vectors<'a>,
    positions: &'a [i32],
    out: &'a mut [f32],
    /// Probabilities `[group, slots]`, to be filled.
    probabilities: &'a mut [f32],
    /// Weights of looks `[slots]`, to be filled; empty where nobody asks.
    weights: &'a mut [f32],
}

impl WithSimd for Head<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let ([key_signs, value_signs], slots) = (self.signs, self.positions.len());
        self.keys.write(self.slot, self.key, self.mu, key_signs);
        self.values.write(self.slot, self.value, &[], value_signs);
        let each = self.query.chunks_exact(self.key.len());
        let (queries, mean): (Vec<_>, _) =
            (each.map(|query| rotated(query, &[], key_signs)).collect(), rotated(self.mu, &[], key_signs));
        let mean_square: f32 = mean.iter().map(|x| x * x).sum();
        // Blocks of which nothing is seen are not read: as a rule they are empty, and their memory was never touched.
        let seen = |slot: usize| self.positions[slot] >= self.oldest;
        let starts = || (0..slots).step_by(LANES).filter(|&start| (start..slots.min(start + LANES)).any(seen));
        let (mut block, mut scales) = (vec![[0.0; LANES]; key_signs.len()], [0.0; LANES]);
        for start in starts() {
            self.keys.read(start, &mut block, &mut scales);
            if !self.weights.is_empty() {
                let squares = total(simd, &block, |_, x| simd.mul_f32s(x, x));
                let along = total(simd, &block, |i, x| simd.mul_f32s(x, simd.splat_f32s(mean[i])));
                for (lane, length) in self.weights[start..].iter_mut().take(LANES).enumerate() {
                    let (scale, square, along) = (scales[lane], squares[lane], along[lane]);
                    // |x + mu|^2 = |x|^2 + 2 x mu + |mu|^2; rounding may leave less than nothing.
                    *length = (scale * scale * square + 2.0 * (scale * along) + mean_square).max(0.0).sqrt();
                }
            }
            self.keys.read_first(start, &mut block, &mut scales, seen);
            for (query, row) in queries.iter().zip(self.probabilities.chunks_exact_mut(slots)) {
                let products = total(simd, &block, |i, x| simd.mul_f32s(x, simd.splat_f32s(query[i])));
                let numbers = products.iter().zip(&scales).map(|(x, scale)| x * scale);
                row[start..].iter_mut().zip(numbers).for_each(|(to, x)| *to = x);
            }
        }
        for row in self.probabilities.chunks_exact_mut(slots) {
            softmax_row(simd, row, self.positions, self.position, self.oldest, self.scale);
        }
        block.resize(value_signs.len(), [0.0; LANES]);
        let mut totals = vec![[0.0; LANES]; queries.len() * block.len()];
        for start in starts() {
            self.values.read(start, &mut block, &mut scales);
            if !self.weights.is_empty() {
                let squares = total(simd, &block, |_, x| simd.mul_f32s(x, x));
                for (lane, weight) in self.weights[start..].iter_mut().take(LANES).enumerate() {
                    *weight = if *weight == 0.0 { 0.0 } else { scales[lane] * squares[lane].sqrt() / *weight };
                }
            }
            self.values.read_first(start, &mut block, &mut scales, seen);
            for (row, totals) in self.probabilities.chunks_exact(slots).zip(totals.chunks_exact_mut(block.len())) {
                let mut factors = [0.0; LANES];
                for (lane, (factor, look)) in factors.iter_mut().zip(&row[start..]).enumerate() {
                    // The scale of what is not seen may be no number.
                    *factor = if seen(start + lane) { look * scales[lane] } else { 0.0 };
                }
                add(simd, totals, &block, &factors);
            }
        }
        let mut y = vec![0.0; block.len()];
        for (out, totals) in self.out.chunks_exact_mut(self.value.len()).zip(totals.chunks_exact(block.len())) {
            sums(totals, &mut y);
            unrotate(&mut y, value_signs);
            out.copy_from_slice(&y[..out.len()]);
        }
    }
}

/// A decode step: each row's token is coded into its slot and attends to all that its heads hold, itself included.
///
/// `out` `[batch, heads, 1, value_dim]`. Scores fade by one token and gain the looks, averaged over the query heads of a kv head.
pub fn step(
    token: &Token<'_, f32>,
    mut held: Held<'_>,
    scale: f32,
    window: Window,
    mut out: ViewMut<'_, f32, 4>,
    scores: Option<Scores<'_>>,
    threads: usize,
) -> Result<()> {
    let ([batch, kv_heads, slots], key_dim) = (held.positions.shape(), token.key.shape()[3]);
    let value_dim = token.value.shape()[3];
    window.check()?;
    held.keys.check("keys", [batch, kv_heads, slots], key_dim)?;
    held.values.check("values", [batch, kv_heads, slots], value_dim)?;
    let heads = token.check([batch, kv_heads, slots], [key_dim, value_dim])?;
    out.expect("out", [batch, heads, 1, value_dim])?;
    if let Some(mu) = held.mu {
        mu.expect("mu", [kv_heads, key_dim])?;
    }
    if key_dim == 0 || value_dim == 0 {
        fail!(Tensor, "keys and values must have coordinates, got {key_dim} and {value_dim}");
    }
    let group = heads / kv_heads;
    let weighted = scores.as_ref().is_some_and(|scores| scores.weighted);
    let mut probabilities = vec![0.0; batch * heads * slots];
    let mut weights = vec![0.0; if weighted { batch * kv_heads * slots } else { 0 }];
    {
        let signs = [signs(width(key_dim)), signs(width(value_dim))];
        // As much work as for numbers.
        let numbers = batch * kv_heads * slots * (key_dim + value_dim) * size_of::<f32>();
        let threads = if numbers < WORTH_THREADS { 1 } else { threads };
        let (mut each_weights, positions, mu) = (weights.chunks_mut(slots), held.positions.data(), held.mu);
        let parts = (held.keys.heads(key_dim).zip(held.values.heads(value_dim)))
            .zip(out.data().chunks_mut(group * value_dim).zip(probabilities.chunks_mut(group * slots)))
            .enumerate()
            .map(|(i, ((keys, values), (out, probabilities)))| {
                let position = token.position[i / kv_heads];
                Head {
                    query: &token.query.data()[i * group * key_dim..][..group * key_dim],
                    key: &token.key.data()[i * key_dim..][..key_dim],
                    value: &token.value.data()[i * value_dim..][..value_dim],
                    mu: mu.map_or(&[], |mu| &mu.data()[i % kv_heads * key_dim..][..key_dim]),
                    signs: [&signs[0], &signs[1]],
                    slot: token.slot.data()[i] as usize,
                    position,
                    oldest: window.oldest(position),
                    scale,
                    keys,
                    values,
                    positions: &positions[i * slots..][..slots],
                    out,
                    probabilities,
                    weights: each_weights.next().unwrap_or_default(),
                }
            });
        threads::for_each(threads, parts, simd::dispatch);
    }
    let Some(scores) = scores else { return Ok(()) };
    look(&mut probabilities, &weights, group, held.positions, token.position, scores, threads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::everywhere;

    /// Output of a head of 21 slots and two queries.
    fn stepped(bits: i64, dim: usize) -> Vec<u32> {
        const SLOTS: usize = 21;
        let mut state = 88_172_645_463_325_252_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % 2001) as f32 / 1000.0 - 1.0
        };
        let mut numbers = |count: usize| (0..count).map(|_| next()).collect::<Vec<f32>>();
        let bits = Bits::new(bits).unwrap();
        let bytes = width(dim) * bits.0 / 8;
        let mut sides = [0, 1].map(|_| {
            let codes: Vec<u8> = numbers(SLOTS * bytes).iter().map(|x| (x * 100.0) as i32 as u8).collect();
            let scales: Vec<f16> = numbers(SLOTS).iter().map(|x| f16::from_f32(x.abs())).collect();
            let first: Vec<bf16> = numbers(2 * width(dim)).iter().map(|x| bf16::from_f32(*x)).collect();
            (codes, scales, first)
        });
        let [keys, values] = sides.each_mut().map(|(codes, scales, first)| Coded {
            bits,
            codes: ViewMut::new("codes", codes, [1, 1, SLOTS, bytes]).unwrap(),
            scales: ViewMut::new("scales", scales, [1, 1, SLOTS]).unwrap(),
            first: Some(ViewMut::new("first", first, [1, 1, 2, width(dim)]).unwrap()),
        });
        let (query, key, value, mu) = (numbers(2 * dim), numbers(dim), numbers(dim), numbers(dim));
        let positions: Vec<i32> = (0..21).collect();
        let token = Token {
            query: View::new("query", &query, [1, 2, 1, dim]).unwrap(),
            key: View::new("key", &key, [1, 1, 1, dim]).unwrap(),
            value: View::new("value", &value, [1, 1, 1, dim]).unwrap(),
            slot: View::new("slot", &[20], [1, 1]).unwrap(),
            position: &[20],
        };
        let (mut out, mut mass, mut peak) = (vec![0.0; 2 * dim], vec![0.0; SLOTS], vec![0.0; SLOTS]);
        let scores = Scores {
            mass: ViewMut::new("mass", &mut mass, [1, 1, SLOTS]).unwrap(),
            peak: ViewMut::new("peak", &mut peak, [1, 1, SLOTS]).unwrap(),
            decay: crate::accumulate::Decay { mass: 0.9, peak: 0.8 },
            gap: 2,
            weighted: true,
        };
        let mu = Some(View::new("mu", &mu, [1, dim]).unwrap());
        let held = Held { keys, values, mu, positions: View::new("positions", &positions, [1, 1, SLOTS]).unwrap() };
        let view = ViewMut::new("out", &mut out, [1, 2, 1, dim]).unwrap();
        step(&token, held, 0.2, Window::All, view, Some(scores), 1).unwrap();
        assert!(out.iter().chain(&mass).all(|x| x.is_finite()));
        out.iter().chain(&mass).chain(&peak).map(|x| x.to_bits()).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for (bits, dim) in [(8, 64), (4, 64), (2, 40), (4, 5)] {
            let found = std::cell::RefCell::new(Vec::new());
            everywhere(|| found.borrow_mut().push(stepped(bits, dim)));
            let found = found.into_inner();
            assert_eq!(found[0], found[1], "{bits} bits of {dim}");
        }
    }
}
