//! The types that probabilities come in, one by one and by the vector.

use crate::head::FINITE;

/// An element type of the probabilities.
pub trait Element: wide::Values + Copy + Send + Sync {
    /// Largest [`Element::order`] of a finite value that is not negative.
    const FINITE: u32;

    /// The value in single precision; arbitrary where `order` is beyond `FINITE`, but for the sign of zero.
    fn value(self) -> f32;

    /// The bits, ordered like the values of finite numbers that are not negative; all others, and -0.0, come after those.
    fn order(self) -> u32;

    /// The exact value of anything, slowly.
    fn exact(self) -> f32;
}

impl Element for f32 {
    const FINITE: u32 = FINITE;

    #[inline(always)]
    fn value(self) -> f32 {
        self
    }

    #[inline(always)]
    fn order(self) -> u32 {
        self.to_bits()
    }

    fn exact(self) -> f32 {
        self
    }
}

impl Element for half::bf16 {
    const FINITE: u32 = 0x7f7f_0000;

    #[inline(always)]
    fn value(self) -> f32 {
        f32::from_bits(self.order())
    }

    #[inline(always)]
    fn order(self) -> u32 {
        u32::from(self.to_bits()) << 16
    }

    fn exact(self) -> f32 {
        self.to_f32()
    }
}

impl Element for half::f16 {
    const FINITE: u32 = 0x7bff_0000;

    #[inline(always)]
    fn value(self) -> f32 {
        // Move the exponent; a subnormal gets a leading one, which is subtracted again. Unlike the multiplication by 2^112 often
        // seen here, this meets no subnormal in single precision, which are slow or flushed to zero on some machines.
        let bits = u32::from(self.to_bits() & 0x7fff) << 13;
        let normal = f32::from_bits(bits + (112 << 23));
        let subnormal = f32::from_bits(bits + (113 << 23)) - f32::from_bits(113 << 23);
        if bits < 1 << 23 { subnormal } else { normal }
    }

    #[inline(always)]
    fn order(self) -> u32 {
        u32::from(self.to_bits()) << 16
    }

    fn exact(self) -> f32 {
        self.to_f32()
    }
}

/// The number, or 0 if it is too small for a normal float. In a thread that flushes those the comparison sees 0, with the same outcome.
#[inline(always)]
pub(crate) fn normal(x: f32) -> f32 {
    if x < f32::MIN_POSITIVE { 0.0 } else { x }
}

pub(crate) mod wide {
    //! Probabilities by the vector. Those of 16 bits are loaded in pairs, of which the even ones fill one vector and the odd ones
    //! another: that takes a shift and a mask where lining them up would take twice the loads. Sums stay in this order until all
    //! queries have passed.

    use pulp::Simd;

    /// Vectors loaded together.
    pub(crate) const COUNT: usize = 4;

    pub trait Values: Sized {
        /// What the largest order of `values` may hold beside an order.
        const BELOW: u32;

        /// `COUNT` vectors of values; the largest order is kept in `worst`.
        fn values<S: Simd>(simd: S, from: &[Self], worst: &mut S::u32s) -> [S::f32s; COUNT];

        /// Bring what was summed up in the order of `values` into that of the columns.
        fn in_order(sums: &mut [f32], width: usize);
    }

    /// As the function of the same name beside this module.
    #[inline(always)]
    pub(crate) fn normal<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
        let small = simd.less_than_f32s(x, simd.splat_f32s(f32::MIN_POSITIVE));
        simd.select_f32s(small, simd.splat_f32s(0.0), x)
    }

    /// Vectors of 32-bit words, of whatever is in `from`.
    #[inline(always)]
    fn words<S: Simd, T: bytemuck::Pod, const N: usize>(from: &[T]) -> [S::u32s; N] {
        let bytes: &[u8] = bytemuck::cast_slice(from);
        let size = size_of::<S::u32s>();
        std::array::from_fn(|i| bytemuck::pod_read_unaligned(&bytes[i * size..(i + 1) * size]))
    }

    /// Even and odd columns, of vectors in turn, one after the other.
    #[inline(always)]
    fn interleave(sums: &mut [f32], width: usize) {
        match width {
            16 => interleave_vectors::<16>(sums),
            8 => interleave_vectors::<8>(sums),
            4 => interleave_vectors::<4>(sums),
            _ => interleave_vectors::<1>(sums),
        }
    }

    /// With a width that the compiler knows, so that it shuffles vectors.
    #[inline(always)]
    fn interleave_vectors<const WIDTH: usize>(sums: &mut [f32]) {
        for [even, odd] in sums.as_chunks_mut::<WIDTH>().0.as_chunks_mut().0 {
            let pairs: [[f32; 2]; WIDTH] = std::array::from_fn(|i| [even[i], odd[i]]);
            let (first, second) = pairs.as_flattened().split_at(WIDTH);
            even.copy_from_slice(first);
            odd.copy_from_slice(second);
        }
    }

    impl Values for f32 {
        const BELOW: u32 = 0;

        #[inline(always)]
        fn values<S: Simd>(simd: S, from: &[Self], worst: &mut S::u32s) -> [S::f32s; COUNT] {
            words::<S, _, COUNT>(from).map(|word| {
                *worst = simd.max_u32s(*worst, word);
                normal(simd, simd.transmute_f32s_u32s(word))
            })
        }

        #[inline(always)]
        fn in_order(_: &mut [f32], _: usize) {}
    }

    impl Values for half::bf16 {
        // The first of a pair lies below the second.
        const BELOW: u32 = 0xffff;

        #[inline(always)]
        fn values<S: Simd>(simd: S, from: &[Self], worst: &mut S::u32s) -> [S::f32s; COUNT] {
            let (sixteen, upper) = (simd.splat_u32s(16), simd.splat_u32s(0xffff_0000));
            let [a, b] = words::<S, _, 2>(from);
            let (first_a, first_b) = (simd.wrapping_dyn_shl_u32s(a, sixteen), simd.wrapping_dyn_shl_u32s(b, sixteen));
            *worst = simd.max_u32s(*worst, simd.max_u32s(simd.max_u32s(first_a, a), simd.max_u32s(first_b, b)));
            [
                simd.transmute_f32s_u32s(first_a),
                simd.transmute_f32s_u32s(simd.and_u32s(a, upper)),
                simd.transmute_f32s_u32s(first_b),
                simd.transmute_f32s_u32s(simd.and_u32s(b, upper)),
            ]
            .map(|values| normal(simd, values))
        }

        #[inline(always)]
        fn in_order(sums: &mut [f32], width: usize) {
            interleave(sums, width);
        }
    }

    /// Values of half precision, whose bits come shifted by 13, and with others. As `Element::value`, but for the choice between what
    /// is right for normal and for subnormal numbers: the right one is always the smaller.
    #[inline(always)]
    fn half_values<S: Simd>(simd: S, bits: S::u32s) -> S::f32s {
        let (to_normal, to_subnormal) = (simd.splat_u32s(112 << 23), simd.splat_u32s(113 << 23));
        let bits = simd.and_u32s(bits, simd.splat_u32s(0x7fff << 13));
        let normal = simd.transmute_f32s_u32s(simd.add_u32s(bits, to_normal));
        let shifted = simd.transmute_f32s_u32s(simd.add_u32s(bits, to_subnormal));
        simd.min_f32s(normal, simd.sub_f32s(shifted, simd.transmute_f32s_u32s(to_subnormal)))
    }

    impl Values for half::f16 {
        const BELOW: u32 = 0xffff;

        #[inline(always)]
        fn values<S: Simd>(simd: S, from: &[Self], worst: &mut S::u32s) -> [S::f32s; COUNT] {
            let (sixteen, thirteen, three) = (simd.splat_u32s(16), simd.splat_u32s(13), simd.splat_u32s(3));
            let [a, b] = words::<S, _, 2>(from);
            let (first_a, first_b) = (simd.wrapping_dyn_shl_u32s(a, sixteen), simd.wrapping_dyn_shl_u32s(b, sixteen));
            *worst = simd.max_u32s(*worst, simd.max_u32s(simd.max_u32s(first_a, a), simd.max_u32s(first_b, b)));
            [
                half_values(simd, simd.wrapping_dyn_shl_u32s(a, thirteen)),
                half_values(simd, simd.wrapping_dyn_shr_u32s(a, three)),
                half_values(simd, simd.wrapping_dyn_shl_u32s(b, thirteen)),
                half_values(simd, simd.wrapping_dyn_shr_u32s(b, three)),
            ]
        }

        #[inline(always)]
        fn in_order(sums: &mut [f32], width: usize) {
            interleave(sums, width);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::valid;

    #[test]
    fn half_precision_values_are_exact() {
        for bits in (0..=u16::MAX).step_by(if cfg!(miri) { 97 } else { 1 }) {
            let (f16, bf16) = (half::f16::from_bits(bits), half::bf16::from_bits(bits));
            for (usable, value, exact) in [
                (f16.order() <= half::f16::FINITE, f16.value(), f16.exact()),
                (bf16.order() <= half::bf16::FINITE, bf16.value(), bf16.exact()),
            ] {
                assert!(!usable || value.to_bits() == exact.to_bits(), "{bits:#x}: {value} {exact}");
                assert_eq!(usable, valid(exact) && exact.is_sign_positive(), "{bits:#x}");
            }
        }
    }
}
