//! Attention on the CPU, where torch would pass over the same numbers many times: the softmax of a block of products, and one decode step.
//!
//! Sums have one fixed order, so that neither the threads nor the instruction set change a bit of a head's results; one head's do not
//! depend on another's.

use half::bf16;
use pulp::{Simd, WithSimd};

use crate::accumulate::{Decay, Looks, accumulate};
use crate::error::{Result, fail};
use crate::simd::{self, LANES, sums};
use crate::threads;
use crate::view::{View, ViewMut};

/// Slots that are worked on together.
const BLOCK: usize = 16;

/// Bytes below which helpers cost more than they bring.
pub(crate) const WORTH_THREADS: usize = 1 << 20;

/// Which earlier tokens a layer's queries see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// All of them.
    All,
    /// So many, the query's own included.
    Sliding(i32),
    /// Those from the last multiple of this position on.
    Chunked(i32),
}

impl Window {
    /// The oldest position that a query sees.
    pub(crate) fn oldest(self, query: i32) -> i32 {
        match self {
            Self::All => 0,
            Self::Sliding(size) => (query - size + 1).max(0),
            Self::Chunked(size) => query.max(0) / size * size,
        }
    }

    pub(crate) fn check(self) -> Result<()> {
        match self {
            Self::Sliding(size) | Self::Chunked(size) if size < 1 => {
                fail!(Config, "window must be at least 1 token, got {size}")
            }
            _ => Ok(()),
        }
    }
}

/// e^x for x up to 0, to 1.5 units in the last place; 0 where that is too small for a normal float, NaN for NaN.
///
/// As in Cephes: x = n ln 2 + r, and a polynomial for e^r.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: what is added to it is rounded to an integer, in its lowest bits
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut y = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
        y = y * r + c;
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let value = (y * r * r + r + 1.0) * power;
    if x < -87.0 { 0.0 } else { value }
}

/// Join blocks of lanes by the vector, one fixed lane for each number whatever the vectors' width.
#[inline(always)]
fn joined<S: Simd>(
    simd: S,
    blocks: impl Iterator<Item = [f32; LANES]>,
    start: f32,
    join: impl Fn(S::f32s, S::f32s) -> S::f32s,
) -> [f32; LANES] {
    let (mut lanes, mut totals) = ([start; LANES], [simd.splat_f32s(start); LANES]);
    for block in blocks {
        for (total, x) in totals.iter_mut().zip(S::as_simd_f32s(&block).0) {
            *total = join(*total, *x);
        }
    }
    for (lane, total) in S::as_mut_simd_f32s(&mut lanes).0.iter_mut().zip(totals) {
        *lane = total;
    }
    lanes
}

/// Products of a query with keys at `positions` into its attention probabilities; 0 for what it does not see.
#[inline(always)]
pub(crate) fn softmax_row<S: Simd>(simd: S, row: &mut [f32], positions: &[i32], query: i32, oldest: i32, scale: f32) {
    // A pass for each step, over a row that stays in the first-level cache: loops that do one thing are compiled to vectors.
    for (x, &position) in row.iter_mut().zip(positions) {
        *x = if (position >= oldest) & (position <= query) { *x * scale } else { f32::NEG_INFINITY };
    }
    let (blocks, rest) = row.as_chunks::<LANES>();
    let lanes = joined(simd, blocks.iter().copied(), f32::NEG_INFINITY, |a, b| simd.max_f32s(a, b));
    let most = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    if most == f32::NEG_INFINITY {
        // It sees nothing, or nothing that is a number.
        for x in row {
            *x = if x.is_nan() { f32::NAN } else { 0.0 };
        }
        return;
    }
    for x in row.iter_mut() {
        *x = exp(*x - most);
    }
    let (blocks, rest) = row.as_chunks::<LANES>();
    let mut lanes = joined(simd, blocks.iter().copied(), 0.0, |a, b| simd.add_f32s(a, b));
    lanes.iter_mut().zip(rest).for_each(|(lane, x)| *lane += x);
    let inverse = 1.0 / simd::sum(lanes);
    for x in row {
        *x *= inverse;
    }
}

/// Some queries of one (row, query head).
struct Softmax<'a> {
    rows: &'a mut [f32],
    queries: &'a [i32],
    positions: &'a [i32],
    window: Window,
    scale: f32,
}

impl WithSimd for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (row, &query) in self.rows.chunks_exact_mut(self.positions.len()).zip(self.queries) {
            softmax_row(simd, row, self.positions, query, self.window.oldest(query), self.scale);
        }
    }
}

/// Softmax of `products` `[batch, kv_heads, group, queries, columns]` times `scale`, in place.
///
/// A query of `queries` `[batch, queries]` sees the columns of `columns` `[batch, kv_heads or 1, columns]` whose position is not negative,
/// not after its own and in its window; what it does not see is 0.
pub fn softmax(
    mut products: ViewMut<'_, f32, 5>,
    queries: View<'_, i32, 2>,
    columns: View<'_, i32, 3>,
    scale: f32,
    window: Window,
    threads: usize,
) -> Result<()> {
    let [batch, heads, group, count, width] = products.shape();
    window.check()?;
    queries.expect("query positions", [batch, count])?;
    let kinds = columns.shape()[1];
    if kinds != 1 {
        columns.expect("key positions", [batch, heads, width])?;
    }
    columns.expect("key positions", [batch, kinds, width])?;
    let products = products.data();
    if products.is_empty() {
        return Ok(());
    }
    let threads = if size_of_val(products) < WORTH_THREADS { 1 } else { threads };
    let rows = products.chunks_mut(count * width).enumerate().map(|(i, rows)| {
        let (row, head) = (i / group / heads, i / group % heads);
        let kind = row * kinds + if kinds == 1 { 0 } else { head };
        let positions = &columns.data()[kind * width..(kind + 1) * width];
        Softmax { rows, queries: &queries.data()[row * count..(row + 1) * count], positions, window, scale }
    });
    threads::for_each(threads, rows, simd::dispatch);
    Ok(())
}

/// What keys and values are made of.
pub trait Number: Copy + Send + Sync + private::Sealed {
    /// The number in single precision.
    fn get(self) -> f32;

    /// The nearest number of this kind.
    fn nearest(x: f32) -> Self;
}

mod private {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

impl Number for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }

    #[inline(always)]
    fn nearest(x: f32) -> Self {
        x
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn nearest(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// Products of two vectors, summed up by lanes.
#[inline(always)]
fn products<S: Simd, T: Number>(simd: S, a: &[T], b: &[T]) -> [f32; LANES] {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let blocks = a.iter().zip(b).map(|(a, b)| std::array::from_fn(|i| a[i].get() * b[i].get()));
    let mut lanes = joined(simd, blocks, 0.0, |a, b| simd.add_f32s(a, b));
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += a.get() * b.get();
    }
    lanes
}

/// One new token of each row.
#[derive(Debug)]
pub struct Token<'a, T> {
    /// Queries `[batch, heads, 1, key_dim]`.
    pub query: View<'a, T, 4>,
    /// Its key `[batch, kv_heads, 1, key_dim]`.
    pub key: View<'a, T, 4>,
    /// Its value `[batch, kv_heads, 1, value_dim]`.
    pub value: View<'a, T, 4>,
    /// The slot that it overwrites, `[batch, kv_heads]`.
    pub slot: View<'a, i64, 2>,
    /// Its position in each row.
    pub position: &'a [i32],
}

impl<T> Token<'_, T> {
    /// Check it against slots `[batch, kv_heads, slots]` of keys and values of so many numbers, and count the query heads.
    pub(crate) fn check(
        &self,
        [batch, kv_heads, slots]: [usize; 3],
        [key_dim, value_dim]: [usize; 2],
    ) -> Result<usize> {
        let heads = self.query.shape()[1];
        self.query.expect("query", [batch, heads, 1, key_dim])?;
        self.key.expect("key", [batch, kv_heads, 1, key_dim])?;
        self.value.expect("value", [batch, kv_heads, 1, value_dim])?;
        self.slot.expect("slot", [batch, kv_heads])?;
        if self.position.len() != batch {
            fail!(Tensor, "position must have one entry per row, {batch}, got {}", self.position.len());
        }
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            fail!(Tensor, "query must have a multiple of {kv_heads} heads, got {heads}");
        }
        if let Some(slot) = self.slot.data().iter().find(|&&slot| !usize::try_from(slot).is_ok_and(|s| s < slots)) {
            fail!(Tensor, "slot must be from 0 to {}, got {slot}", slots.wrapping_sub(1));
        }
        Ok(heads)
    }
}

/// What a layer holds.
#[derive(Debug)]
pub struct Held<'a, T> {
    /// Keys `[batch, kv_heads, slots, key_dim]`.
    pub keys: ViewMut<'a, T, 4>,
    /// Values `[batch, kv_heads, slots, value_dim]`.
    pub values: ViewMut<'a, T, 4>,
    /// Positions `[batch, kv_heads, slots]`, the new token's among them; -1 for an empty slot.
    pub positions: View<'a, i32, 3>,
}

/// What looks add to.
#[derive(Debug)]
pub struct Scores<'a> {
    /// Mass and peak `[batch, kv_heads, slots]`.
    pub mass: ViewMut<'a, f32, 3>,
    /// See `mass`.
    pub peak: ViewMut<'a, f32, 3>,
    /// How they fade.
    pub decay: Decay,
    /// From how many tokens away on a look counts.
    pub gap: i32,
    /// Whether looks are weighted by the length of a token's value over its key's.
    pub weighted: bool,
}

/// One (row, kv head) of a decode step.
struct Head<'a, T> {
    query: &'a [T],
    key: &'a [T],
    value: &'a [T],
    slot: usize,
    position: i32,
    oldest: i32,
    scale: f32,
    keys: &'a mut [T],
    values: &'a mut [T],
    positions: &'a [i32],
    out: &'a mut [T],
    /// Probabilities `[group, slots]`, to be filled.
    probabilities: &'a mut [f32],
    /// Weights of looks `[slots]`, to be filled; empty where nobody asks.
    weights: &'a mut [f32],
}

impl<T: Number> WithSimd for Head<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (key_dim, value_dim, slots) = (self.key.len(), self.value.len(), self.positions.len());
        self.keys[self.slot * key_dim..][..key_dim].copy_from_slice(self.key);
        self.values[self.slot * value_dim..][..value_dim].copy_from_slice(self.value);
        let mut lanes = [[0.0; LANES]; BLOCK];
        // Blocks of which nothing is seen are not read: as a rule they are empty, and their memory was never touched.
        let seen = |positions: &[i32]| positions.iter().any(|&position| position >= self.oldest);
        let keys = self.keys.chunks(BLOCK * key_dim).zip(self.positions.chunks(BLOCK)).enumerate();
        for (block, (keys, positions)) in keys.filter(|(_, (_, positions))| seen(positions)) {
            for (g, query) in self.query.chunks_exact(key_dim).enumerate() {
                for (lanes, key) in lanes.iter_mut().zip(keys.chunks_exact(key_dim)) {
                    *lanes = products(simd, query, key);
                }
                sums(&lanes, &mut self.probabilities[g * slots + block * BLOCK..][..positions.len()]);
            }
        }
        for row in self.probabilities.chunks_exact_mut(slots) {
            softmax_row(simd, row, self.positions, self.position, self.oldest, self.scale);
        }
        let mut total = vec![0.0; self.out.len()];
        for (s, value) in self.values.chunks_exact(value_dim).enumerate() {
            if self.positions[s] >= self.oldest {
                for (g, total) in total.chunks_exact_mut(value_dim).enumerate() {
                    let probability = self.probabilities[g * slots + s];
                    total.iter_mut().zip(value).for_each(|(sum, value)| *sum += probability * value.get());
                }
            }
        }
        self.out.iter_mut().zip(total).for_each(|(out, sum)| *out = T::nearest(sum));
        let mut squares = [[0.0; BLOCK]; 2];
        let held = self.keys.chunks(BLOCK * key_dim).zip(self.values.chunks(BLOCK * value_dim));
        let parts = self.weights.chunks_mut(BLOCK).zip(self.positions.chunks(BLOCK)).zip(held);
        for ((weights, _), (keys, values)) in parts.filter(|((_, positions), _)| seen(positions)) {
            let sides = [(keys, key_dim), (values, value_dim)];
            for ((states, dim), squares) in sides.into_iter().zip(&mut squares) {
                for (lanes, vector) in lanes.iter_mut().zip(states.chunks_exact(dim)) {
                    *lanes = products(simd, vector, vector);
                }
                sums(&lanes, squares);
            }
            for (weight, (key, value)) in weights.iter_mut().zip(squares[0].iter().zip(&squares[1])) {
                *weight = if *key == 0.0 { 0.0 } else { value.sqrt() / key.sqrt() };
            }
        }
    }
}

/// A decode step: each row's token is written into its slot and attends to all that its heads hold, itself included.
///
/// `out` `[batch, heads, 1, value_dim]`. Scores fade by one token and gain the looks, averaged over the query heads of a kv head.
pub fn step<T: Number>(
    token: &Token<'_, T>,
    mut held: Held<'_, T>,
    scale: f32,
    window: Window,
    mut out: ViewMut<'_, T, 4>,
    scores: Option<Scores<'_>>,
    threads: usize,
) -> Result<()> {
    let [batch, kv_heads, slots, key_dim] = held.keys.shape();
    let value_dim = held.values.shape()[3];
    window.check()?;
    held.values.expect("values", [batch, kv_heads, slots, value_dim])?;
    held.positions.expect("positions", [batch, kv_heads, slots])?;
    let heads = token.check([batch, kv_heads, slots], [key_dim, value_dim])?;
    out.expect("out", [batch, heads, 1, value_dim])?;
    let group = heads / kv_heads;
    let weighted = scores.as_ref().is_some_and(|scores| scores.weighted);
    let mut probabilities = vec![0.0; batch * heads * slots];
    let mut weights = vec![0.0; if weighted { batch * kv_heads * slots } else { 0 }];
    {
        let (keys, values, out) = (held.keys.data(), held.values.data(), out.data());
        let threads = if size_of_val(keys) + size_of_val(values) < WORTH_THREADS { 1 } else { threads };
        let mut each_weights = weights.chunks_mut(slots);
        let parts = (keys.chunks_mut(slots * key_dim).zip(values.chunks_mut(slots * value_dim)))
            .zip(out.chunks_mut(group * value_dim).zip(probabilities.chunks_mut(group * slots)))
            .enumerate()
            .map(|(i, ((keys, values), (out, probabilities)))| {
                let position = token.position[i / kv_heads];
                Head {
                    query: &token.query.data()[i * group * key_dim..][..group * key_dim],
                    key: &token.key.data()[i * key_dim..][..key_dim],
                    value: &token.value.data()[i * value_dim..][..value_dim],
                    slot: token.slot.data()[i] as usize,
                    position,
                    oldest: window.oldest(position),
                    scale,
                    keys,
                    values,
                    positions: &held.positions.data()[i * slots..][..slots],
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

/// Let scores fade by one token and gain the looks of `probabilities` `[batch, heads, slots]`, of which too near ones become 0.
///
/// `weights` `[batch, kv_heads, slots]`, or none; `positions` as [`Held`] has them, `newest` the queries' own.
pub(crate) fn look(
    probabilities: &mut [f32],
    weights: &[f32],
    group: usize,
    positions: View<'_, i32, 3>,
    newest: &[i32],
    scores: Scores<'_>,
    threads: usize,
) -> Result<()> {
    let [batch, kv_heads, slots] = positions.shape();
    for (i, looks) in probabilities.chunks_exact_mut(slots).enumerate() {
        let newest = newest[i / group / kv_heads];
        let positions = &positions.data()[i / group * slots..][..slots];
        looks
            .iter_mut()
            .zip(positions)
            .for_each(|(look, &at)| *look = if newest - at < scores.gap { 0.0 } else { *look });
    }
    let (ages, elapsed) = (vec![0; batch], vec![1; batch]);
    let weights = scores.weighted.then(|| View::new("weights", weights, [batch, kv_heads, slots])).transpose()?;
    let looks = Looks {
        probabilities: View::new("probabilities", probabilities, [batch, kv_heads, group, 1, slots])?,
        ages: View::new("ages", &ages, [batch, 1])?,
        elapsed: &elapsed,
        weights,
    };
    accumulate(&looks, scores.mass, scores.peak, scores.decay, threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials() {
        for i in 0..if cfg!(miri) { 100 } else { 200_000 } {
            let x = -(i as f32) * 87.0 / 200_000.0;
            let (got, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / exact - 1.0).abs() < 2e-7, "{x}: {got} {exact}");
        }
        let ends = [exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)];
        assert_eq!(ends.map(f32::to_bits), [1.0_f32, 0.0, 0.0].map(f32::to_bits));
        assert!(exp(f32::NAN).is_nan());
    }

    fn row(mut products: Vec<f32>, positions: &[i32], query: i32, window: Window) -> Vec<f32> {
        let width = products.len();
        let view = ViewMut::new("products", &mut products, [1, 1, 1, 1, width]).unwrap();
        let queries = View::new("queries", std::slice::from_ref(&query), [1, 1]).unwrap();
        softmax(view, queries, View::new("columns", positions, [1, 1, width]).unwrap(), 1.0, window, 1).unwrap();
        products
    }

    #[test]
    fn only_what_is_seen_gets_a_share() {
        let positions: Vec<i32> = (0..20).map(|i| if i == 3 { -1 } else { i }).collect();
        let all = row(vec![0.5; 20], &positions, 9, Window::All);
        let due = |i| if i == 3 || i > 9 { 0.0 } else { 1.0 / 9.0 };
        assert!(all.iter().enumerate().all(|(i, &p)| (p - due(i)).abs() < 1e-7), "{all:?}");
        for (window, first) in [(Window::Sliding(4), 6), (Window::Chunked(8), 8)] {
            let some = row(vec![0.5; 20], &positions, 9, window);
            assert!(some.iter().enumerate().all(|(i, &p)| (p > 0.0) == (first..=9).contains(&i)), "{some:?}");
        }
        assert!(row(vec![1.0, f32::NAN], &[5, 6], 4, Window::All).iter().all(|p| p.to_bits() == 0));
        assert!(row(vec![1.0, f32::NAN], &[1, 2], 4, Window::All).iter().all(|p| p.is_nan()));
        assert!(row(vec![f32::NAN], &[1], 4, Window::All)[0].is_nan());
    }
}
