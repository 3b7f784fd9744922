//! Slices with a shape: what a row-major tensor looks like to this crate.

use crate::error::{Result, fail};

/// A read-only row-major tensor of `D` dimensions.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T, const D: usize> {
    data: &'a [T],
    shape: [usize; D],
}

/// A writable row-major tensor of `D` dimensions.
#[derive(Debug)]
pub struct ViewMut<'a, T, const D: usize> {
    data: &'a mut [T],
    shape: [usize; D],
}

fn check_len<const D: usize>(name: &str, len: usize, shape: [usize; D]) -> Result<()> {
    if shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) != Some(len) {
        fail!(Tensor, "{name} has {len} elements, which is not the product of its shape {shape:?}");
    }
    Ok(())
}

fn check_shape<const D: usize>(name: &str, shape: [usize; D], expected: [usize; D]) -> Result<()> {
    if shape != expected {
        fail!(Tensor, "{name} must have the shape {expected:?}, got {shape:?}");
    }
    Ok(())
}

impl<'a, T, const D: usize> View<'a, T, D> {
    /// Wrap `data`; `name` is used in messages.
    pub fn new(name: &str, data: &'a [T], shape: [usize; D]) -> Result<Self> {
        check_len(name, data.len(), shape)?;
        Ok(Self { data, shape })
    }

    /// All elements in row-major order.
    #[must_use]
    pub fn data(&self) -> &'a [T] {
        self.data
    }

    /// Sizes of the dimensions.
    #[must_use]
    pub fn shape(&self) -> [usize; D] {
        self.shape
    }

    /// Refuse any other shape than `expected`.
    pub fn expect(&self, name: &str, expected: [usize; D]) -> Result<()> {
        check_shape(name, self.shape, expected)
    }
}

impl<'a, T, const D: usize> ViewMut<'a, T, D> {
    /// Wrap `data`; `name` is used in messages.
    pub fn new(name: &str, data: &'a mut [T], shape: [usize; D]) -> Result<Self> {
        check_len(name, data.len(), shape)?;
        Ok(Self { data, shape })
    }

    /// All elements in row-major order.
    pub fn data(&mut self) -> &mut [T] {
        self.data
    }

    /// Sizes of the dimensions.
    #[must_use]
    pub fn shape(&self) -> [usize; D] {
        self.shape
    }

    /// Refuse any other shape than `expected`.
    pub fn expect(&self, name: &str, expected: [usize; D]) -> Result<()> {
        check_shape(name, self.shape, expected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_does_not_fit() {
        let view = View::new("x", &[1, 2, 3, 4, 5, 6], [2, 3]).unwrap();
        assert!(view.expect("x", [2, 3]).is_ok());
        let text = view.expect("x", [3, 2]).unwrap_err().to_string();
        assert_eq!(text, "x must have the shape [3, 2], got [2, 3]");
        assert!(View::new("x", &[1, 2, 3], [2, 2]).is_err());
        assert!(ViewMut::new("x", &mut [1, 2, 3], [usize::MAX, 2]).is_err());
    }
}
