"""The package imports at once: what needs torch comes when it is first asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import liquidfusion as lf


def heavy(code: str) -> set[str]:
    """Which of the slow packages a fresh interpreter has imported after `code`."""
    code += "\nimport sys; print(*(sys.modules.keys() & {'torch', 'transformers'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", ["--help", "--version", "run --help", "strategies"])
def test_command_line_does_not_wait_for_torch(arguments: str) -> None:
    assert heavy(f"from liquidfusion.bench.cli import main\nassert main({arguments.split()}) == 0") == set()


def test_names() -> None:
    assert heavy("import liquidfusion as lf\ndir(lf), lf.strategies(), lf.ConfigError") == set()
    assert set(lf.__all__) <= set(dir(lf))
    # a submodule of the same name must not take the function's place
    import liquidfusion.hf.cache
    import liquidfusion.hf.hook
    import liquidfusion.hf.use

    assert all(getattr(lf, name) is not None for name in lf.__all__)
    assert lf.KVCache is liquidfusion.hf.cache.KVCache
    assert lf.use is liquidfusion.hf.use.use
    assert lf.uninstall is liquidfusion.hf.hook.uninstall
    with pytest.raises(AttributeError, match="'liquidfusion' has no attribute 'KVCash'"):
        lf.KVCash  # noqa: B018


@pytest.mark.parametrize(
    ("value", "works"), [("", True), ("avx2", True), ("scalar", True), ("AVX2", False), ("sse", False)]
)
def test_instruction_set(value: str, works: bool) -> None:
    code = "from liquidfusion._core import Spec; Spec('h2o', 64)"
    environment = {**os.environ, "LIQUIDFUSION_SIMD": value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode == 0) == works
    if not works:
        error = done.stderr.splitlines()[-1]
        assert error == f"liquidfusion.exceptions.ConfigError: LIQUIDFUSION_SIMD must be avx2 or scalar, got {value}"
