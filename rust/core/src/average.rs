//! A token's average look: its attention mass divided by what the queries that could look at it weigh.
//!
//! A young token was seen by fewer queries than an old one, so its plain sum is smaller however hard each of them looked.

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
    match &average.table {
        Some(table) => work.run(PerWeight { newest, table }),
        None => work.run(PerQuery { newest }),
    }
}

/// The mass itself.
#[derive(Clone, Copy)]
struct Plain;

/// The mass per query that could look, where none fades.
#[derive(Clone, Copy)]
struct PerQuery {
    newest: i32,
}

/// The mass per weight of the queries that could look, whose inverse is in a table.
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

impl Judge for PerQuery {
    #[inline(always)]
    fn prepare(self, positions: &[i32], words: &mut [i32]) {
        for (word, &position) in words.iter_mut().zip(positions) {
            *word = queries(self.newest, position).max(1);
        }
    }

    #[inline(always)]
    fn judged(self, mass: f32, queries: i32) -> f32 {
        mass / queries as f32
    }
}

impl Judge for PerWeight<'_> {
    #[inline(always)]
    fn prepare(self, positions: &[i32], words: &mut [i32]) {
        let last = self.table.len() as i32 - 1;
        let mut fewest = last;
        for (word, &position) in words.iter_mut().zip(positions) {
            *word = queries(self.newest, position).min(last);
            fewest = fewest.min(*word);
        }
        // In a long context most tokens are older than the table reaches.
        if fewest == last {
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
            let request = Request { sink_update_rate: Some(rate), budget: Some(64), ..Request::default() };
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
}
