"""A cache's state as named tensors and a description: written to a file, checked when read, or handed to a copy.

The file is in safetensors' format. Its metadata has one entry, `liquidfusion`: JSON with the format's version, the
strategy, the model's shape, the columns and tokens seen, and a digest of all the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from liquidfusion import models
from liquidfusion.exceptions import CacheError

if TYPE_CHECKING:
    from liquidfusion.store import Store

KEY, VERSION = "liquidfusion", 1


@dataclass(frozen=True)
class Fingerprint:
    """What of a model a session depends on."""

    architecture: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    windows: list[int]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Fingerprint:
        """Of a model; with tensor parallelism, of this process' share."""
        config = models.text_config(model)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            architecture=type(model).__name__,
            layers=int(config.num_hidden_layers),
            kv_heads=heads // (getattr(model, "_tp_size", None) or 1),
            head_dim=width,
            dtype=str(model.dtype).removeprefix("torch."),
            windows=models.windows(model),
        )


@dataclass
class State:
    """Everything that a cache knows.

    `description`: JSON's types only. `tensors`: `keys.<layer>`, `values.<layer>` and, for every group of layers that
    are kept alike, `positions.<group>`, `queues.<group>` and where it keeps scores `mass.<group>`, `peak.<group>`.
    """

    description: dict[str, Any]
    tensors: dict[str, Tensor]

    def digest(self) -> str:
        """Of the description and of every tensor's name, type, shape and bytes."""
        total = hashlib.blake2b(digest_size=32)
        total.update(json.dumps(self.description, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            total.update(tensor.view(torch.uint8).numpy().data)
        return total.hexdigest()


def gather(stores: list[Store], places: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Tensors of a state: the stores' own memory, and copies of their queues."""
    tensors: dict[str, Tensor] = {}
    for layer, (number, index) in enumerate(places):
        slots = stores[number].layers[index]
        assert slots is not None
        tensors |= {f"keys.{layer}": slots.keys, f"values.{layer}": slots.values}
    for number, store in enumerate(stores):
        store.pull_scores()
        queues = torch.empty_like(store.host.positions)
        store.ledger.queues(queues)
        tensors |= {f"positions.{number}": store.host.positions, f"queues.{number}": queues}
        if store.host.mass is not None and store.host.peak is not None:
            tensors |= {f"mass.{number}": store.host.mass, f"peak.{number}": store.host.peak}
    return tensors


def scatter(state: State, stores: list[Store], places: list[tuple[int, int]], devices: list[torch.device]) -> None:
    """Fill new stores from a state.

    Raises
    ------
    CacheError
        Something in it contradicts the stores' shapes or itself.
    """
    tensors, seen = dict(state.tensors), state.description["seen"]
    for layer, (number, index) in enumerate(places):
        store = stores[number]
        shape: tuple[int, ...] = (store.batch, store.kv_heads, store.slots, state.description["model"]["head_dim"])
        keys = _take(tensors, f"keys.{layer}", shape)  # a model whose weights are quantised may have another dtype
        values = _take(tensors, f"values.{layer}", shape, keys.dtype)
        slots = store.layer(index, keys[:, :, :0].to(devices[layer]), values[:, :, :0].to(devices[layer]))
        slots.keys.copy_(keys)
        slots.values.copy_(values)
    for number, store in enumerate(stores):
        shape = tuple(store.host.positions.shape)
        store.host.positions.copy_(_take(tensors, f"positions.{number}", shape, torch.int32))
        for kind, own in (("mass", store.host.mass), ("peak", store.host.peak)):
            if own is not None:
                scores = _take(tensors, f"{kind}.{number}", shape, torch.float32)
                if not bool((scores.isfinite() & (scores >= 0)).all()):
                    raise CacheError(f"{kind}.{number} has scores that are NaN, infinite or negative")
                own.copy_(scores)
        store.ledger.restore(_take(tensors, f"queues.{number}", shape, torch.int32).contiguous(), seen)
        store.push()
    if tensors:
        raise CacheError(f"tensors {sorted(tensors)} do not belong to a session of this model and strategy")


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Remove a tensor of a shape and dtype; None: of any floating-point one."""
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise CacheError(f"tensor {name} is missing")
    right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    if tuple(tensor.shape) != shape or not right:
        accepted = "floating point" if dtype is None else dtype
        raise CacheError(f"{name} is {tensor.dtype} {list(tensor.shape)}, {accepted} {list(shape)} is accepted")
    return tensor


def write(state: State, path: str | os.PathLike[str]) -> None:
    """Write a state to a file that is whole or not there at all."""
    target = Path(path)
    metadata = {KEY: json.dumps({"version": VERSION, **state.description, "digest": state.digest()})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        save_file(tensors, name, metadata=metadata)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str], model: PreTrainedModel) -> State:
    """Read a state back and check it against its digest and the model.

    Raises
    ------
    CacheError
        The file is truncated, no session, of another version or model, or was changed; the message says which.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, UnicodeDecodeError) as error:
        raise CacheError(f"{path} is no session: it is truncated or not in safetensors' format ({error})") from error
    description = _description(path, metadata)
    digest = description.pop("digest", None)
    state = State(description, tensors)
    if digest != state.digest():
        raise CacheError(f"{path} was changed after it was saved: its digest does not fit")
    _check(path, description)
    own = asdict(Fingerprint.of(model))
    for name, value in own.items():
        saved = description["model"].get(name)
        if saved != value:
            raise CacheError(f"{path} is the session of a model with {name}={saved!r}, this one has {value!r}")
    return state


def _description(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    if KEY not in metadata:
        raise CacheError(f"{path} is a safetensors file but no session: its metadata has no entry '{KEY}'")
    try:
        description = json.loads(metadata[KEY])
    except ValueError as error:
        raise CacheError(f"{path}: the metadata entry '{KEY}' is not JSON ({error})") from error
    if not isinstance(description, dict) or description.pop("version", None) != VERSION:
        raise CacheError(f"{path} is a session in another format than version {VERSION}")
    return description


def _check(path: str | os.PathLike[str], description: dict[str, Any]) -> None:
    """Types and ranges of what is not a tensor."""

    def count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63

    spec, model, seen = (description.get(name) for name in ("spec", "model", "seen"))
    columns, evictions, slots = (description.get(name) for name in ("columns", "evictions", "slots"))
    problem = None
    if not isinstance(spec, dict) or not isinstance(spec.get("strategy"), str):
        problem = f"spec={spec!r}"
    elif not isinstance(model, dict):
        problem = f"model={model!r}"
    elif not count(columns) or not columns:
        problem = f"columns={columns!r}"
    elif not count(evictions):
        problem = f"evictions={evictions!r}"
    elif not isinstance(seen, list) or not seen or not all(count(n) and n <= columns for n in seen):
        problem = f"seen={seen!r}"
    elif not isinstance(slots, list) or not all(count(n) and n for n in slots):
        problem = f"slots={slots!r}"
    if problem:
        raise CacheError(f"{path} says {problem}, which no session does")
