//! Slices with a shape: what a row-major tensor looks like to this crate.

use std::ops::Deref;

use crate::error::{Result, fail};

/// A row-major tensor of `D` dimensions on a slice `S`.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<S, const D: usize> {
    data: S,
    shape: [usize; D],
}

/// One that can be read.
pub type View<'a, T, const D: usize> = Tensor<&'a [T], D>;

/// One that can be written.
pub type ViewMut<'a, T, const D: usize> = Tensor<&'a mut [T], D>;

impl<T, S: Deref<Target = [T]>, const D: usize> Tensor<S, D> {
    /// Wrap `data`; `name` is used in messages.
    pub fn new(name: &str, data: S, shape: [usize; D]) -> Result<Self> {
        let len = data.len();
        if shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) != Some(len) {
            fail!(Tensor, "{name} has {len} elements, which is not the product of its shape {shape:?}");
        }
        Ok(Self { data, shape })
    }

    /// Sizes of the dimensions.
    #[must_use]
    pub fn shape(&self) -> [usize; D] {
        self.shape
    }

    /// Refuse any other shape than `expected`.
    pub fn expect(&self, name: &str, expected: [usize; D]) -> Result<()> {
        if self.shape != expected {
            fail!(Tensor, "{name} must have the shape {expected:?}, got {:?}", self.shape);
        }
        Ok(())
    }
}

impl<'a, T, const D: usize> View<'a, T, D> {
    /// All elements in row-major order.
    #[must_use]
    pub fn data(&self) -> &'a [T] {
        self.data
    }
}

impl<T, const D: usize> ViewMut<'_, T, D> {
    /// All elements in row-major order.
    pub fn data(&mut self) -> &mut [T] {
        self.data
    }
}

/// Whether elements lie without gaps, last dimension fastest. The stride of a dimension of size 1 means nothing, and torch
/// leaves any value there; a tensor without elements has no gaps.
#[must_use]
pub fn contiguous(shape: &[usize], strides: &[i64]) -> bool {
    let mut step = 1;
    shape.contains(&0)
        || shape.iter().zip(strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || usize::try_from(stride) == Ok(step);
            step *= size;
            fits
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_does_not_fit() {
        let view = View::new("x", &[1, 2, 3, 4, 5, 6][..], [2, 3]).unwrap();
        assert!(view.expect("x", [2, 3]).is_ok());
        let text = view.expect("x", [3, 2]).unwrap_err().to_string();
        assert_eq!(text, "x must have the shape [3, 2], got [2, 3]");
        assert!(View::new("x", &[1, 2, 3][..], [2, 2]).is_err());
        assert!(ViewMut::new("x", &mut [1, 2, 3][..], [usize::MAX, 2]).is_err());
    }

    #[test]
    fn strides_of_single_elements_mean_nothing() {
        assert!(contiguous(&[2, 3, 4], &[12, 4, 1]));
        for stride in [-7, 0, 1, 5, i64::MAX] {
            assert!(contiguous(&[1, 3, 4], &[stride, 4, 1]));
            assert!(contiguous(&[2, 1, 4], &[4, stride, 1]));
            assert!(contiguous(&[2, 3, 1], &[3, 1, stride]));
            assert!(contiguous(&[1, 1], &[stride, stride]));
            assert!(contiguous(&[2, 0, 4], &[stride, stride, stride]));
        }
    }

    #[test]
    fn gaps_and_other_orders_are_seen() {
        for strides in [[24, 4, 1], [12, 8, 1], [12, 4, 2], [12, 1, 3], [4, 8, 1], [12, 4, 0], [-12, 4, 1]] {
            assert!(!contiguous(&[2, 3, 4], &strides), "{strides:?}");
        }
    }
}
