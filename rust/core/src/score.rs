//! What a token is worth when heavy hitters are chosen: one type per answer.

use crate::accumulate::normal;
use crate::head::{DISTINCT, Head, MASS, PEAK};
use crate::select::ordinal;
use crate::simd::vectorised;
use crate::spec::Spec;

/// Who has no place yet: the candidates whose ordinal is below the bound.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Open<'a> {
    pub(crate) ordinals: &'a [i32],
    pub(crate) bound: i32,
}

/// An answer to what tokens are worth.
pub(crate) trait Score: Sync {
    /// What every candidate of `head` is worth; only those that are open matter. `out` is as long, to be used or not.
    fn worth<'a>(&self, head: Head<'a>, open: Open<'_>, out: &'a mut [f32]) -> &'a [f32];
}

/// The attention mass it gathered.
pub(crate) struct Mass;

impl Score for Mass {
    fn worth<'a>(&self, head: Head<'a>, _: Open<'_>, _: &'a mut [f32]) -> &'a [f32] {
        head.scores[MASS]
    }
}

/// The strongest look it got.
pub(crate) struct Peak;

impl Score for Peak {
    fn worth<'a>(&self, head: Head<'a>, _: Open<'_>, _: &'a mut [f32]) -> &'a [f32] {
        head.scores[PEAK]
    }
}

/// How far its key points from the mean of all keys; worked out by the caller.
///
/// Source: Park et al., "`KeyDiff`: Key Similarity-Based KV Cache Eviction", <https://arxiv.org/abs/2504.15364>.
pub(crate) struct Distinct;

impl Score for Distinct {
    fn worth<'a>(&self, head: Head<'a>, _: Open<'_>, _: &'a mut [f32]) -> &'a [f32] {
        head.scores[DISTINCT]
    }
}

/// The largest mass within so many positions of it, among the open candidates: what surrounds a token that was looked at stays with it.
///
/// Source: Li et al., "`SnapKV`: LLM Knows What You are Looking for Before Generation", <https://arxiv.org/abs/2404.14469>.
pub(crate) struct Pooled(pub(crate) usize);

impl Score for Pooled {
    fn worth<'a>(&self, head: Head<'a>, Open { ordinals, bound }: Open<'_>, out: &'a mut [f32]) -> &'a [f32] {
        let Self(reach) = *self;
        let (positions, mass) = (head.positions, head.scores[MASS]);
        let mut order: Vec<usize> = (0..positions.len()).filter(|&i| ordinals[i] < bound).collect();
        order.sort_unstable_by_key(|&i| positions[i]);
        for (rank, &i) in order.iter().enumerate() {
            let around = &order[rank.saturating_sub(reach)..(rank + reach + 1).min(order.len())];
            let near = around.iter().filter(|&&j| positions[i].abs_diff(positions[j]) as usize <= reach);
            out[i] = f32::from_bits(near.map(|&j| ordinal(mass[j])).fold(0, i32::max) as u32);
        }
        out
    }
}

/// A number drawn for its layer, kv head and position.
pub(crate) struct Drawn;

impl Score for Drawn {
    fn worth<'a>(&self, head: Head<'a>, _: Open<'_>, out: &'a mut [f32]) -> &'a [f32] {
        for (out, &position) in out.iter_mut().zip(head.positions) {
            *out = drawn(head.place.layer, head.place.kv_head, position);
        }
        out
    }
}

/// The n-th number of splitmix64, seeded with 0, n being made of layer, kv head and position; its upper 24 bits, as a fraction.
///
/// Source: Steele et al., "Fast Splittable Pseudorandom Number Generators", <https://doi.org/10.1145/2714064.2660195>.
fn drawn(layer: usize, kv_head: usize, position: i32) -> f32 {
    let n = (layer as u64) << 48 ^ (kv_head as u64) << 32 ^ u64::from(position as u32);
    let mut word = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((word ^ word >> 31) >> 40) as f32 / (1 << 24) as f32
}

/// Its mass divided by what the queries that could look at it weigh.
///
/// A young token was seen by fewer queries than an old one, so its plain sum is smaller however hard each of them looked. An old one
/// may be a second sink: every query looks at it a little for its short key's sake, and it would stay for ever; so its worth halves with its
/// age.
pub(crate) struct Averaged<'a>(pub(crate) &'a Average);

/// Halvings of a token's worth by its age; older tokens are as old as that.
const MOST_HALVINGS: f64 = 24.0;

/// Factors kept at most: 4 MiB, and more tokens than the contexts of today.
const MOST_FACTORS: usize = 1 << 20;

/// Factors that turn mass into an average, by the number of queries that could look.
#[derive(Debug, Clone)]
pub(crate) struct Average {
    gap: usize,
    decay: f64,
    half_life: Option<usize>,
    /// The factors of 0, 1, 2, … queries, as far as they were needed. Where all queries weigh the same they are yet to be divided by their
    /// number.
    factors: Vec<f32>,
    /// More queries than this have this one's factor.
    last: usize,
}

impl Average {
    /// The factors of a strategy, or `None` where it judges by the plain mass.
    pub(crate) fn of(spec: &Spec) -> Option<Self> {
        let (decay, half_life) = (spec.mass_decay(), spec.age_half_life());
        // Weights below e^-20 of the first no longer change the sum in f32.
        let fading = if decay < 1.0 { (-20.0 / decay.ln()).ceil() as usize } else { 0 };
        let aging = half_life.map_or(0.0, |tokens| MOST_HALVINGS * tokens as f64) as usize;
        let last = fading.max(aging).clamp(1, MOST_FACTORS);
        spec.averaged().then(|| Self { gap: spec.look_gap(), decay, half_life, factors: Vec::new(), last })
    }

    /// Work out the factors that rows of at most `seen` tokens need.
    pub(crate) fn cover(&mut self, seen: usize) {
        for queries in self.factors.len()..=seen.min(self.last) {
            self.factors.push(self.factor(queries.max(1)));
        }
    }

    fn factor(&self, queries: usize) -> f32 {
        let queries = queries as f64;
        let halvings = self.half_life.map_or(0.0, |tokens| (queries / tokens as f64).min(MOST_HALVINGS));
        let weight = if self.decay < 1.0 { (1.0 - self.decay.powf(queries)) / (1.0 - self.decay) } else { 1.0 };
        ((-halvings).exp2() / weight) as f32
    }
}

impl Score for Averaged<'_> {
    fn worth<'a>(&self, head: Head<'a>, _: Open<'_>, out: &'a mut [f32]) -> &'a [f32] {
        let Self(average) = self;
        // The position that no query has looked at which counts.
        let newest = head.seen.saturating_sub(average.gap) as i32;
        averages(head.positions, head.scores[MASS], newest, average, out);
        out
    }
}

vectorised! {
    fn averages<'a>(positions: &'a [i32], mass: &'a [f32], newest: i32, average: &'a Average, out: &'a mut [f32]) -> () {
        let factors = &*average.factors;
        let last = factors.len() - 1;
        // First where each factor is, by the vector, in the place of the factor. Of two numbers that are not negative the difference always fits.
        let queries = |position: i32| (newest - position.max(0)).max(0);
        for (out, &position) in out.iter_mut().zip(positions) {
            *out = f32::from_bits(queries(position).min(last as i32) as u32);
        }
        // Eight at a time, so that their look-ups need not wait for each other.
        let factor = |at: f32| factors[(at.to_bits() as usize).min(last)];
        let (eights, rest) = out.as_chunks_mut::<8>();
        for eight in eights {
            *eight = eight.map(factor);
        }
        for out in rest {
            *out = factor(*out);
        }
        if average.decay >= 1.0 {
            for (out, &position) in out.iter_mut().zip(positions) {
                *out /= queries(position).max(1) as f32;
            }
        }
        for (out, &mass) in out.iter_mut().zip(mass) {
            // What is too small for a normal number is 0, whether or not this thread's floating-point unit has it so.
            *out = normal(*out * mass);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::Place;
    use crate::params::{Name, Value};

    /// What those are worth that come before `seen`, the only ones that are open.
    fn worth(score: &dyn Score, positions: &[i32], mass: &[f32], seen: usize) -> Vec<f32> {
        let mut out = vec![0.0; positions.len()];
        let head = Head { place: Place::default(), seen, positions, scores: [mass, &[], &[]] };
        let ordinals: Vec<i32> = positions.iter().map(|&p| if p < 0 { i32::MAX } else { p }).collect();
        score.worth(head, Open { ordinals: &ordinals, bound: seen as i32 }, &mut out).to_vec()
    }

    #[test]
    fn a_pool_reaches_over_positions() {
        // Slot 3 is queued, slot 1 empty; 20 is too far from 10, and 21 and 22 are recent.
        let positions = [10, -1, 5, -1, 7, 20, 21, 22];
        let mass = [1.0, 90.0, 4.0, 80.0, 2.0, 0.5, 60.0, 70.0];
        let pooled = worth(&Pooled(3), &positions, &mass, 21);
        assert_eq!(pooled, [2.0, 0.0, 4.0, 0.0, 4.0, 0.5, 0.0, 0.0]);
    }

    #[test]
    fn drawn_numbers_are_those_of_splitmix64() {
        // The first outputs for the seed 0 are 0xe220a8397b1dcdaf and 0x6e789e6aa1b965f4.
        let first = |position| (drawn(0, 0, position) * (1 << 24) as f32) as u32;
        assert_eq!([first(0), first(1)], [0xe2_20a8, 0x6e_789e]);
        for (layer, kv_head) in (0..3).flat_map(|layer| (0..3).map(move |kv_head| (layer, kv_head))) {
            let sum: f32 = (0..1000).map(|position| drawn(layer, kv_head, position)).sum();
            assert!((450.0..550.0).contains(&sum), "{layer} {kv_head}: {sum}");
        }
    }

    fn averages(
        rate: f64,
        half_life: i64,
        seen: usize,
        positions: &[i32],
        mass: &dyn Fn(i32, f64, i32) -> f32,
    ) -> Vec<f32> {
        let given = [(Name::SinkUpdateRate, Value::Ratio(rate)), (Name::AgeHalfLife, Value::Int(half_life))];
        let spec = Spec::new("liquid_fusion", Some(64), &given).unwrap();
        let mut average = Average::of(&spec).unwrap();
        average.cover(seen);
        let mass: Vec<f32> =
            positions.iter().map(|&position| mass(position, spec.mass_decay(), spec.look_gap() as i32)).collect();
        worth(&Averaged(&average), positions, &mass, seen)
    }

    #[test]
    fn an_even_look_gives_every_age_the_same_average() {
        for rate in [0.0, 0.01, 0.3, 1.0] {
            let positions = [0, 10, 10_000, 19_000, 19_900, 19_990];
            let even = |position, decay: f64, gap| {
                (0..20_000 - position - gap).map(|age| 0.25 * decay.powi(age)).sum::<f64>() as f32
            };
            for worth in averages(rate, 0, 20_000, &positions, &even) {
                assert!((worth - 0.25).abs() < 1e-4, "rate {rate}: {worth}");
            }
        }
    }

    #[test]
    fn an_old_mass_counts_half_after_each_half_life() {
        for rate in [0.0, 0.3] {
            let positions = [50, 100, 250, 2400, 150_000].map(|age| 200_000 - 8 - age);
            let ones = |position, decay: f64, gap| {
                (0..200_000 - position - gap).map(|age| decay.powi(age)).sum::<f64>() as f32
            };
            let worth = averages(rate, 100, 200_000, &positions, &ones);
            for (worth, halvings) in worth.iter().zip([0.5f32, 1.0, 2.5, 24.0, 24.0]) {
                assert!((worth / (-halvings).exp2() - 1.0).abs() < 1e-4, "rate {rate}: {worth}");
            }
        }
    }

    #[test]
    fn a_long_half_life_costs_nothing_before_it_is_needed() {
        let given = [(Name::AgeHalfLife, Value::Int(i64::from(i32::MAX)))];
        let mut average = Average::of(&Spec::new("liquid_fusion", None, &given).unwrap()).unwrap();
        assert_eq!(average.factors.len(), 0);
        average.cover(100);
        assert_eq!((average.factors.len(), average.last), (101, MOST_FACTORS));
    }
}
