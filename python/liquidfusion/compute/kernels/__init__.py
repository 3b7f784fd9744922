"""Triton kernels: attention over the slots in place, with exact scores, and what is put into the slots.

Slots lie in 16 bits or coded; how distinct keys are is told of both.

The package needs torch alone to be imported. `available` says whether the kernels can run; without Triton the names
`decode`, `place` and `prefill` do not exist and the generic torch path does the work.
"""

from __future__ import annotations

import importlib.util

import torch

try:
    # Triton without tensor descriptors is too old.
    _FOUND = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
except ModuleNotFoundError:
    _FOUND = False

if _FOUND:
    from .coded import decode_coded
    from .decode import decode
    from .distinct import distinctness
    from .draw import draw, log_sum, penalise
    from .encode import decode_states, encode_states, place_coded
    from .latent import decode_latent
    from .place import place
    from .prefill import prefill

    __all__ = [
        "available",
        "decode",
        "decode_coded",
        "decode_latent",
        "decode_states",
        "distinctness",
        "draw",
        "encode_states",
        "log_sum",
        "penalise",
        "place",
        "place_coded",
        "prefill",
    ]
else:
    __all__ = ["available"]


def available(device: torch.device | str | None = None) -> bool:
    """Say whether the kernels can run on a device.

    Parameters
    ----------
    device : torch.device or str, optional
        Where the tensors live; the current CUDA device when omitted.

    Returns
    -------
    bool
        True on an NVIDIA GPU of compute capability 8.0 or newer, where Triton is installed. The kernels also run on the
        CPU in Triton's interpreter (``TRITON_INTERPRET=1``), which serves their tests alone.
    """
    if not _FOUND or (device is not None and torch.device(device).type != "cuda"):
        return False
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
