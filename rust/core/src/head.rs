//! What one head shows when it has to decide.

use crate::simd::vectorised;

/// Bits of the largest finite float: a score that may be used has bits up to this, or those of -0.0.
pub(crate) const FINITE: u32 = 0x7f7f_ffff;

/// The bit of the sign.
pub(crate) const SIGN: u32 = 1 << 31;

/// Whether a mass or a peak may be used; by its bits, since some threads take small numbers for 0.
#[inline(always)]
pub(crate) fn valid(score: f32) -> bool {
    score.to_bits() <= FINITE || score.to_bits() == SIGN
}

/// Which head, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Place {
    pub(crate) layer: usize,
    pub(crate) row: usize,
    pub(crate) kv_head: usize,
}

/// The candidates of one head: its slots, and behind them the columns of a chunk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head<'a> {
    pub(crate) place: Place,
    /// One more than the newest position.
    pub(crate) seen: usize,
    /// Their positions; -1 for empty and queued slots and for padding, which are no candidates.
    pub(crate) positions: &'a [i32],
    pub(crate) scores: Scores<'a>,
}

/// What is known about each candidate: mass, peak and distinctness; empty where it is not needed.
pub(crate) type Scores<'a> = [&'a [f32]; 3];

/// Which of the [`Scores`].
pub(crate) const MASS: usize = 0;
/// See [`MASS`].
pub(crate) const PEAK: usize = 1;
/// See [`MASS`].
pub(crate) const DISTINCT: usize = 2;

/// A score that may not be used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct BadScore {
    pub(crate) name: &'static str,
    pub(crate) index: usize,
    pub(crate) value: f32,
}

impl Head<'_> {
    /// Refuse a candidate's mass or peak that is not finite or negative, and a distinctness that is not finite.
    pub(crate) fn check(&self) -> Result<(), BadScore> {
        let [mass, peak, distinct] = self.scores;
        // As a rule none is bad, whoever it belongs to.
        if worst(mass, peak, distinct) <= FINITE {
            return Ok(());
        }
        // A sign may be overlooked where it means nothing.
        for (name, values, mask) in [("mass", mass, u32::MAX), ("peak", peak, u32::MAX), ("distinct", distinct, !SIGN)]
        {
            let bad =
                |(&position, value): (&i32, &f32)| position >= 0 && !valid(f32::from_bits(value.to_bits() & mask));
            if let Some(index) = self.positions.iter().zip(values).position(bad) {
                return Err(BadScore { name, index, value: values[index] });
            }
        }
        Ok(())
    }
}

vectorised! {
    /// The largest bits of a score, but for the sign of distinctness.
    fn worst<'a>(mass: &'a [f32], peak: &'a [f32], distinct: &'a [f32]) -> u32 {
        let worst = mass.iter().zip(peak).fold(0, |worst, (mass, peak)| mass.to_bits().max(peak.to_bits()).max(worst));
        distinct.iter().fold(worst, |worst, score| worst.max(score.to_bits() & !SIGN))
    }
}
