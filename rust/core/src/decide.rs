//! One decision for one (layer, row, head): which of the candidates stay.

use crate::budget::Split;
use crate::select::{Cut, FINITE, cut, key, valid};
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
    pub(crate) victims: Vec<u32>,
    mass: Vec<i32>,
    peak: Vec<i32>,
    order: Vec<i32>,
}

/// The first score of a candidate that is NaN, infinite or negative.
pub(crate) fn find_bad(positions: &[i32], scores: Scores<'_>) -> Option<BadScore> {
    let bad = |values: &[f32]| positions.iter().zip(values).position(|(&p, &v)| p >= 0 && !valid(v));
    bad(scores.mass)
        .map(|index| BadScore { peak: false, index })
        .or_else(|| bad(scores.peak).map(|index| BadScore { peak: true, index }))
}

impl Scratch {
    /// Fill `victims` with the candidates outside the split; `seen` is one more than the newest position.
    pub(crate) fn decide(&mut self, seen: i32, rule: Rule, scores: Option<Scores<'_>>) -> Result<(), BadScore> {
        let Split { sinks, recent, peak, mass } = rule.split;
        let pinned = if rule.sinks == Sinks::Pinned { sinks as i32 } else { 0 };
        // As a rule every sink and every token of the recent window is stored, which one pass proves; else look closely.
        let mut window = recent + (pinned - seen).max(0) as usize;
        let mut newest = seen.saturating_sub(window as i32);
        let (mut sinks_found, mut recent_found) = self.load(newest, pinned, scores)?;
        let missing = pinned as usize - sinks_found;
        if recent + missing != window || recent_found != window {
            window = recent + missing;
            newest = self.newest(window, pinned);
            (sinks_found, recent_found) = self.load(newest, pinned, scores)?;
        }
        debug_assert_eq!((sinks_found + missing, recent_found), (pinned as usize, window));

        if rule.sinks == Sinks::Adaptive {
            let cut = self.choose(true, sinks);
            self.protect(true, cut);
        }
        if peak > 0 {
            let cut = self.choose(false, peak);
            self.protect(false, cut);
        }
        let cut = self.choose(true, mass);
        self.victims.clear();
        for (i, (&key, &position)) in self.mass.iter().zip(&self.positions).enumerate() {
            if key > 0 && !cut.takes(key, position) {
                self.victims.push(i as u32);
            }
        }
        Ok(())
    }

    /// Check the scores, turn those outside sinks and recent window into keys, and count both.
    fn load(&mut self, newest: i32, pinned: i32, scores: Option<Scores<'_>>) -> Result<(usize, usize), BadScore> {
        let n = self.positions.len();
        self.mass.resize(n, 0);
        self.peak.resize(n, 0);
        let (mut sinks_found, mut recent_found, mut worst) = (0u32, 0u32, 0u32);
        if let Some(Scores { mass, peak }) = scores {
            let keys = self.mass.iter_mut().zip(&mut self.peak);
            for ((&position, (mass_key, peak_key)), (&mass, &peak)) in
                self.positions.iter().zip(keys).zip(mass.iter().zip(peak))
            {
                let candidate = position >= 0;
                let sink = position < pinned;
                let recent = position >= newest;
                let contends = candidate && !sink && !recent;
                worst = worst.max(if candidate { mass.to_bits().max(peak.to_bits()) } else { 0 });
                sinks_found += u32::from(candidate && sink);
                recent_found += u32::from(candidate && recent && !sink);
                *mass_key = if contends { key(mass) } else { 0 };
                *peak_key = if contends { key(peak) } else { 0 };
            }
            if worst > FINITE
                && let Some(bad) = find_bad(&self.positions, Scores { mass, peak })
            {
                return Err(bad);
            }
        } else {
            for (&position, mass_key) in self.positions.iter().zip(&mut self.mass) {
                let candidate = position >= 0;
                let sink = position < pinned;
                let recent = position >= newest;
                sinks_found += u32::from(candidate && sink);
                recent_found += u32::from(candidate && recent && !sink);
                *mass_key = i32::from(candidate && !sink && !recent);
            }
        }
        Ok((sinks_found as usize, recent_found as usize))
    }

    /// The position from which exactly `window` candidates that are no pinned sinks are found.
    fn newest(&mut self, window: usize, pinned: i32) -> i32 {
        self.order.clear();
        self.order.extend(self.positions.iter().copied().filter(|&p| p >= pinned.max(0)));
        match self.order.len().checked_sub(window) {
            Some(from) if from < self.order.len() => *self.order.select_nth_unstable(from).1,
            Some(_) => i32::MAX,
            None => 0,
        }
    }

    fn choose(&mut self, by_mass: bool, k: usize) -> Cut {
        let keys = if by_mass { &self.mass } else { &self.peak };
        let positions = &self.positions;
        cut(keys, k, |i| positions[i], &mut self.order)
    }

    /// Take what was chosen out of the contest.
    fn protect(&mut self, by_mass: bool, cut: Cut) {
        for ((mass, peak), &position) in self.mass.iter_mut().zip(&mut self.peak).zip(&self.positions) {
            let key = if by_mass { *mass } else { *peak };
            if cut.takes(key, position) {
                *mass = 0;
                *peak = 0;
            }
        }
    }
}
