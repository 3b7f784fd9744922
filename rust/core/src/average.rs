//! A token's average look: its attention mass divided by what the queries that could look at it weigh.
//!
//! A young token was seen by fewer queries than an old one, so its plain sum is smaller however hard each of them looked.

use crate::simd::{self, Lanes, Work};
use crate::spec::Spec;

/// Factors that turn mass into average looks, by the number of queries that could look.
#[derive(Debug, Clone)]
pub(crate) struct Average {
    gap: i32,
    /// The factor of `i` queries; the last one is that of any more. `None` without decay, where it is one over the number.
    table: Option<Vec<f32>>,
}

impl Average {
    /// The factors of a strategy, or `None` where it judges by the plain mass.
    pub(crate) fn of(spec: &Spec) -> Option<Self> {
        spec.averaged().then(|| {
            let decay = spec.mass_decay();
            // Weights below e^-20 of the first no longer change the sum in f32, and no context has 2^20 tokens that matter before.
            let entries = ((-20.0 / decay.ln()).ceil() as usize).clamp(1, 1 << 20) + 1;
            let table = (decay < 1.0).then(|| (0..entries).map(|queries| factor(decay, queries)).collect());
            Self { gap: spec.look_gap() as i32, table }
        })
    }

    /// Average looks of tokens at `positions` (-1: none); `seen` is one more than the newest position.
    pub(crate) fn looks(&self, positions: &[i32], seen: usize, mass: &[f32], out: &mut Vec<f32>) {
        out.resize(positions.len(), 0.0);
        simd::dispatch(Looks { average: self, positions, seen: seen as i32, mass, out });
    }
}

struct Looks<'a> {
    average: &'a Average,
    positions: &'a [i32],
    seen: i32,
    mass: &'a [f32],
    out: &'a mut [f32],
}

impl Work for Looks<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let newest = self.seen.saturating_sub(self.average.gap).max(0);
        // Of two numbers that are not negative the difference always fits.
        let queries = |position: i32| (newest - position.max(0)).max(0);
        let slots = self.out.iter_mut().zip(self.positions).zip(self.mass);
        if let Some(table) = self.average.table.as_deref() {
            let last = table.len() - 1;
            for ((out, &position), &mass) in slots {
                *out = mass * table[(queries(position) as usize).min(last)];
            }
        } else {
            for ((out, &position), &mass) in slots {
                *out = mass / queries(position).max(1) as f32;
            }
        }
    }
}

/// One over the summed weights of `queries` queries.
fn factor(decay: f64, queries: usize) -> f32 {
    let queries = queries.max(1) as f64;
    let weights = if decay < 1.0 { (1.0 - decay.powf(queries)) / (1.0 - decay) } else { queries };
    (1.0 / weights) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Request;

    #[test]
    fn an_even_look_gives_every_age_the_same_average() {
        for rate in [0.0, 0.01, 0.3, 1.0] {
            let request = Request { sink_update_rate: Some(rate), budget: Some(64), ..Request::default() };
            let spec = Spec::new("liquid_fusion", &request).unwrap();
            let average = Average::of(&spec).unwrap();
            let seen = 100_000;
            let positions: Vec<i32> = vec![0, 10, 50_000, 99_000, 99_900, 99_990];
            let decay = spec.mass_decay();
            let mass: Vec<f32> = positions
                .iter()
                .map(|&p| {
                    (0..seen - p as usize - spec.look_gap()).map(|age| 0.25 * decay.powi(age as i32)).sum::<f64>()
                })
                .map(|m| m as f32)
                .collect();
            let mut looks = Vec::new();
            average.looks(&positions, seen, &mass, &mut looks);
            for look in looks {
                assert!((look - 0.25).abs() < 1e-4, "rate {rate}: {look}");
            }
        }
    }
}
