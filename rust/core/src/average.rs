//! A token's average look: its attention mass divided by what the queries that could look at it weigh.
//!
//! A young token was seen by fewer queries than an old one, so its plain sum is smaller however hard each of them looked. An old one
//! may be a second sink: every query looks at it a little for its short key's sake, and it would stay for ever; so a look's worth
//! halves with the token's age.

use crate::spec::Spec;

/// Factors that turn mass into average looks, by the number of queries that could look.
#[derive(Debug, Clone)]
pub(crate) struct Average {
    gap: i32,
    /// Whether older queries weigh less.
    fades: bool,
    /// The factor of `i` queries; the last one is that of any more. Where all queries weigh the same it is yet to be divided by their
    /// number.
    table: Vec<f32>,
}

/// Halvings of a token's worth by its age; older tokens are as old as that.
const MOST_HALVINGS: f64 = 24.0;

/// Entries of a table at most: 4 MiB, and more tokens than the contexts of today.
const MOST_ENTRIES: usize = 1 << 20;

impl Average {
    /// The factors of a strategy, or `None` where it judges by the plain mass.
    pub(crate) fn of(spec: &Spec) -> Option<Self> {
        spec.averaged().then(|| {
            let decay = spec.mass_decay();
            let fades = decay < 1.0;
            // Weights below e^-20 of the first no longer change the sum in f32.
            let fading = if fades { (-20.0 / decay.ln()).ceil() as usize } else { 0 };
            let aging = spec.age_half_life().map_or(0.0, |tokens| MOST_HALVINGS * tokens as f64) as usize;
            let last = fading.max(aging).clamp(1, MOST_ENTRIES);
            let age = |queries: usize| spec.age_half_life().map_or(1.0, |tokens| halved(queries, tokens));
            let factor = |queries: usize| (age(queries) * weight(decay, queries)) as f32;
            let table = (0..=last).map(|queries| factor(queries.max(1))).collect();
            Self { gap: spec.look_gap() as i32, fades, table }
        })
    }
}

/// Queries that could look at the token at `position`. Of two numbers that are not negative the difference always fits.
#[inline(always)]
fn queries(newest: i32, position: i32) -> i32 {
    (newest - position.max(0)).max(0)
}

/// What a token's mass is worth.
pub(crate) trait Judge: Copy {
    /// Fill `words` with what `judged` needs of each position (-1: none).
    fn prepare(self, positions: &[i32], words: &mut [i32]);

    /// The worth of a mass, by its word.
    fn judged(self, mass: f32, word: i32) -> f32;
}

/// What is to be done with a judge.
pub(crate) trait WithJudge {
    /// Do it; mark it `#[inline(always)]`.
    fn run(self, judge: impl Judge);
}

/// Do `work` by the average, or else by the mass itself; `seen` is one more than the newest position.
#[inline(always)]
pub(crate) fn judge(average: Option<&Average>, seen: i32, work: impl WithJudge) {
    let Some(average) = average else { return work.run(Plain) };
    // The position that no query has looked at which counts.
    let newest = seen.saturating_sub(average.gap).max(0);
    let table = &average.table;
    if average.fades { work.run(PerWeight { newest, table }) } else { work.run(PerQuery { newest, table }) }
}

/// The mass itself.
#[derive(Clone, Copy)]
struct Plain;

/// The mass per query that could look, where none fades, times the age's factor.
#[derive(Clone, Copy)]
struct PerQuery<'a> {
    newest: i32,
    table: &'a [f32],
}

/// The mass times what the number of queries that could look has in a table.
#[derive(Clone, Copy)]
struct PerWeight<'a> {
    newest: i32,
    table: &'a [f32],
}

impl Judge for Plain {
    #[inline(always)]
    fn prepare(self, _: &[i32], _: &mut [i32]) {}

    #[inline(always)]
    fn judged(self, mass: f32, _: i32) -> f32 {
        mass
    }
}

impl Judge for PerQuery<'_> {
    #[inline(always)]
    fn prepare(self, positions: &[i32], words: &mut [i32]) {
        let last = self.table.len() - 1;
        for (word, &position) in words.iter_mut().zip(positions) {
            let queries = queries(self.newest, position).max(1);
            *word = (self.table[last.min(queries as usize)] / queries as f32).to_bits() as i32;
        }
    }

    #[inline(always)]
    fn judged(self, mass: f32, factor: i32) -> f32 {
        mass * f32::from_bits(factor as u32)
    }
}

impl Judge for PerWeight<'_> {
    #[inline(always)]
    fn prepare(self, positions: &[i32], words: &mut [i32]) {
        let last = self.table.len() as i32 - 1;
        let mut nearest = last;
        for (word, &position) in words.iter_mut().zip(positions) {
            *word = queries(self.newest, position).min(last);
            nearest = nearest.min(*word);
        }
        // In a long context most tokens are older than the table reaches.
        if nearest == last {
            words.fill(self.table[last as usize].to_bits() as i32);
            return;
        }
        let factor = |entry: i32| self.table[entry as usize].to_bits() as i32;
        let (eights, rest) = words.as_chunks_mut::<8>();
        for eight in eights {
            *eight = eight.map(factor);
        }
        for word in rest {
            *word = factor(*word);
        }
    }

    #[inline(always)]
    fn judged(self, mass: f32, factor: i32) -> f32 {
        mass * f32::from_bits(factor as u32)
    }
}

/// What is left of a look at a token that `queries` queries could look at, if `half_life` of them halve it.
fn halved(queries: usize, half_life: usize) -> f64 {
    (-(queries as f64 / half_life as f64).min(MOST_HALVINGS)).exp2()
}

/// One over the summed weights of `queries` queries, or 1 where all weigh the same.
fn weight(decay: f64, queries: usize) -> f64 {
    if decay < 1.0 { (1.0 - decay) / (1.0 - decay.powf(queries as f64)) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Request;

    struct Fill<'a> {
        positions: &'a [i32],
        mass: &'a [f32],
        looks: &'a mut [f32],
    }

    impl WithJudge for Fill<'_> {
        fn run(self, judge: impl Judge) {
            let mut words = vec![0; self.mass.len()];
            judge.prepare(self.positions, &mut words);
            for (look, (&mass, word)) in self.looks.iter_mut().zip(self.mass.iter().zip(words)) {
                *look = judge.judged(mass, word);
            }
        }
    }

    #[test]
    fn an_even_look_gives_every_age_the_same_average() {
        for rate in [0.0, 0.01, 0.3, 1.0] {
            let request = Request {
                sink_update_rate: Some(rate),
                budget: Some(64),
                age_half_life: Some(0),
                ..Request::default()
            };
            let spec = Spec::new("liquid_fusion", &request).unwrap();
            let average = Average::of(&spec).unwrap();
            let seen = 20_000;
            let positions = [0, 10, 10_000, 19_000, 19_900, 19_990];
            let decay = spec.mass_decay();
            let mass = positions.map(|position| {
                (0..seen - position - spec.look_gap() as i32).map(|age| 0.25 * decay.powi(age)).sum::<f64>() as f32
            });
            let mut looks = [0.0; 6];
            judge(Some(&average), seen, Fill { positions: &positions, mass: &mass, looks: &mut looks });
            for look in looks {
                assert!((look - 0.25).abs() < 1e-4, "rate {rate}: {look}");
            }
        }
    }

    #[test]
    fn an_old_look_counts_half_after_each_half_life() {
        for rate in [0.0, 0.3] {
            let request = Request {
                sink_update_rate: Some(rate),
                budget: Some(64),
                age_half_life: Some(100),
                ..Request::default()
            };
            let spec = Spec::new("liquid_fusion", &request).unwrap();
            let average = Average::of(&spec).unwrap();
            let seen = 200_000;
            let ages = [50, 100, 250, 2400, 150_000];
            let positions = ages.map(|age| seen - spec.look_gap() as i32 - age);
            let decay = spec.mass_decay();
            let mass = ages.map(|age| (0..age).map(|age| decay.powi(age)).sum::<f64>() as f32);
            let mut looks = [0.0; 5];
            judge(Some(&average), seen, Fill { positions: &positions, mass: &mass, looks: &mut looks });
            let expected = [0.5, 1.0, 2.5, 24.0, 24.0].map(|halvings: f32| (-halvings).exp2());
            for (look, expected) in looks.iter().zip(expected) {
                assert!((look / expected - 1.0).abs() < 1e-4, "rate {rate}: {looks:?}");
            }
        }
    }
}
