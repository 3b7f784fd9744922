//! The k largest of many scores, by counting.
//!
//! A finite float becomes an integer that compares like it, its ordinal. The k-th largest is then found by guessing an ordinal and counting
//! those that reach it: each guess falls strictly between two that are known to take too many and too few, and replaces one of them,
//! so the search ends. Ties are settled by position, the newer staying.

/// The ordinal of what takes no part: below that of every finite float.
pub const ABSENT: i32 = i32::MIN;

/// An integer that compares like a finite float; -0.0 equals 0.0.
#[inline(always)]
#[must_use]
pub fn ordinal(score: f32) -> i32 {
    let bits = score.to_bits() as i32;
    let bits = if bits == i32::MIN { 0 } else { bits };
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// The ordinals that take part: how many, the smallest and the largest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// How many.
    pub count: usize,
    /// None is below this one.
    pub least: i32,
    /// None is above this one.
    pub most: i32,
}

/// What is taken: ordinals above `ordinal`, and those equal to it at `position` or later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// The smallest ordinal that is taken.
    pub ordinal: i32,
    /// The first position that is taken of those with that ordinal.
    pub position: i32,
}

impl Cut {
    /// Whether it takes what has this ordinal and this position.
    #[inline(always)]
    #[must_use]
    pub fn takes(self, ordinal: i32, position: i32) -> bool {
        (ordinal > self.ordinal) | ((ordinal == self.ordinal) & (position >= self.position))
    }
}

/// How many ordinals are at least `least`.
#[inline(always)]
fn reaching(ordinals: &[i32], least: i32) -> usize {
    ordinals.iter().map(|&ordinal| u32::from(ordinal >= least)).sum::<u32>() as usize
}

/// Where to cut so that `k` of the field are taken, at least one of which stays outside. `positions` settle ties.
///
/// `near` is where the last search of this kind ended, which is where this one begins, as heads resemble each other: it changes the number
/// of counts, never the result.
#[inline(always)]
pub fn cut(ordinals: &[i32], positions: &[i32], k: usize, field: Field, near: &mut i32) -> Cut {
    debug_assert!(0 < k && k < field.count);
    // `low` takes `over` too many, `high` takes `under` too few.
    let (mut low, mut over) = (i64::from(field.least), field.count - k);
    let (mut high, mut under) = (i64::from(field.most) + 1, k);
    let mut turn = 0u32;
    while high - low > 1 {
        let width = high - low;
        let guess = match turn {
            0 => i64::from(*near),
            // Halving now and then bounds the number of turns whatever the distribution.
            _ if turn % 4 == 3 => low + width / 2,
            _ => low + (width as f64 * over as f64 / (over + under) as f64) as i64,
        };
        let guess = guess.clamp(low + 1, high - 1);
        let count = reaching(ordinals, guess as i32);
        if count > k {
            (low, over) = (guess, count - k);
        } else {
            (high, under) = (guess, k - count);
        }
        if under == 0 {
            *near = guess as i32;
            return Cut { ordinal: guess as i32, position: i32::MIN };
        }
        turn += 1;
    }
    let ordinal = low as i32;
    *near = ordinal;
    let tied = ordinals.iter().zip(positions).filter(|&(&other, _)| other == ordinal);
    let mut tied: Vec<i32> = tied.map(|(_, &position)| position).collect();
    let from = tied.len() - under;
    Cut { ordinal, position: *tied.select_nth_unstable(from).1 }
}
