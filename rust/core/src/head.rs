//! What one head shows when it has to decide.

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

/// The candidates of one head; at first its slots and the columns of a chunk, then those of them that are left.
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
        // A sign may be overlooked where it means nothing.
        let kinds = [("mass", u32::MAX), ("peak", u32::MAX), ("distinct", !SIGN)];
        for ((name, mask), values) in kinds.into_iter().zip(self.scores) {
            let bad =
                |(&position, value): (&i32, &f32)| position >= 0 && !valid(f32::from_bits(value.to_bits() & mask));
            if let Some(index) = self.positions.iter().zip(values).position(bad) {
                return Err(BadScore { name, index, value: values[index] });
            }
        }
        Ok(())
    }
}
