//! One decision for one (layer, row, head): which of the candidates stay.

use std::ops::Range;

use crate::budget::Split;
use crate::select::{Cut, FINITE, Field, Hint, bits, cut, valid};
use crate::simd::{self, Lanes, Work};
use crate::sinks::Sinks;

/// How the candidates are judged.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rule {
    pub(crate) split: Split,
    pub(crate) sinks: Sinks,
}

/// Scores of the candidates.
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

/// Reusable memory of one thread.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Positions of the candidates, -1 for what is none. Filled by the caller.
    pub(crate) positions: Vec<i32>,
    /// Indices of the candidates that do not stay, ascending.
    pub(crate) victims: Vec<i32>,
    /// Keys (bits + 1) of the candidates still in contest, 0 for others.
    mass: Vec<i32>,
    peak: Vec<i32>,
    order: Vec<i32>,
    /// Where the searches for sinks, peak and mass ended last.
    hints: [Hint; 3],
}

/// The first score of a candidate that is NaN, infinite or negative.
pub(crate) fn find_bad(positions: &[i32], scores: Scores<'_>) -> Option<BadScore> {
    let bad = |values: &[f32]| positions.iter().zip(values).position(|(&p, &v)| p >= 0 && !valid(v));
    bad(scores.mass)
        .map(|index| BadScore { peak: false, index })
        .or_else(|| bad(scores.peak).map(|index| BadScore { peak: true, index }))
}

/// What one look at the candidates finds out.
#[derive(Debug, Clone, Copy)]
struct Found {
    sinks: usize,
    recent: usize,
    mass: Field,
    peak: Field,
}

struct Decision<'a> {
    scratch: &'a mut Scratch,
    seen: i32,
    rule: Rule,
    scores: Option<Scores<'a>>,
}

impl Scratch {
    /// Fill `victims` with the candidates outside the split; `seen` is one more than the newest position.
    pub(crate) fn decide(&mut self, seen: i32, rule: Rule, scores: Option<Scores<'_>>) -> Result<(), BadScore> {
        simd::dispatch(Decision { scratch: self, seen, rule, scores })
    }

    /// Check the scores, turn those outside sinks and recent window into keys, and count what there is.
    #[inline(always)]
    fn load(&mut self, newest: i32, pinned: i32, scores: Option<Scores<'_>>) -> Result<Found, BadScore> {
        let n = self.positions.len();
        self.mass.resize(n, 0);
        self.peak.resize(n, 0);
        let contest = pinned..newest.max(pinned);
        let mut sinks = 0u32;
        let mut recent = 0u32;
        let mut contenders = 0u32;
        for &position in &self.positions {
            sinks += u32::from(position >= 0) & u32::from(position < contest.start);
            recent += u32::from(position >= contest.end);
            contenders += u32::from(position >= contest.start) & u32::from(position < contest.end);
        }
        let count = contenders as usize;
        let (mass, peak) = if let Some(scores) = scores {
            let (mass, worst_mass) = keys_of(&self.positions, contest.clone(), scores.mass, &mut self.mass, count);
            let (peak, worst_peak) = keys_of(&self.positions, contest, scores.peak, &mut self.peak, count);
            if worst_mass.max(worst_peak) > FINITE
                && let Some(bad) = find_bad(&self.positions, scores)
            {
                return Err(bad);
            }
            (mass, peak)
        } else {
            for (key, &position) in self.mass.iter_mut().zip(&self.positions) {
                *key = i32::from(position >= contest.start) & i32::from(position < contest.end);
            }
            (Field { count, least: 1, most: 1 }, Field::default())
        };
        Ok(Found { sinks: sinks as usize, recent: recent as usize, mass, peak })
    }

    /// The position from which exactly `window` candidates that are no pinned sinks are found.
    fn newest(&mut self, window: usize, pinned: i32) -> i32 {
        self.order.clear();
        self.order.extend(self.positions.iter().copied().filter(|&p| p >= pinned));
        match self.order.len().checked_sub(window) {
            Some(from) if from < self.order.len() => *self.order.select_nth_unstable(from).1,
            Some(_) => i32::MAX,
            None => 0,
        }
    }
}

/// Turn the scores of positions in `contest` into keys, others into 0. Also returns the largest bits of all scores.
#[inline(always)]
fn keys_of(positions: &[i32], contest: Range<i32>, scores: &[f32], keys: &mut [i32], count: usize) -> (Field, u32) {
    let (mut least, mut most, mut worst) = (i32::MAX, 0, 0);
    for ((key, &score), &position) in keys.iter_mut().zip(scores).zip(positions) {
        worst = worst.max(score.to_bits());
        let contends = i32::from(position >= contest.start) & i32::from(position < contest.end);
        // All ones, or zero: plain integer arithmetic is what the compiler vectorises best.
        let mask = -contends;
        *key = (bits(score) + 1) & mask;
        least = least.min(*key | (!mask & i32::MAX));
        most = most.max(*key);
    }
    (Field { count, least, most }, worst)
}

/// Set the keys that `cut` takes to 0, and those of the same tokens in `others`.
#[inline(always)]
fn protect(cut: Cut, keys: &mut [i32], others: &mut [i32], positions: &[i32]) {
    // All ones where `a < b`, neither being negative. Selecting with a comparison would be compiled to masked stores, which some
    // machines execute in dozens of cycles.
    let less = |a: i32, b: i32| (a - b) >> 31;
    if cut.position == 0 {
        for (key, other) in keys.iter_mut().zip(others) {
            let stays = less(*key, cut.key);
            *key &= stays;
            *other &= stays;
        }
    } else {
        for ((key, other), &position) in keys.iter_mut().zip(others).zip(positions) {
            let tied_and_older = !less(cut.key, *key) & less(position.max(0), cut.position);
            let stays = less(*key, cut.key) | tied_and_older;
            *key &= stays;
            *other &= stays;
        }
    }
}

impl Work for Decision<'_> {
    type Output = Result<(), BadScore>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Result<(), BadScore> {
        let Self { scratch, seen, rule, scores } = self;
        let split = rule.split;
        let pinned = if rule.sinks == Sinks::Pinned { split.sinks as i32 } else { 0 };
        // As a rule every sink and every token of the recent window is stored, which one look proves; else look closely.
        let mut window = split.recent + (pinned - seen).max(0) as usize;
        let mut found = scratch.load(seen.saturating_sub(window as i32), pinned, scores)?;
        let missing = pinned as usize - found.sinks;
        if split.recent + missing != window || found.recent != window {
            window = split.recent + missing;
            let newest = scratch.newest(window, pinned);
            found = scratch.load(newest, pinned, scores)?;
        }

        let Scratch { positions, victims, mass, peak, order, hints: [by_sinks, by_peak, by_mass] } = scratch;
        let position = |i: usize| positions[i];
        let mut contenders = found.mass.count;
        if rule.sinks == Sinks::Adaptive && split.sinks > 0 {
            let cut = cut(mass, split.sinks, found.mass, by_sinks, position, order);
            protect(cut, mass, peak, positions);
            contenders = contenders.saturating_sub(split.sinks);
        }
        if split.peak > 0 {
            let cut = cut(peak, split.peak, Field { count: contenders, ..found.peak }, by_peak, position, order);
            protect(cut, peak, mass, positions);
            contenders = contenders.saturating_sub(split.peak);
        }
        let cut = cut(mass, split.mass, Field { count: contenders, ..found.mass }, by_mass, position, order);
        // What stays and what took no part becomes 0, victims remain above. Nobody reads the other keys any more.
        protect(cut, mass, peak, positions);
        victims.resize(positions.len(), 0);
        let count = lanes.above(mass, 0, victims);
        victims.truncate(count);
        Ok(())
    }
}
