//! A token's average look: its attention mass divided by what the queries that could look at it weigh.
//!
//! A young token was seen by fewer queries than an old one, so its plain sum is smaller however hard each of them looked.

use crate::spec::Spec;

const MOST_ENTRIES: usize = 1 << 16;

/// Factors that turn mass into average looks, by the number of queries that could look.
#[derive(Debug, Clone)]
pub(crate) struct Average {
    decay: f64,
    gap: usize,
    /// The factor of `i` queries; later ones follow from the formula.
    table: Vec<f32>,
}

impl Average {
    /// The factors of a strategy, or `None` where it judges by the plain mass.
    pub(crate) fn of(spec: &Spec) -> Option<Self> {
        spec.averaged().then(|| {
            let (decay, gap) = (spec.mass_decay(), spec.look_gap());
            // Beyond this many queries the weights' sum no longer changes in f32.
            let entries = if decay < 1.0 { (-20.0 / decay.ln()).ceil() as usize } else { MOST_ENTRIES };
            let table = (0..entries.clamp(1, MOST_ENTRIES)).map(|queries| factor(decay, queries)).collect();
            Self { decay, gap, table }
        })
    }

    /// Average looks of tokens at `positions` (-1: none); `seen` is one more than the newest position.
    pub(crate) fn looks(&self, positions: &[i32], seen: usize, mass: &[f32], out: &mut Vec<f32>) {
        out.clear();
        out.extend(positions.iter().zip(mass).map(|(&position, &mass)| {
            let queries = seen.saturating_sub(position.max(0) as usize + self.gap);
            mass * self.table.get(queries).copied().unwrap_or_else(|| factor(self.decay, queries))
        }));
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
