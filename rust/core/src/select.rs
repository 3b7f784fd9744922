//! The k largest of many scores, by counting.
//!
//! A finite float becomes an integer that compares like it, its ordinal. The k-th largest is then found by guessing an ordinal and counting
//! those that reach it: each guess falls strictly between two that are known to take too many and too few, and replaces one of them,
//! so the search ends. Ties are settled by position, the newer staying.

/// The ordinal of what takes no part: above that of every finite float, so that it is never below a cut.
pub const OUTSIDE: i32 = i32::MAX;

/// An integer that compares like a finite float; -0.0 equals 0.0.
#[inline(always)]
#[must_use]
pub fn ordinal(score: f32) -> i32 {
    let bits = score.to_bits() as i32;
    // All ones for a negative one, whose other bits are its size.
    let sign = bits >> 31;
    (bits ^ (sign as u32 >> 1) as i32).wrapping_sub(sign)
}

/// The ordinals that take part, and where to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// How many.
    pub count: usize,
    /// None is below this one.
    pub least: i32,
    /// None is above this one.
    pub most: i32,
    /// The first guess: it changes the number of counts, never the result.
    pub near: i32,
    /// How many are below that.
    pub below_near: usize,
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
    /// Put what is taken of those equal to the cut outside; returns the ordinal below which all are that were not taken.
    #[inline(always)]
    pub fn settle(self, ordinals: &mut [i32], positions: &[i32]) -> i32 {
        if self.position == i32::MIN {
            return self.ordinal;
        }
        for (ordinal, &position) in ordinals.iter_mut().zip(positions) {
            *ordinal = if (*ordinal == self.ordinal) & (position >= self.position) { OUTSIDE } else { *ordinal };
        }
        self.ordinal + 1
    }
}

/// How many numbers are below `bound`.
#[inline(always)]
fn below(numbers: &[i32], bound: i32) -> usize {
    numbers.iter().map(|&number| u32::from(bound > number)).sum::<u32>() as usize
}

/// Where to cut so that `k` of the field are taken, at least one of which stays outside. `positions` settle ties.
#[inline(always)]
#[must_use]
pub fn cut(ordinals: &[i32], positions: &[i32], k: usize, field: Field) -> Cut {
    debug_assert!(0 < k && k < field.count);
    // `low` takes `over` too many, `high` takes `under` too few.
    let (mut low, mut over) = (i64::from(field.least), field.count - k);
    let (mut high, mut under) = (i64::from(field.most) + 1, k);
    // By what a guess goes: the same, but halved while the other end moves, so that a guess falls on its other side (the Illinois rule).
    let (mut to_high, mut to_low) = (over as f64, under as f64);
    let (mut turn, mut moved_low) = (0u32, None);
    while high - low > 1 {
        let width = high - low;
        let guess = match turn {
            0 => i64::from(field.near),
            // Halving now and then bounds the number of turns whatever the distribution.
            _ if turn % 8 == 7 => low + width / 2,
            _ => low + (width as f64 * to_high / (to_high + to_low)) as i64,
        };
        let guess = guess.clamp(low + 1, high - 1);
        let known = guess == i64::from(field.near);
        let count = field.count - if known { field.below_near } else { below(ordinals, guess as i32) };
        let again = if moved_low == Some(count > k) { 0.5 } else { 1.0 };
        moved_low = Some(count > k);
        if count > k {
            (low, over) = (guess, count - k);
            (to_high, to_low) = (over as f64, to_low * again);
        } else {
            (high, under) = (guess, k - count);
            (to_high, to_low) = (to_high * again, under as f64);
        }
        if under == 0 {
            return Cut { ordinal: guess as i32, position: i32::MIN };
        }
        turn += 1;
    }
    let ordinal = low as i32;
    let tied = ordinals.iter().zip(positions).filter(|&(&other, _)| other == ordinal);
    let mut tied: Vec<i32> = tied.map(|(_, &position)| position).collect();
    let from = tied.len() - under;
    Cut { ordinal, position: *tied.select_nth_unstable(from).1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::everywhere;
    use crate::simd::vectorised;

    vectorised! {
        fn chosen<'a>(scores: &'a [f32], positions: &'a [i32], k: usize, near: &'a mut i32) -> Vec<usize> {
            // Every seventh takes no part.
            let mut ordinals: Vec<i32> =
                (0..scores.len()).map(|i| if i % 7 == 6 { OUTSIDE } else { ordinal(scores[i]) }).collect();
            let part = || ordinals.iter().copied().filter(|&ordinal| ordinal < OUTSIDE);
            let (least, most) = (part().min().unwrap(), part().max().unwrap());
            let field = Field { count: part().count(), least, most, near: *near, below_near: below(&ordinals, *near) };
            let cut = cut(&ordinals, positions, k, field);
            *near = cut.ordinal;
            let bound = cut.settle(&mut ordinals, positions);
            (0..scores.len()).filter(|&i| i % 7 != 6 && ordinals[i] >= bound).collect()
        }
    }

    /// The first `k` of all that take part, sorted.
    fn naive(scores: &[f32], positions: &[i32], k: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..scores.len()).filter(|i| i % 7 != 6).collect();
        order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap().then(positions[b].cmp(&positions[a])));
        order.truncate(k);
        order.sort_unstable();
        order
    }

    fn check(scores: &[f32], k: usize, nears: &[i32]) {
        let n = scores.len() as i32;
        let positions: Vec<i32> = (0..n).map(|i| i * 7919 % 1_000_003).collect();
        let naive = naive(scores, &positions, k);
        everywhere(|| {
            for mut near in nears.iter().copied() {
                assert_eq!(chosen(scores, &positions, k, &mut near), naive);
                // And once more from where that ended.
                assert_eq!(chosen(scores, &positions, k, &mut near), naive);
            }
        });
    }

    const NEARS: [i32; 5] = [0, i32::MIN, i32::MAX, 0x3f00_0000, -0x3f00_0000];

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig {
            cases: if cfg!(miri) { 4 } else { 256 },
            failure_persistence: None,
            ..Default::default()
        })]

        #[test]
        fn agrees_with_sorting(
            scores in proptest::collection::vec(
                proptest::prop_oneof![
                    proptest::prelude::Just(0.0f32), proptest::prelude::Just(-0.0), proptest::prelude::Just(0.25),
                    -1.0f32..1.0, -1e-38f32..1e-38, proptest::prelude::Just(f32::MAX), proptest::prelude::Just(f32::MIN),
                ],
                3..if cfg!(miri) { 40 } else { 300 },
            ),
            part in 0.0f64..1.0,
        ) {
            let count = scores.len() - scores.len() / 7;
            check(&scores, 1 + (part * (count - 1) as f64) as usize, &NEARS);
        }
    }

    #[test]
    fn any_distribution_is_searched() {
        let n = if cfg!(miri) { 150 } else { 9000 };
        let shapes: [fn(usize) -> f32; 6] = [
            |i| (i * 7919 % 9001) as f32,
            |i| (-((i * 31 % 97) as f32)).exp2(),
            |_| 0.5,
            |i| if i % 3 == 0 { -1e-30 } else { 1.0 + (i % 7) as f32 },
            |i| if i % 50 == 0 { i as f32 } else { 0.0 },
            |i| f32::from_bits(0x3f80_0000 + i as u32),
        ];
        for shape in shapes {
            let scores: Vec<f32> = (0..n).map(shape).collect();
            let count = n - n / 7;
            for k in [1, 2, n / 20, n / 2, count - 40, count - 1] {
                check(&scores, k, &NEARS[..2]);
            }
        }
    }

    #[test]
    fn ordinals_compare_like_floats() {
        let scores = [f32::MIN, -1.5, -1e-40, 0.0, 1e-45, 1e-40, 0.25, 3.0, f32::MAX];
        assert!(scores.windows(2).all(|pair| ordinal(pair[0]) < ordinal(pair[1])));
        assert!(ordinal(f32::MAX) < OUTSIDE && ordinal(-0.0) == ordinal(0.0));
    }
}
