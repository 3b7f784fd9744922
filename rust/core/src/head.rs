//! What one head shows when it has to decide.

/// Bits of the largest finite float: a score that may be used has bits up to this, or those of -0.0.
pub(crate) const FINITE: u32 = 0x7f7f_ffff;

/// Whether a mass or a peak may be used; by its bits, since some threads take small numbers for 0.
#[inline(always)]
pub(crate) fn valid(score: f32) -> bool {
    score.to_bits() <= FINITE || score.to_bits() == (-0.0f32).to_bits()
}

/// Which head, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) layer: usize,
    pub(crate) row: usize,
    pub(crate) kv_head: usize,
}

/// The candidates of one head: its slots first, then the columns of a chunk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head<'a> {
    pub(crate) place: Place,
    /// Positions of the candidates; -1 for empty and queued slots and for padding, which are none.
    pub(crate) positions: &'a [i32],
    /// One more than the newest position.
    pub(crate) seen: usize,
    pub(crate) scores: Scores<'a>,
}

/// What is known about each candidate; empty where the strategy does not need it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Scores<'a> {
    pub(crate) mass: &'a [f32],
    pub(crate) peak: &'a [f32],
    pub(crate) distinct: &'a [f32],
}

/// A score that may not be used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct BadScore {
    pub(crate) name: &'static str,
    pub(crate) index: usize,
    pub(crate) value: f32,
}

impl Head<'_> {
    /// Refuse a candidate's mass or peak that is not finite or negative, and a distinctness that is not finite.
    #[inline(always)]
    pub(crate) fn check(&self) -> Result<(), BadScore> {
        let Scores { mass, peak, distinct } = self.scores;
        // The bits of what may be used, where those of the sign may be overlooked, are those of a finite number that is not negative.
        for (name, values, bits) in
            [("mass", mass, u32::MAX), ("peak", peak, u32::MAX), ("distinct", distinct, i32::MAX as u32)]
        {
            let candidates = self.positions.iter().zip(values);
            let looked_at = |(&position, value): (&i32, &f32)| value.to_bits() & bits & !(position >> 31) as u32;
            if candidates.clone().map(looked_at).fold(0, u32::max) <= FINITE {
                continue;
            }
            let bad =
                |(&position, &value): (&i32, &f32)| position >= 0 && !valid(f32::from_bits(value.to_bits() & bits));
            if let Some(index) = candidates.clone().position(bad) {
                return Err(BadScore { name, index, value: values[index] });
            }
        }
        Ok(())
    }
}
