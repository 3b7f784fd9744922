//! Attention probabilities into mass and peak.
//!
//! The probabilities are read once, in blocks of columns whose sums stay in registers, and checked on the way: a float is finite and
//! not negative when its bits are small enough. Results are written when everything was found good.
//!
//! Numbers too small for a normal float count as 0, explicitly: whether a thread's floating-point unit flushes them differs from thread to
//! thread (`torch.set_flush_denormal` sets the calling one), and results must not.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU32, Ordering};

use pulp::{Simd, WithSimd};

use crate::error::{Result, fail};
use crate::head::{FINITE, valid};
use crate::simd::{self, vectorised};
use crate::threads;
use crate::view::{View, ViewMut};

/// How far scores fade.
#[derive(Debug, Clone, Copy)]
pub struct Decay {
    /// Factor of the mass per query token.
    pub mass: f64,
    /// Factor of the peak per query token.
    pub peak: f64,
}

/// What [`accumulate`] reads.
#[derive(Debug, Clone, Copy)]
pub struct Looks<'a> {
    /// Attention probabilities `[batch, heads, group, queries, columns]`.
    pub probabilities: View<'a, f32, 5>,
    /// Real tokens after each query in the call, `[batch, queries]`; -1 marks padding, which is ignored.
    pub ages: View<'a, i32, 2>,
    /// Real query tokens of the call per row.
    pub elapsed: &'a [u32],
    /// Factors of the probabilities `[batch, heads, columns]`.
    pub weights: Option<View<'a, f32, 3>>,
}

/// Columns of one piece of work: its mass and peak stay in the first-level cache while the queries pass.
const TILE: usize = 2048;

/// Bytes of probabilities below which helpers cost more than they bring.
const WORTH_THREADS: usize = 1 << 20;

/// A query that is no padding, and the factors by which its probabilities count for the mass, and for the peak.
type Query = (usize, f32, f32);

/// The number, or 0 if it is too small for a normal float. In a thread that flushes those the comparison sees 0, with the same outcome.
#[inline(always)]
pub(crate) fn normal(x: f32) -> f32 {
    if x < f32::MIN_POSITIVE { 0.0 } else { x }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Some columns of one (row, head).
struct Tile<'a> {
    /// Probabilities `[group, queries, columns]` of the head, of which `first` is the tile's first column.
    probabilities: &'a [f32],
    first: usize,
    /// Extents of the probabilities.
    group: usize,
    queries: usize,
    columns: usize,
    real: &'a [Query],
    /// The scores of its columns, how they fade, and by what the looks are weighted.
    mass: &'a [f32],
    peak: &'a [f32],
    fade: [f32; 2],
    weights: Option<&'a [f32]>,
}

/// Sum and maximum over the queries of the looks at a tile's columns, by the vector: what a block of columns sums up to stays in registers.
struct Sum<'a> {
    tile: &'a Tile<'a>,
    sums: &'a mut [f32],
    peaks: &'a mut [f32],
}

/// Vectors of a block.
const TOGETHER: usize = 4;

impl WithSimd for Sum<'_> {
    /// The largest bits of a probability met.
    type Output = u32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> u32 {
        let Self { tile: &Tile { probabilities, first, group, queries, columns, real, .. }, sums, peaks } = self;
        let size = size_of::<S::f32s>();
        let width = TOGETHER * S::F32_LANES;
        let whole = sums.len() / width * width;
        sums.fill(0.0);
        peaks.fill(0.0);
        let ((sums, last_sums), (peaks, last_peaks)) = (sums.split_at_mut(whole), peaks.split_at_mut(whole));
        let (mut worst, mut worst_last) = (simd.splat_u32s(0), 0);
        for &(query, to_mass, to_peak) in real {
            let at = |g: usize| (g * queries + query) * columns + first;
            let (mass_factor, peak_factor) = (simd.splat_f32s(to_mass), simd.splat_f32s(to_peak));
            let blocks = sums.chunks_exact_mut(width).zip(peaks.chunks_exact_mut(width)).enumerate();
            for (block, (sums, peaks)) in blocks {
                let mut total = [simd.splat_f32s(0.0); TOGETHER];
                for g in 0..group {
                    let from = at(g) + block * width;
                    let bytes: &[u8] = bytemuck::cast_slice(&probabilities[from..from + width]);
                    for (i, total) in total.iter_mut().enumerate() {
                        let bits: S::u32s = bytemuck::pod_read_unaligned(&bytes[i * size..(i + 1) * size]);
                        worst = simd.max_u32s(worst, bits);
                        *total = simd.add_f32s(*total, all_normal(simd, simd.transmute_f32s_u32s(bits)));
                    }
                }
                let sums = S::as_mut_simd_f32s(sums).0.iter_mut().zip(S::as_mut_simd_f32s(peaks).0);
                for ((sum, peak), total) in sums.zip(total) {
                    *sum = simd.add_f32s(*sum, all_normal(simd, simd.mul_f32s(total, mass_factor)));
                    *peak = simd.max_f32s(all_normal(simd, simd.mul_f32s(total, peak_factor)), *peak);
                }
            }
            for (i, (sum, peak)) in last_sums.iter_mut().zip(&mut *last_peaks).enumerate() {
                let mut total = 0.0;
                for g in 0..group {
                    let probability = probabilities[at(g) + whole + i];
                    total += normal(probability);
                    worst_last = probability.to_bits().max(worst_last);
                }
                *sum += normal(total * to_mass);
                *peak = larger(normal(total * to_peak), *peak);
            }
        }
        bytemuck::cast_slice(&[worst]).iter().copied().fold(worst_last, u32::max)
    }
}

/// [`normal`] of each.
#[inline(always)]
fn all_normal<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let small = simd.less_than_f32s(x, simd.splat_f32s(f32::MIN_POSITIVE));
    simd.select_f32s(small, simd.splat_f32s(0.0), x)
}

vectorised! {
    /// Turn a tile's sums and peaks into its new scores. Returns the largest bits met of a score or weight, old or new.
    fn merge<'a>(tile: &'a Tile<'a>, sums: &'a mut [f32], peaks: &'a mut [f32]) -> u32 {
        let &Tile { mass, peak, fade, weights, .. } = tile;
        let mut worst = 0;
        if let Some(weights) = weights {
            for ((sum, peak), &weight) in sums.iter_mut().zip(&mut *peaks).zip(weights) {
                worst = weight.to_bits().max(worst);
                *sum = normal(*sum * normal(weight));
                *peak = normal(*peak * normal(weight));
            }
        }
        for ((sum, peak), (&mass, &old_peak)) in sums.iter_mut().zip(peaks).zip(mass.iter().zip(peak)) {
            *sum += normal(normal(mass) * fade[0]);
            *peak = larger(normal(normal(old_peak) * fade[1]), *peak);
            worst = worst.max(mass.to_bits()).max(old_peak.to_bits()).max(sum.to_bits()).max(peak.to_bits());
        }
        worst
    }
}

thread_local! {
    /// The new scores until they may be written.
    static RESULTS: RefCell<Vec<f32>> = RefCell::default();
}

/// Add one call's attention: `mass = mass·γⁿ + w·Σ γ^age·p`, `peak = max(peak·πⁿ, w·max π^age·p)`, p averaged over the group.
///
/// Everything is checked before anything is written.
pub fn accumulate(
    looks: &Looks<'_>,
    mut mass: ViewMut<'_, f32, 3>,
    mut peak: ViewMut<'_, f32, 3>,
    decay: Decay,
    threads: usize,
) -> Result<()> {
    let [batch, heads, group, queries, columns] = looks.probabilities.shape();
    mass.expect("mass", [batch, heads, columns])?;
    peak.expect("peak", [batch, heads, columns])?;
    looks.ages.expect("ages", [batch, queries])?;
    if let Some(weights) = looks.weights {
        weights.expect("weights", [batch, heads, columns])?;
    }
    if looks.elapsed.len() != batch {
        fail!(Tensor, "elapsed must have one entry per row, {batch}, got {}", looks.elapsed.len());
    }
    for (name, factor) in [("mass_decay", decay.mass), ("peak_decay", decay.peak)] {
        if !(0.0..=1.0).contains(&factor) {
            fail!(Config, "{name} must be a number from 0 to 1, got {factor}");
        }
    }
    if group == 0 {
        fail!(
            Tensor,
            "probabilities must have at least one query head per group, got the shape {:?}",
            looks.probabilities.shape()
        );
    }
    if batch * heads * columns == 0 {
        return Ok(());
    }
    let fades: Vec<[f32; 2]> = (looks.elapsed.iter())
        .map(|&n| [decay.mass, decay.peak].map(|factor| normal(factor.powf(f64::from(n)) as f32)))
        .collect();
    let per_probability = |factor: f64, age: i32| normal((factor.powf(f64::from(age)) / group as f64) as f32);
    let real: Vec<Vec<Query>> = (0..batch)
        .map(|b| {
            let ages = looks.ages.data()[b * queries..][..queries].iter().enumerate().filter(|&(_, &age)| age >= 0);
            ages.map(|(j, &age)| (j, per_probability(decay.mass, age), per_probability(decay.peak, age))).collect()
        })
        .collect();

    let probabilities = looks.probabilities.data();
    let threads = if size_of_val(probabilities) < WORTH_THREADS { 1 } else { threads };
    let (mass, peak) = (mass.data(), peak.data());
    let (old_mass, old_peak) = (&*mass, &*peak);
    RESULTS.with_borrow_mut(|results| {
        results.resize(2 * old_mass.len(), 0.0);
        let (sums, peaks) = results.split_at_mut(old_mass.len());
        let (worst, worst_score) = (AtomicU32::new(0), AtomicU32::new(0));
        let tiles = (sums.chunks_exact_mut(columns).zip(peaks.chunks_exact_mut(columns)).enumerate()).flat_map(
            |(head, (sums, peaks))| {
                sums.chunks_mut(TILE).zip(peaks.chunks_mut(TILE)).enumerate().map(move |(t, s)| (head, t * TILE, s))
            },
        );
        threads::for_each(threads, tiles, |(head, first, (sums, peaks))| {
            let row = head / heads;
            let here = head * columns + first..head * columns + first + sums.len();
            let tile = Tile {
                probabilities: &probabilities[head * group * queries * columns..],
                first,
                group,
                queries,
                columns,
                real: &real[row],
                mass: &old_mass[here.clone()],
                peak: &old_peak[here.clone()],
                fade: fades[row],
                weights: looks.weights.map(|weights| &weights.data()[here]),
            };
            let met = simd::dispatch(Sum { tile: &tile, sums: &mut *sums, peaks: &mut *peaks });
            worst.fetch_max(met, Ordering::Relaxed);
            worst_score.fetch_max(merge(&tile, sums, peaks), Ordering::Relaxed);
        });
        if worst.into_inner() > FINITE {
            let shape = looks.probabilities.shape();
            // That of a query which is padding means nothing.
            let age =
                |i: usize| looks.ages.data()[i / columns / queries / group / heads * queries + i / columns % queries];
            refuse("probabilities", probabilities, &shape, |i| age(i) >= 0)?;
        }
        if worst_score.into_inner() > FINITE {
            let (sums, peaks) = results.split_at(old_mass.len());
            let weights = looks.weights.map_or(&[][..], |weights| weights.data());
            let scores = [old_mass, old_peak, weights, sums, peaks];
            for (name, scores) in ["mass", "peak", "weights", "the new mass", "the new peak"].into_iter().zip(scores) {
                refuse(name, scores, &[batch, heads, columns], |_| true)?;
            }
        }
        Ok::<_, crate::Error>(())
    })?;
    RESULTS.with_borrow(|results| {
        let (sums, peaks) = results.split_at(mass.len());
        mass.copy_from_slice(sums);
        peak.copy_from_slice(peaks);
    });
    Ok(())
}

/// Refuse the first of `values` that may not be used, if there is one (-0.0 only looks like it), of those that are `meant`.
fn refuse(name: &str, values: &[f32], shape: &[usize], meant: impl Fn(usize) -> bool) -> Result<()> {
    if let Some(i) = (0..values.len()).find(|&i| !valid(values[i]) && meant(i)) {
        let at: Vec<usize> =
            (0..shape.len()).map(|d| i / shape[d + 1..].iter().product::<usize>() % shape[d]).collect();
        fail!(Score, "{name}{at:?} is {}; it must be finite and not negative", values[i]);
    }
    Ok(())
}
