//! Attention probabilities into mass and peak.

use crate::error::{Result, fail};
use crate::select::valid;
use crate::threads;
use crate::view::{View, ViewMut};

/// An element type of the probabilities.
pub trait Element: Copy + Send + Sync {
    /// The value in single precision.
    fn value(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
}

impl Element for half::bf16 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Element for half::f16 {
    #[inline(always)]
    fn value(self) -> f32 {
        self.to_f32()
    }
}

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
    if group * queries * columns == 0 || batch * heads == 0 {
        return Ok(());
    }
    let probabilities = looks.probabilities.data();
    let per_head = group * queries * columns;
    for (b, row) in probabilities.chunks_exact(heads * per_head).enumerate() {
        for (i, chunk) in row.chunks_exact(columns).enumerate() {
            if looks.ages.data()[b * queries + i % queries] < 0 {
                continue;
            }
            if let Some(c) = chunk.iter().position(|p| !valid(p.value())) {
                let (head, g, query) = (i / queries / group, i / queries % group, i % queries);
                let value = chunk[c].value();
                fail!(
                    Score,
                    "probabilities[{b}, {head}, {g}, {query}, {c}] is {value}; they must be finite and not negative"
                );
            }
        }
    }
    for (name, scores) in [
        ("mass", Some(&*mass.data())),
        ("peak", Some(&*peak.data())),
        ("weights", looks.weights.as_ref().map(View::data)),
    ] {
        if let Some((i, value)) = scores.into_iter().flatten().enumerate().find(|&(_, &v)| !valid(v)) {
            let (head, c) = (i / columns, i % columns);
            fail!(
                Score,
                "{name}[{}, {}, {c}] is {value}; it must be finite and not negative",
                head / heads,
                head % heads
            );
        }
    }

    let heads_of = mass.data().chunks_exact_mut(columns).zip(peak.data().chunks_exact_mut(columns));
    threads::for_each(
        threads,
        probabilities.chunks_exact(per_head).zip(heads_of).enumerate(),
        |(i, (p, (mass, peak)))| {
            let b = i / heads;
            let elapsed = f64::from(looks.elapsed[b]);
            let (mass_fade, peak_fade) = (decay.mass.powf(elapsed) as f32, decay.peak.powf(elapsed) as f32);
            let mut sum = vec![0f32; columns];
            let mut most = vec![0f32; columns];
            for (j, &age) in looks.ages.data()[b * queries..][..queries].iter().enumerate() {
                if age < 0 {
                    continue;
                }
                let (mass_weight, peak_weight) =
                    (decay.mass.powf(f64::from(age)) as f32, decay.peak.powf(f64::from(age)) as f32);
                for c in 0..columns {
                    let mean =
                        (0..group).map(|g| p[(g * queries + j) * columns + c].value()).sum::<f32>() / group as f32;
                    sum[c] += mass_weight * mean;
                    most[c] = most[c].max(peak_weight * mean);
                }
            }
            for c in 0..columns {
                let weight = looks.weights.map_or(1.0, |w| w.data()[i * columns + c]);
                mass[c] = mass[c] * mass_fade + weight * sum[c];
                peak[c] = (peak[c] * peak_fade).max(weight * most[c]);
            }
        },
    );
    Ok(())
}
