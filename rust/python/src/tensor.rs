//! Zero-copy views of tensors and arrays, through `DLPack`. The only unsafe code of the project.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;

use dlpark::ffi::{DLDataType, DLDataTypeCode, DLDevice, DLDeviceType};
use dlpark::python::{ImportedDlpack, from_dlpack};
use dlpark::{DlpackElement, DlpackFlags};
use liquidfusion_core::view::contiguous;
use pyo3::prelude::*;

use crate::error::tensor_error;

/// Whether the view is to be written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// A C-contiguous CPU tensor of `D` dimensions that is kept alive.
pub(crate) struct Tensor<T, const D: usize> {
    data: NonNull<T>,
    len: usize,
    shape: [usize; D],
    _alive: ImportedDlpack,
    _type: PhantomData<T>,
}

// SAFETY: a Tensor is a pointer to plain numbers and the managed tensor that keeps them alive, which dlpark declares Send and
// whose deleter DLPack allows on any thread. Access to the numbers is governed by the borrow rules of the methods below.
unsafe impl<T: Send, const D: usize> Send for Tensor<T, D> {}
// SAFETY: as above; through a shared reference the numbers can only be read.
unsafe impl<T: Sync, const D: usize> Sync for Tensor<T, D> {}

/// Any tensor that was imported and whose device, layout and access were checked, but not its dtype or rank.
pub(crate) struct AnyTensor {
    imported: ImportedDlpack,
    pub(crate) dtype: DLDataType,
    pub(crate) shape: Vec<usize>,
}

pub(crate) fn dtype_name(dtype: DLDataType) -> String {
    let code = match dtype.code {
        DLDataTypeCode::BOOL => return "bool".into(),
        DLDataTypeCode::INT => "int",
        DLDataTypeCode::UINT => "uint",
        DLDataTypeCode::FLOAT => "float",
        DLDataTypeCode::BFLOAT => "bfloat",
        DLDataTypeCode::COMPLEX => "complex",
        other => return format!("DLPack type {} with {} bits", other.0, dtype.bits),
    };
    format!("{code}{}", dtype.bits)
}

fn device_name(device: DLDevice) -> String {
    match device.device_type {
        DLDeviceType::CUDA => format!("cuda:{}", device.device_id),
        DLDeviceType::METAL => "mps".into(),
        DLDeviceType::ROCM => format!("rocm:{}", device.device_id),
        DLDeviceType(other) => format!("DLPack device type {other}"),
    }
}

impl AnyTensor {
    /// Import `object`, refusing other memory than the CPU's (pinned included), gaps, and read-only memory where it is to be written.
    pub(crate) fn import(name: &str, object: &Bound<'_, PyAny>, access: Access) -> PyResult<Self> {
        let py = object.py();
        let refuse = |what: String| tensor_error(py, format!("{name} must be {what}"));
        let imported = from_dlpack(object.as_borrowed(), None, None).map_err(|error| {
            let kind = object.get_type().name().map_or_else(|_| "object".into(), |n| n.to_string());
            let text = refuse(format!("a CPU tensor or array that exports DLPack, got {kind} ({})", error.value(py)));
            text.set_cause(py, Some(error));
            text
        })?;
        let view = imported.validate().map_err(|error| refuse(format!("a valid tensor: {error}")))?;
        let (device, dtype) = (view.device(), view.dtype());
        if !matches!(device.device_type, DLDeviceType::CPU | DLDeviceType::CUDAHOST | DLDeviceType::ROCMHOST) {
            return Err(refuse(format!("on the CPU, pinned or not, got a tensor on {}", device_name(device))));
        }
        // dlpark has checked that no size is negative.
        let shape: Vec<usize> = view.shape().iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect();
        let strides = view.strides().unwrap_or_default();
        if !strides.is_empty() && !contiguous(&shape, strides) {
            return Err(refuse(format!("C-contiguous, got the shape {shape:?} with strides {strides:?}")));
        }
        if access == Access::Write && imported.flags().contains(DlpackFlags::READ_ONLY) {
            return Err(refuse("writable, got a read-only array".into()));
        }
        Ok(Self { imported, dtype, shape })
    }

    /// The tensor with a known element type and rank; `dims` names them in the message.
    pub(crate) fn typed<T: DlpackElement, const D: usize>(
        self,
        py: Python<'_>,
        name: &str,
        dims: &str,
    ) -> PyResult<Tensor<T, D>> {
        if !self.dtype.is::<T>() {
            let (accepted, came) = (dtype_name(T::DTYPE), dtype_name(self.dtype));
            return Err(tensor_error(py, format!("{name} must be {accepted}, got {came}")));
        }
        let Ok(shape) = <[usize; D]>::try_from(&*self.shape) else {
            return Err(tensor_error(py, format!("{name} must have the shape {dims}, got {:?}", self.shape)));
        };
        let (pointer, len) = {
            let view = self.imported.validate().map_err(|error| tensor_error(py, format!("{name}: {error}")))?;
            // SAFETY: DLPack obliges the producer to export a data pointer and offset inside the tensor's allocation.
            let pointer = unsafe { view.offset_data_ptr::<T>() };
            (pointer.map_err(|error| tensor_error(py, format!("{name}: {error}")))?, view.num_elements())
        };
        let Some(data) = NonNull::new(pointer.cast_mut()) else {
            return Err(tensor_error(py, format!("{name} must have data, got a null pointer")));
        };
        Ok(Tensor { data, len, shape, _alive: self.imported, _type: PhantomData })
    }
}

impl<T: DlpackElement, const D: usize> Tensor<T, D> {
    /// Import `object` as a tensor of this element type and rank; `dims` names the dimensions in messages.
    pub(crate) fn import(name: &str, dims: &str, object: &Bound<'_, PyAny>, access: Access) -> PyResult<Self> {
        AnyTensor::import(name, object, access)?.typed(object.py(), name, dims)
    }

    pub(crate) fn shape(&self) -> [usize; D] {
        self.shape
    }

    /// Refuse any other shape.
    pub(crate) fn expect(&self, py: Python<'_>, name: &str, shape: [usize; D]) -> PyResult<()> {
        if self.shape == shape {
            return Ok(());
        }
        Err(tensor_error(py, format!("{name} must have the shape {shape:?}, got {:?}", self.shape)))
    }

    pub(crate) fn slice(&self) -> &[T] {
        // SAFETY: `typed` checked dtype, alignment, compactness and length; the managed tensor keeps the memory alive. That nobody
        // writes it meanwhile is the caller's duty, as for every library that shares tensors.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }

    pub(crate) fn slice_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `slice`; writing was allowed at import, and `disjoint` proved that no other view of the call overlaps.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }

    /// The addresses it spans.
    pub(crate) fn span(&self) -> Range<usize> {
        let start = self.data.as_ptr() as usize;
        start..start + self.len * size_of::<T>()
    }
}

/// Refuse tensors that share memory: two of them, at least one written, would alias.
pub(crate) fn disjoint(py: Python<'_>, spans: &[(&str, Range<usize>)]) -> PyResult<()> {
    for (i, (name, a)) in spans.iter().enumerate() {
        for (other, b) in &spans[..i] {
            if a.start < b.end && b.start < a.end {
                return Err(tensor_error(
                    py,
                    format!("{other} and {name} must not share memory, got overlapping tensors"),
                ));
            }
        }
    }
    Ok(())
}
