//! One decision for one (layer, row, head): which of the candidates stay.

use std::ops::Range;

use crate::average::{Average, Judge, PerQuery, PerWeight, Plain};
use crate::budget::Split;
use crate::select::{Cut, FINITE, Field, Hint, OUTSIDE, cut, valid};
use crate::simd::{self, Lanes, Work};
use crate::sinks::Sinks;

/// How the candidates are judged.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rule<'a> {
    pub(crate) split: Split,
    pub(crate) sinks: Sinks,
    /// How mass becomes average looks, where it does.
    pub(crate) average: Option<&'a Average>,
}

/// Scores of the candidates, stored tokens first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scores<'a> {
    pub(crate) mass: &'a [f32],
    pub(crate) peak: &'a [f32],
}

/// A score that may not be used, by which score and index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadScore {
    pub(crate) peak: bool,
    pub(crate) index: usize,
}

/// Who may stay.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidates<'a> {
    /// Positions in the slots, -1 where there is none.
    pub(crate) stored: &'a [i32],
    /// Slots that are queued already, whose tokens are no candidates: a ring's two parts.
    pub(crate) queued: [&'a [i32]; 2],
    /// Positions of a chunk's columns, -1 for padding.
    pub(crate) columns: &'a [i32],
    /// One more than the newest position.
    pub(crate) seen: i32,
    pub(crate) scores: Option<Scores<'a>>,
}

impl Candidates<'_> {
    fn len(&self) -> usize {
        self.stored.len() + self.columns.len()
    }

    #[inline(always)]
    fn queued(&self) -> impl Iterator<Item = usize> {
        self.queued.into_iter().flatten().map(|&slot| slot as usize)
    }

    #[inline(always)]
    fn position(&self, i: usize) -> i32 {
        if i < self.stored.len() { self.stored[i] } else { self.columns[i - self.stored.len()] }
    }

    /// Positions of all, -1 for queued slots too.
    fn positions(&self) -> Vec<i32> {
        let mut positions = [self.stored, self.columns].concat();
        self.queued().for_each(|slot| positions[slot] = -1);
        positions
    }

    /// The first score of a candidate that is NaN, infinite or negative.
    pub(crate) fn find_bad(&self) -> Option<BadScore> {
        let Scores { mass, peak } = self.scores?;
        let positions = self.positions();
        let bad = |values: &[f32]| positions.iter().zip(values).position(|(&p, &v)| p >= 0 && !valid(v));
        bad(mass)
            .map(|index| BadScore { peak: false, index })
            .or_else(|| bad(peak).map(|index| BadScore { peak: true, index }))
    }
}

/// Reusable memory of one thread.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Slots whose tokens do not stay, ascending.
    pub(crate) victims: Vec<i32>,
    /// Columns that stay, ascending.
    pub(crate) kept: Vec<i32>,
    by_position: Vec<u64>,
    /// Keys of the candidates still in contest, `OUTSIDE` for others.
    mass: Vec<i32>,
    peak: Vec<i32>,
    order: Vec<i32>,
    /// Where the searches for sinks, peak and mass ended last.
    hints: [Hint; 3],
}

/// What one look at the candidates finds out.
#[derive(Debug, Clone, Copy)]
struct Found {
    sinks: usize,
    recent: usize,
    contest: Field,
}

struct Decision<'a> {
    scratch: &'a mut Scratch,
    candidates: Candidates<'a>,
    rule: Rule<'a>,
}

/// Candidates looked at together: they stay in the first-level cache.
const BLOCK: usize = 512;

/// What a look at the candidates finds out.
struct Tally {
    contest: Range<i32>,
    stored: usize,
    /// Before the contest.
    older: usize,
    /// Behind the contest.
    recent: usize,
    /// The largest bits of all scores.
    worst: u32,
}

impl Tally {
    #[inline(always)]
    fn count(&mut self, positions: &[i32]) {
        let (mut stored, mut old, mut recent) = (0, 0, 0);
        for &position in positions {
            stored += u32::from(position >= 0);
            old += u32::from(position < self.contest.start);
            recent += u32::from(position >= self.contest.end);
        }
        self.stored += stored as usize;
        self.older += old as usize + stored as usize - positions.len();
        self.recent += recent as usize;
    }

    /// Turn scores into keys, those of positions outside the contest into `OUTSIDE`.
    #[inline(always)]
    fn scores(&mut self, positions: &[i32], scores: Scores<'_>, keys: (&mut [i32], &mut [i32]), judge: impl Judge) {
        let contest = self.contest.clone();
        let mut worst = 0;
        let keys = keys.0.chunks_mut(BLOCK).zip(keys.1.chunks_mut(BLOCK));
        let scores = scores.mass.chunks(BLOCK).zip(scores.peak.chunks(BLOCK));
        for (positions, (keys, scores)) in positions.chunks(BLOCK).zip(keys.zip(scores)) {
            self.count(positions);
            judge.prepare(positions, keys.0);
            let keys = keys.0.iter_mut().zip(&mut *keys.1);
            let scores = scores.0.iter().zip(scores.1);
            for (((mass_key, peak_key), (&mass, &peak)), &position) in keys.zip(scores).zip(positions) {
                worst = worst.max(mass.to_bits()).max(peak.to_bits());
                let outside = outside(position, &contest);
                *mass_key = judge.judged(mass, *mass_key).to_bits() as i32 | outside;
                *peak_key = peak.to_bits() as i32 | outside;
            }
        }
        self.worst = self.worst.max(worst);
    }

    /// As `scores`, where every token is worth the same.
    #[inline(always)]
    fn positions(&mut self, positions: &[i32], keys: &mut [i32]) {
        let contest = self.contest.clone();
        self.count(positions);
        for (key, &position) in keys.iter_mut().zip(positions) {
            *key = outside(position, &contest);
        }
    }
}

/// `OUTSIDE` for positions outside the contest, 0 for others.
#[inline(always)]
fn outside(position: i32, contest: &Range<i32>) -> i32 {
    let outside = i32::from(position < contest.start) | i32::from(position >= contest.end);
    // Plain integer arithmetic is what the compiler vectorises best.
    ((-outside) as u32 >> 1) as i32
}

impl Scratch {
    /// Fill `victims` and `kept` by what the split keeps.
    pub(crate) fn decide(&mut self, candidates: Candidates<'_>, rule: Rule<'_>) -> Result<(), BadScore> {
        simd::dispatch(Decision { scratch: self, candidates, rule })
    }

    /// The victims in the order of their positions.
    pub(crate) fn oldest_first(&mut self, positions: &[i32]) -> impl ExactSizeIterator<Item = i32> {
        let entry = |&slot: &i32| u64::from(positions[slot as usize] as u32) << 32 | u64::from(slot as u32);
        self.by_position.clear();
        self.by_position.extend(self.victims.iter().map(entry));
        self.by_position.sort_unstable();
        self.by_position.iter().map(|&entry| entry as i32)
    }

    /// Check the scores, turn those outside sinks and recent window into keys, and count what there is.
    #[inline(always)]
    fn load(
        &mut self,
        newest: i32,
        pinned: i32,
        candidates: &Candidates<'_>,
        average: Option<&Average>,
    ) -> Result<Found, BadScore> {
        let n = candidates.len();
        self.mass.resize(n, 0);
        self.peak.resize(n, 0);
        let contest = pinned..newest.max(pinned);
        let mut tally = Tally { contest: contest.clone(), stored: 0, older: 0, recent: 0, worst: 0 };
        let at = candidates.stored.len();
        let (mass, peak) = (self.mass.split_at_mut(at), self.peak.split_at_mut(at));
        for (positions, mass_keys, peak_keys, part) in
            [(candidates.stored, mass.0, peak.0, 0..at), (candidates.columns, mass.1, peak.1, at..n)]
        {
            let Some(Scores { mass, peak }) = candidates.scores else {
                tally.positions(positions, mass_keys);
                continue;
            };
            let (scores, keys) = (Scores { mass: &mass[part.clone()], peak: &peak[part] }, (mass_keys, peak_keys));
            match average.map(|average| (average.newest(candidates.seen), average.table())) {
                None => tally.scores(positions, scores, keys, Plain),
                Some((newest, None)) => tally.scores(positions, scores, keys, PerQuery { newest }),
                Some((newest, Some(table))) => tally.scores(positions, scores, keys, PerWeight { newest, table }),
            }
        }
        let Tally { stored, older: mut sinks, mut recent, worst, .. } = tally;
        if worst > FINITE {
            if let Some(bad) = candidates.find_bad() {
                return Err(bad);
            }
            // It was a -0.0, which equals 0.0, or belongs to no candidate.
            for key in self.mass.iter_mut().chain(&mut self.peak) {
                *key &= i32::MAX;
            }
        }
        let mut contenders = stored - sinks - recent;
        for slot in candidates.queued() {
            let position = candidates.stored[slot];
            if position >= contest.end {
                recent -= 1;
            } else if position >= contest.start {
                contenders -= 1;
                (self.mass[slot], self.peak[slot]) = (OUTSIDE, OUTSIDE);
            } else if position >= 0 {
                sinks -= 1;
            }
        }
        Ok(Found { sinks, recent, contest: Field { count: contenders, most: worst.min(FINITE) as i32 } })
    }

    /// The position from which exactly `window` candidates that are no pinned sinks are found.
    fn newest(&mut self, window: usize, pinned: i32, candidates: &Candidates<'_>) -> i32 {
        self.order.clear();
        self.order.extend(candidates.positions().into_iter().filter(|&p| p >= pinned));
        match self.order.len().checked_sub(window) {
            Some(from) if from < self.order.len() => *self.order.select_nth_unstable(from).1,
            Some(_) => i32::MAX,
            None => 0,
        }
    }
}

/// Take the tokens that `cut` takes by `keys` out of the contest for `others`.
#[inline(always)]
fn protect(cut: Cut, keys: &[i32], others: &mut [i32], candidates: &Candidates<'_>) {
    // `OUTSIDE` where `a < b`, else 0, neither being negative. Selecting with a comparison would be compiled to masked stores, which
    // some machines execute in dozens of cycles.
    let less = |a: i32, b: i32| (((a - b) >> 31) as u32 >> 1) as i32;
    if cut.position == 0 {
        for (&key, other) in keys.iter().zip(others) {
            *other |= less(cut.key - 1, key);
        }
    } else {
        let (stored, columns) = others.split_at_mut(candidates.stored.len());
        let (stored_keys, column_keys) = keys.split_at(stored.len());
        for (keys, others, positions) in
            [(stored_keys, stored, candidates.stored), (column_keys, columns, candidates.columns)]
        {
            for ((&key, other), &position) in keys.iter().zip(others).zip(positions) {
                *other |= less(cut.key, key) | (less(cut.key - 1, key) & less(cut.position - 1, position.max(0)));
            }
        }
    }
}

impl Work for Decision<'_> {
    type Output = Result<(), BadScore>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Result<(), BadScore> {
        let Self { scratch, candidates, rule } = self;
        let split = rule.split;
        let seen = candidates.seen;
        let pinned = if rule.sinks == Sinks::Pinned { split.sinks as i32 } else { 0 };
        // As a rule every sink and every token of the recent window is stored, which one look proves; else look closely.
        let mut window = split.recent + (pinned - seen).max(0) as usize;
        let mut found = scratch.load(seen.saturating_sub(window as i32), pinned, &candidates, rule.average)?;
        let missing = pinned as usize - found.sinks;
        if split.recent + missing != window || found.recent != window {
            window = split.recent + missing;
            let newest = scratch.newest(window, pinned, &candidates);
            found = scratch.load(newest, pinned, &candidates, rule.average)?;
        }

        let Scratch { victims, kept, mass, peak, order, hints: [by_sinks, by_peak, by_mass], .. } = scratch;
        let position = |i: usize| candidates.position(i);
        let mut contest = found.contest;
        if rule.sinks == Sinks::Adaptive && split.sinks > 0 {
            let cut = cut(mass, split.sinks, contest, by_sinks, position, order);
            order.clear();
            order.extend_from_slice(mass);
            protect(cut, order, mass, &candidates);
            protect(cut, order, peak, &candidates);
            contest.count = contest.count.saturating_sub(split.sinks);
        }
        if split.peak > 0 {
            let cut = cut(peak, split.peak, contest, by_peak, position, order);
            protect(cut, peak, mass, &candidates);
            contest.count = contest.count.saturating_sub(split.peak);
        }
        let cut = cut(mass, split.mass, contest, by_mass, position, order);
        if cut.position > 0 {
            // The newer of equal tokens stay.
            let (stored, columns) = mass.split_at_mut(candidates.stored.len());
            for (keys, positions) in [(stored, candidates.stored), (columns, candidates.columns)] {
                for (key, &position) in keys.iter_mut().zip(positions) {
                    *key += i32::from(*key == cut.key) & i32::from(position >= cut.position);
                }
            }
        }
        // Victims are below this key, all others at it or above.
        let stay = cut.key + i32::from(cut.position > 0);
        let (stored, columns) = mass.split_at_mut(candidates.stored.len());
        victims.resize(stored.len(), 0);
        let count = lanes.indices::<false>(stored, stay, victims);
        victims.truncate(count);
        // Padding is no victim, but does not stay.
        for (key, &position) in columns.iter_mut().zip(candidates.columns) {
            *key |= position >> 31;
        }
        kept.resize(stored.len().min(columns.len()), 0);
        let count = lanes.indices::<true>(columns, stay - 1, kept);
        kept.truncate(count);
        Ok(())
    }
}
