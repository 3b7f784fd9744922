//! One decision for one (layer, row, head): which of the candidates stay.

use std::ops::Range;

use crate::average::{self, Average, Judge, WithJudge};
use crate::budget::Split;
use crate::select::{Cut, FINITE, Field, Hint, Memory, OUTSIDE, at_least, cut, valid};
use crate::simd::{self, Lanes, Work};
use crate::sinks::Sinks;
use crate::worth::{self, Lane, Worth};

/// How the candidates are judged.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rule<'a> {
    pub(crate) split: Split,
    pub(crate) sinks: Sinks,
    /// How mass becomes average looks, where it does.
    pub(crate) average: Option<&'a Average>,
    /// What stands in for the mass, where something does.
    pub(crate) worth: Worth,
    /// Where the decision is taken: what a random one depends on.
    pub(crate) lane: Lane,
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
    pub(crate) fn positions(&self) -> Vec<i32> {
        let mut positions = [self.stored, self.columns].concat();
        self.queued().for_each(|slot| positions[slot] = -1);
        positions
    }

    /// The first score of a candidate that is NaN, infinite or negative.
    pub(crate) fn find_bad(&self) -> Option<BadScore> {
        let Scores { mass, peak } = self.scores?;
        let positions = self.positions();
        let wrong = |(&p, &v): (&i32, &f32)| (p >= 0) & !valid(v);
        let bad = |values: &[f32]| {
            let candidates = positions.iter().zip(values);
            // As a rule there is none, which is seen without a branch for each.
            let any = candidates.clone().fold(false, |any, candidate| any | wrong(candidate));
            any.then(|| candidates.clone().position(wrong))?
        };
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
    ordered: Vec<i32>,
    by_position: Vec<u64>,
    /// Keys of the peaks of candidates still in contest, `OUTSIDE` for others.
    keys: Vec<i32>,
    /// Keys of what the masses are worth.
    mass: Vec<i32>,
    /// Slots left for the mass, their positions and their masses.
    left: Vec<i32>,
    positions: Vec<i32>,
    masses: Vec<i32>,
    chosen: Vec<i32>,
    marks: Vec<u64>,
    memory: Memory,
    /// Positions, where none of the recent tokens is in its place.
    looked_at: Vec<i32>,
    /// Where the searches for sinks, peak and mass ended last.
    hints: [Hint; 3],
    /// What stands in for the masses.
    worth: Vec<f32>,
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
const BLOCK: usize = 256;

/// What is counted while looking.
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
    /// Fill `keys` with those of the peaks, or zeros where `by_peak` is false, and with `OUTSIDE` for positions outside the contest.
    #[inline(always)]
    fn scores(&mut self, positions: &[i32], scores: Scores<'_>, by_peak: bool, keys: &mut [i32]) {
        let chosen = if by_peak { OUTSIDE } else { 0 };
        let (mut counts, mut worst) = (Counts::default(), 0);
        for ((key, (&mass, &peak)), &position) in
            keys.iter_mut().zip(scores.mass.iter().zip(scores.peak)).zip(positions)
        {
            worst = worst.max(mass.to_bits()).max(peak.to_bits());
            *key = (peak.to_bits() as i32 & chosen) | counts.outside(position, &self.contest);
        }
        self.add(counts, positions.len());
        self.worst = self.worst.max(worst);
    }

    /// As `scores`, where every token is worth the same.
    #[inline(always)]
    fn positions(&mut self, positions: &[i32], keys: &mut [i32]) {
        let mut counts = Counts::default();
        for (key, &position) in keys.iter_mut().zip(positions) {
            *key = counts.outside(position, &self.contest);
        }
        self.add(counts, positions.len());
    }

    fn add(&mut self, Counts { empty, older, recent }: Counts, looked: usize) {
        self.stored += looked - empty as usize;
        self.older += (older - empty) as usize;
        self.recent += recent as usize;
    }
}

/// Counts of positions, in 32 bits for the sake of the vectors.
#[derive(Default)]
struct Counts {
    empty: u32,
    /// Before the contest, empty ones included.
    older: u32,
    recent: u32,
}

impl Counts {
    /// `OUTSIDE` for a position outside the contest, 0 for others.
    #[inline(always)]
    fn outside(&mut self, position: i32, contest: &Range<i32>) -> i32 {
        let (older, recent) = (position < contest.start, position >= contest.end);
        self.empty += u32::from(position < 0);
        self.older += u32::from(older);
        self.recent += u32::from(recent);
        // Plain integer arithmetic is what the compiler vectorises best.
        (-(i32::from(older) | i32::from(recent)) as u32 >> 1) as i32
    }
}

impl Scratch {
    /// Fill `victims` and `kept` by what the split keeps.
    pub(crate) fn decide(&mut self, candidates: Candidates<'_>, rule: Rule<'_>) -> Result<(), BadScore> {
        let mut worth = std::mem::take(&mut self.worth);
        let scores = match (rule.worth, candidates.scores) {
            (Worth::Pooled(reach), Some(scores)) => {
                // A score that may not be used would spread, or vanish.
                if let Some(bad) = candidates.find_bad() {
                    return Err(bad);
                }
                worth::pool(&candidates, scores.mass, reach, rule.split.recent, &mut worth);
                Some(Scores { mass: &worth, ..scores })
            }
            (Worth::Random, _) => {
                worth::draw(&candidates, rule.lane, &mut worth);
                Some(Scores { mass: &worth, peak: &worth })
            }
            (_, scores) => scores,
        };
        let decided = simd::dispatch(Decision { scratch: self, candidates: Candidates { scores, ..candidates }, rule });
        self.worth = worth;
        decided
    }

    /// The victims in the order of their positions.
    pub(crate) fn oldest_first(&mut self, positions: &[i32]) -> &[i32] {
        let Self { victims, ordered, by_position, .. } = self;
        at_least(ordered, victims.len());
        let ordered = &mut ordered[..victims.len()];
        if !simd::dispatch(Order { victims, positions, ordered }) {
            let entry = |&slot: &i32| u64::from(positions[slot as usize] as u32) << 32 | u64::from(slot as u32);
            by_position.clear();
            by_position.extend(victims.iter().map(entry));
            by_position.sort_unstable();
            for (slot, &entry) in ordered.iter_mut().zip(&*by_position) {
                *slot = entry as i32;
            }
        }
        ordered
    }

    /// Check the scores, find who contends, and count what there is.
    #[inline(always)]
    fn look(
        &mut self,
        newest: i32,
        pinned: i32,
        candidates: &Candidates<'_>,
        by_peak: bool,
    ) -> Result<Found, BadScore> {
        self.keys.resize(candidates.len(), 0);
        let contest = pinned..newest.max(pinned);
        let mut tally = Tally { contest: contest.clone(), stored: 0, older: 0, recent: 0, worst: 0 };
        let (stored_keys, column_keys) = self.keys.split_at_mut(candidates.stored.len());
        let parts = [(candidates.stored, stored_keys, 0), (candidates.columns, column_keys, candidates.stored.len())];
        for (positions, keys, from) in parts {
            if let Some(Scores { mass, peak }) = candidates.scores {
                let scores = Scores { mass: &mass[from..], peak: &peak[from..] };
                tally.scores(positions, scores, by_peak, keys);
            } else {
                tally.positions(positions, keys);
            }
        }
        // It may have been a -0.0, which equals 0.0, or that of no candidate.
        if tally.worst > FINITE
            && let Some(bad) = candidates.find_bad()
        {
            return Err(bad);
        }
        let Tally { stored, older: sinks, recent, worst, .. } = tally;
        let (mut queued, mut len) = (Counts::default(), 0);
        for part in candidates.queued {
            len += part.len();
            for &slot in part {
                queued.outside(candidates.stored[slot as usize], &contest);
                self.keys[slot as usize] = OUTSIDE;
            }
        }
        let (sinks, recent) = (sinks - (queued.older - queued.empty) as usize, recent - queued.recent as usize);
        let contenders = stored - (len - queued.empty as usize) - sinks - recent;
        Ok(Found { sinks, recent, contest: Field { count: contenders, most: worst.min(FINITE) as i32 } })
    }

    /// The position from which exactly `window` candidates that are no pinned sinks are found.
    fn newest(&mut self, window: usize, pinned: i32, candidates: &Candidates<'_>) -> i32 {
        self.looked_at.clear();
        self.looked_at.extend(candidates.positions().into_iter().filter(|&p| p >= pinned));
        match self.looked_at.len().checked_sub(window) {
            Some(from) if from < self.looked_at.len() => *self.looked_at.select_nth_unstable(from).1,
            Some(_) => i32::MAX,
            None => 0,
        }
    }
}

/// As many victims are compared with each other rather than sorted.
const ORDERED: usize = 64;

/// Put a few victims in the order of their positions; `false` if they are too many, or two have one position.
struct Order<'a> {
    victims: &'a [i32],
    positions: &'a [i32],
    ordered: &'a mut [i32],
}

impl Work for Order<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> bool {
        let Self { victims, positions, ordered } = self;
        let n = victims.len();
        if n > ORDERED {
            return false;
        }
        let (mut ages, mut older) = ([0; ORDERED], [0; ORDERED]);
        for (age, &slot) in ages.iter_mut().zip(victims) {
            *age = positions[slot as usize];
        }
        for (older, some) in older.as_chunks_mut().0.iter_mut().zip(ages.as_chunks().0) {
            *older = lanes.below(some, &ages[..n]);
        }
        // One of every two is older, unless they are equally old.
        if older[..n].iter().sum::<u32>() as usize != n * n.saturating_sub(1) / 2 {
            return false;
        }
        for (&slot, &older) in victims.iter().zip(&older) {
            ordered[older as usize] = slot;
        }
        true
    }
}

/// All ones where `a < b`, else 0, neither being below -1. Selecting with a comparison would be compiled to masked stores, which some
/// machines execute in dozens of cycles.
#[inline(always)]
fn less(a: i32, b: i32) -> i32 {
    (a - b) >> 31
}

/// Where `keys` must reach to be taken by `cut`. Those equal to its key are moved to either side first, by their positions, which
/// come in two parts.
#[inline(always)]
fn settle(cut: Cut, keys: &mut [i32], positions: [&[i32]; 2]) -> i32 {
    if cut.position == 0 {
        return cut.key;
    }
    let (first, second) = keys.split_at_mut(positions[0].len());
    for (keys, positions) in [(first, positions[0]), (second, positions[1])] {
        for (key, &position) in keys.iter_mut().zip(positions) {
            *key += i32::from(*key == cut.key) & i32::from(position >= cut.position);
        }
    }
    cut.key + 1
}

/// Turn the masses of all whose key is below `taken` into keys in `out`, and others into `OUTSIDE`.
struct All<'a> {
    candidates: &'a Candidates<'a>,
    mass: &'a [f32],
    keys: &'a [i32],
    taken: i32,
    out: &'a mut [i32],
}

impl WithJudge for All<'_> {
    #[inline(always)]
    fn run(self, judge: impl Judge) {
        let Self { candidates, mass, keys, taken, out } = self;
        let at = candidates.stored.len();
        let (stored, columns) = out.split_at_mut(at);
        for (positions, out, from) in [(candidates.stored, stored, 0), (candidates.columns, columns, at)] {
            let given = mass[from..].chunks(BLOCK).zip(keys[from..].chunks(BLOCK));
            for ((positions, out), (mass, keys)) in positions.chunks(BLOCK).zip(out.chunks_mut(BLOCK)).zip(given) {
                judge.prepare(positions, out);
                for ((word, &mass), &key) in out.iter_mut().zip(mass).zip(keys) {
                    *word = ((judge.judged(mass, *word).to_bits() as i32) | less(taken - 1, key)) & OUTSIDE;
                }
            }
        }
    }
}

/// Turn masses (bits), side by side, into keys in `out`.
struct Few<'a> {
    positions: &'a [i32],
    mass: &'a [i32],
    out: &'a mut [i32],
}

impl WithJudge for Few<'_> {
    #[inline(always)]
    fn run(self, judge: impl Judge) {
        judge.prepare(self.positions, self.out);
        for (word, &mass) in self.out.iter_mut().zip(self.mass) {
            *word = judge.judged(f32::from_bits(mass as u32), *word).to_bits() as i32 & OUTSIDE;
        }
    }
}

impl Work for Decision<'_> {
    type Output = Result<(), BadScore>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Result<(), BadScore> {
        let Self { scratch, candidates, rule } = self;
        let (split, seen) = (rule.split, candidates.seen);
        let by_peak = split.peak > 0;
        let pinned = if rule.sinks == Sinks::Pinned { split.sinks as i32 } else { 0 };
        // As a rule every sink and every token of the recent window is stored, which one look proves; else look closely.
        let mut window = split.recent + (pinned - seen).max(0) as usize;
        let mut found = scratch.look(seen.saturating_sub(window as i32), pinned, &candidates, by_peak)?;
        let missing = pinned as usize - found.sinks;
        if split.recent + missing != window || found.recent != window {
            window = split.recent + missing;
            let newest = scratch.newest(window, pinned, &candidates);
            found = scratch.look(newest, pinned, &candidates, by_peak)?;
        }

        let Scratch { victims, kept, keys, mass, left, positions, masses, chosen, marks, memory, hints, .. } = scratch;
        let [by_sinks, by_peaks, by_mass] = hints;
        let position = |i: usize| candidates.position(i);
        let all = [candidates.stored, candidates.columns];
        let mut contest = found.contest;
        let n = candidates.len();
        let mut cut_all = |keys: &[i32], k, field, hint: &mut Hint| cut(lanes, keys, k, field, hint, position, memory);
        let all_mass = candidates.scores.map_or(&[][..], |scores| scores.mass);
        if rule.sinks == Sinks::Adaptive && split.sinks > 0 {
            mass.resize(n, 0);
            average::judge(
                rule.average,
                seen,
                All { candidates: &candidates, mass: all_mass, keys, taken: OUTSIDE, out: mass },
            );
            let taken = settle(cut_all(mass, split.sinks, contest, by_sinks), mass, all);
            for (key, &mass) in keys.iter_mut().zip(&*mass) {
                *key |= less(taken - 1, mass) & OUTSIDE;
            }
            contest.count = contest.count.saturating_sub(split.sinks);
        }
        at_least(marks, n.div_ceil(64));
        let mut taken = OUTSIDE;
        if by_peak {
            taken = settle(cut_all(keys, split.peak, contest, by_peaks), keys, all);
            contest.count = contest.count.saturating_sub(split.peak);
        }
        if split.mass > 0 && candidates.columns.is_empty() && contest.count <= n / 2 {
            // Few are left: look at those only.
            for buffer in [&mut *left, positions, masses] {
                at_least(buffer, n);
            }
            let values = [candidates.stored, bytemuck::cast_slice(all_mass)];
            let count = lanes.pack(keys, taken, values, [left, positions, masses]);
            let (left, positions) = (&left[..count], &positions[..count]);
            at_least(mass, count);
            let mass = &mut mass[..count];
            average::judge(rule.average, seen, Few { positions, mass: &masses[..count], out: mass });
            let cut = cut(lanes, mass, split.mass, contest, by_mass, |i| positions[i], memory);
            let taken = settle(cut, mass, [positions, &[]]);
            at_least(chosen, count);
            let marks = &mut marks[..count.div_ceil(64)];
            lanes.mark::<false>(mass, taken, marks);
            let count = lanes.expand(marks, chosen);
            kept.clear();
            victims.clear();
            victims.extend(chosen[..count].iter().map(|&i| left[i as usize]));
            return Ok(());
        }
        let mut last = keys;
        if split.mass > 0 {
            mass.resize(n, 0);
            average::judge(
                rule.average,
                seen,
                All { candidates: &candidates, mass: all_mass, keys: last, taken, out: mass },
            );
            taken = settle(cut_all(mass, split.mass, contest, by_mass), mass, all);
            last = mass;
        }
        let (stored, columns) = last.split_at_mut(candidates.stored.len());
        at_least(chosen, stored.len());
        let words = stored.len().div_ceil(64);
        lanes.mark::<false>(stored, taken, &mut marks[..words]);
        let count = lanes.expand(&marks[..words], &mut chosen[..stored.len()]);
        victims.clear();
        victims.extend_from_slice(&chosen[..count]);
        // Padding is no victim, but does not stay.
        for (key, &position) in columns.iter_mut().zip(candidates.columns) {
            *key |= position >> 31;
        }
        let words = columns.len().div_ceil(64);
        lanes.mark::<true>(columns, taken - 1, &mut marks[..words]);
        let count = lanes.expand(&marks[..words], &mut chosen[..stored.len()]);
        kept.clear();
        kept.extend_from_slice(&chosen[..count]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::everywhere;

    #[test]
    fn victims_come_in_the_order_of_their_positions() {
        for n in [0, 1, 5, 63, 64, 65, 200] {
            // The last two in one place, which no sound ledger has.
            for equal in [false, true] {
                let victims: Vec<i32> = (0..n).map(|i| 2 * i + 1).collect();
                let mut positions: Vec<i32> = (0..2 * n + 2).map(|i| i * 7919 % 1_000_003).collect();
                if equal && n > 1 {
                    positions[2 * n as usize - 1] = positions[2 * n as usize - 3];
                }
                let mut naive = victims.clone();
                naive.sort_by_key(|&slot| (positions[slot as usize], slot));
                everywhere(|| {
                    let mut scratch = Scratch { victims: victims.clone(), ..Scratch::default() };
                    assert_eq!(scratch.oldest_first(&positions), naive);
                });
            }
        }
    }
}
