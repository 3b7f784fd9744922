"""Facts about the machine and its software that a result needs to be understood later, and its peak memory."""

import contextlib
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

_PACKAGES = ("liquidfusion", "torch", "transformers", "tokenizers", "numpy", "triton")


def versions() -> dict[str, str | None]:
    """Return the version of Python and of each package that can change a result (None: not installed)."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def describe(device: torch.device) -> dict[str, object]:
    """Return what the machine is made of; nothing in it names the machine or its user."""
    facts: dict[str, object] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def _cores() -> int | None:
    """Return the cores that this process may use."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux tells a processor's name nowhere else, and psutil does not
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of peak memory where the system allows it (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # without it the peak is that of the whole process so far
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int | None:
    """Return the peak in bytes since the last reset: memory of torch's tensors on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def resident_memory(device: torch.device) -> int:
    """Return the bytes in use now: memory of torch's tensors on CUDA, of the process elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(psutil.Process().memory_info().rss)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock read after it is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def copy_rate(device: torch.device, count: int | None = None) -> float:
    """Return the bytes a second that a copy reads and writes, the median of ten.

    Parameters
    ----------
    count
        Bytes to copy, more than the caches hold; None: 1 GiB on CUDA, 64 MiB elsewhere.
    """
    count = count or (2**30 if device.type == "cuda" else 2**26)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    times = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * count / statistics.median(times)
