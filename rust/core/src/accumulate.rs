//! Attention probabilities into mass and peak.
//!
//! The probabilities are read once, in blocks of columns whose sums stay in registers, and checked on the way: a float is finite and
//! not negative when its bits are small enough. Results are written when everything was found good.
//!
//! Numbers too small for a normal float count as 0, explicitly: whether a thread's floating-point unit flushes them differs from thread to
//! thread (`torch.set_flush_denormal` sets the calling one), and results must not.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU32, Ordering};

use pulp::Simd as _;

pub use crate::element::Element;
use crate::element::{normal, wide};
use crate::error::{Result, fail};
use crate::head::{FINITE, valid};
use crate::simd::{self, Lanes, Work};
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
pub struct Looks<'a, T> {
    /// Attention probabilities `[batch, heads, group, queries, columns]`.
    pub probabilities: View<'a, T, 5>,
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

/// Some columns of one (row, head).
struct Tile<'a, T> {
    /// Probabilities `[group, queries, columns]` of the head, of which `first` is the tile's first column.
    probabilities: &'a [T],
    group: usize,
    columns: usize,
    first: usize,
    queries: usize,
    real: &'a [Query],
    /// Sum and maximum over the queries, to be filled.
    sums: &'a mut [f32],
    peaks: &'a mut [f32],
}

impl<T: Element> Work for Tile<'_, T> {
    /// The largest order met.
    type Output = u32;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> u32 {
        let simd = lanes.simd();
        let width = wide::COUNT * L::Simd::F32_LANES;
        let whole = self.sums.len() / width * width;
        self.sums.fill(0.0);
        self.peaks.fill(0.0);
        let ((sums, sums_rest), (peaks, peaks_rest)) = (self.sums.split_at_mut(whole), self.peaks.split_at_mut(whole));
        let (mut worst, mut worst_rest) = (simd.splat_u32s(0), 0);
        for &(query, to_mass, to_peak) in self.real {
            let at = |g: usize| (g * self.queries + query) * self.columns + self.first;
            let (mass_factor, peak_factor) = (simd.splat_f32s(to_mass), simd.splat_f32s(to_peak));
            let blocks = sums.chunks_exact_mut(width).zip(peaks.chunks_exact_mut(width)).enumerate();
            for (block, (sums, peaks)) in blocks {
                let mut total = [simd.splat_f32s(0.0); wide::COUNT];
                for g in 0..self.group {
                    let from = at(g) + block * width;
                    let values = T::values(simd, &self.probabilities[from..from + width], &mut worst);
                    for (total, value) in total.iter_mut().zip(values) {
                        *total = simd.add_f32s(*total, value);
                    }
                }
                let sums = L::Simd::as_mut_simd_f32s(sums).0.iter_mut().zip(L::Simd::as_mut_simd_f32s(peaks).0);
                for ((sum, peak), total) in sums.zip(total) {
                    *sum = simd.add_f32s(*sum, wide::normal(simd, simd.mul_f32s(total, mass_factor)));
                    *peak = simd.max_f32s(wide::normal(simd, simd.mul_f32s(total, peak_factor)), *peak);
                }
            }
            for (i, (sum, peak)) in sums_rest.iter_mut().zip(&mut *peaks_rest).enumerate() {
                let mut total = 0.0;
                for g in 0..self.group {
                    let probability = self.probabilities[at(g) + whole + i];
                    total += normal(probability.value());
                    worst_rest = worst_rest.max(probability.order());
                }
                *sum += normal(to_mass * total);
                *peak = normal(to_peak * total).max(*peak);
            }
        }
        T::in_order(sums, L::Simd::F32_LANES);
        T::in_order(peaks, L::Simd::F32_LANES);
        bytemuck::cast_slice(&[worst]).iter().copied().fold(worst_rest, u32::max)
    }
}

/// The new scores of some columns, from their sums and peaks in place.
struct Merge<'a> {
    mass: &'a [f32],
    peak: &'a [f32],
    weights: Option<&'a [f32]>,
    mass_fade: f32,
    peak_fade: f32,
    sums: &'a mut [f32],
    peaks: &'a mut [f32],
}

impl Work for Merge<'_> {
    /// The largest bits met, old and new.
    type Output = u32;

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) -> u32 {
        let mut worst = 0;
        if let Some(weights) = self.weights {
            for ((sum, peak), &weight) in self.sums.iter_mut().zip(&mut *self.peaks).zip(weights) {
                worst = worst.max(weight.to_bits());
                *sum = normal(*sum * normal(weight));
                *peak = normal(*peak * normal(weight));
            }
        }
        let old = self.mass.iter().zip(self.peak);
        for ((sum, peak), (&mass, &old_peak)) in self.sums.iter_mut().zip(self.peaks).zip(old) {
            worst = worst.max(mass.to_bits()).max(old_peak.to_bits());
            *sum += normal(normal(mass) * self.mass_fade);
            let faded = normal(normal(old_peak) * self.peak_fade);
            *peak = if faded > *peak { faded } else { *peak };
            worst = worst.max(sum.to_bits()).max(peak.to_bits());
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
pub fn accumulate<T: Element>(
    looks: &Looks<'_, T>,
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
            let met = simd::dispatch(Tile {
                probabilities: &probabilities[head * group * queries * columns..][..group * queries * columns],
                group,
                columns,
                first,
                queries,
                real: &real[row],
                sums,
                peaks,
            });
            worst.fetch_max(met, Ordering::Relaxed);
            let met = simd::dispatch(Merge {
                mass: &old_mass[here.clone()],
                peak: &old_peak[here.clone()],
                weights: looks.weights.map(|w| &w.data()[here]),
                mass_fade: fades[row][0],
                peak_fade: fades[row][1],
                sums,
                peaks,
            });
            worst_score.fetch_max(met, Ordering::Relaxed);
        });
        if worst.into_inner() > T::FINITE | T::BELOW {
            find_bad_probability(looks)?;
        }
        if worst_score.into_inner() > FINITE {
            find_bad_score("mass", old_mass, heads, columns)?;
            find_bad_score("peak", old_peak, heads, columns)?;
            if let Some(weights) = looks.weights {
                find_bad_score("weights", weights.data(), heads, columns)?;
            }
            for (name, new) in [("mass", &results[..old_mass.len()]), ("peak", &results[old_mass.len()..])] {
                find_bad_score(&format!("the new {name}"), new, heads, columns)?;
            }
        }
        Ok::<_, crate::Error>(())
    })?;
    RESULTS.with_borrow(|results| {
        let (sums, peaks) = results.split_at(mass.len());
        let tiles = mass.chunks_mut(TILE).zip(peak.chunks_mut(TILE)).zip(sums.chunks(TILE).zip(peaks.chunks(TILE)));
        // By the threads that worked them out, as far as they come: they have them in their caches.
        threads::for_each(threads, tiles, |((mass, peak), (sums, peaks))| {
            mass.copy_from_slice(sums);
            peak.copy_from_slice(peaks);
        });
    });
    Ok(())
}

/// Name the first probability that may not be used, if there is one (-0.0 only looks like it).
fn find_bad_probability<T: Element>(looks: &Looks<'_, T>) -> Result<()> {
    let [batch, heads, group, queries, columns] = looks.probabilities.shape();
    for (i, row) in looks.probabilities.data().chunks_exact(columns).enumerate() {
        let (query, g, head, b) =
            (i % queries, i / queries % group, i / queries / group % heads, i / queries / group / heads);
        debug_assert!(b < batch);
        if looks.ages.data()[b * queries + query] < 0 {
            continue;
        }
        if let Some(c) = row.iter().position(|p| !valid(p.exact())) {
            let value = row[c].exact();
            fail!(
                Score,
                "probabilities[{b}, {head}, {g}, {query}, {c}] is {value}; they must be finite and not negative"
            );
        }
    }
    Ok(())
}

fn find_bad_score(name: &str, scores: &[f32], heads: usize, columns: usize) -> Result<()> {
    if let Some(i) = scores.iter().position(|&s| !valid(s)) {
        let ([b, head, c], value) = ([i / columns / heads, i / columns % heads, i % columns], scores[i]);
        fail!(Score, "{name}[{b}, {head}, {c}] is {value}; it must be finite and not negative");
    }
    Ok(())
}
