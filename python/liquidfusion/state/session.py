"""A cache's state as named tensors and a description: written to a file, checked when read, or handed to a copy.

The file is in safetensors' format. Its metadata has one entry, `liquidfusion`: JSON with the format's version, the
strategy, the model's shape, the columns and tokens seen, and a digest of all the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from liquidfusion.exceptions import CacheError
from liquidfusion.geometry import Geometry
from liquidfusion.state.group import Group, Groups

KEY, VERSION = "liquidfusion", 1
SCORES = ("mass", "peak")


@dataclass(frozen=True)
class Fingerprint:
    """What of a model a session depends on."""

    architecture: str
    layers: int
    kv_heads: int | list[int]
    head_dim: int | list[int]
    value_dim: int | list[int] | None
    dtype: str
    windows: list[int]

    @classmethod
    def of(cls, geometry: Geometry) -> Fingerprint:
        """Of a model, or a process' share of it; a number for each layer only where they differ.

        `value_dim`: None where values are as wide as keys.
        """

        def alike(values: list[int]) -> int | list[int]:
            return values[0] if len(set(values)) == 1 else values

        wide = any(layer.value_dim != layer.key_dim for layer in geometry.layers)
        return cls(
            architecture=geometry.architecture,
            layers=len(geometry.layers),
            kv_heads=alike([layer.kv_heads for layer in geometry.layers]),
            head_dim=alike([layer.key_dim for layer in geometry.layers]),
            value_dim=alike([layer.value_dim for layer in geometry.layers]) if wide else None,
            dtype=geometry.dtype,
            windows=list(geometry.windows),
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


def gather(groups: Groups) -> dict[str, Tensor]:
    """Tensors of a state: the groups' own memory, and copies of their queues."""
    tensors: dict[str, Tensor] = {}
    for layer in groups.places:
        group, index = groups[layer]
        slots = group.slots[index]
        assert slots is not None
        tensors |= {f"{name}.{layer}": tensor for name, tensor in slots.tensors().items()}
    for number, group in enumerate(groups.all):
        ledger = group.ledger
        ledger.pull()
        queues = torch.empty_like(ledger.host.positions)
        ledger.core.queues(queues)
        tensors |= {f"positions.{number}": ledger.host.positions, f"queues.{number}": queues}
        if (scores := ledger.host.attention()) is not None:
            tensors |= {f"{kind}.{number}": own for kind, own in zip(SCORES, scores, strict=True)}
    return tensors


def scatter(state: State, groups: Groups, devices: Sequence[torch.device]) -> None:
    """Fill unused groups from a state.

    Parameters
    ----------
    state : State
        What was read.
    groups : Groups
        Of a new cache.
    devices : sequence of torch.device
        Where each layer attends.

    Raises
    ------
    CacheError
        Something in it contradicts the cache's shapes or itself; nothing is allocated before that is known.
    """
    tensors, told = dict(state.tensors), state.description
    if len(told["slots"]) != len(groups.all):
        raise CacheError(f"the session has {len(told['slots'])} groups of layers, this model {len(groups.all)}")
    shapes = []
    for number, group in enumerate(groups.all):
        slots = told["slots"][number] if group.spec.budget is None else group.spec.budget
        kv_heads = _of_layer(told["model"]["kv_heads"], groups.first(number))
        shapes.append((len(group.slots), len(told["seen"]), kv_heads, slots))
        _check_tensor(tensors, f"positions.{number}", shapes[-1], torch.int32)
    for number, group in enumerate(groups.all):
        group.allocate(*shapes[number][1:], devices[groups.first(number)])
        _fill(group, number, tensors, told["seen"])
    for layer in groups.places:
        device = devices[layer]
        group, index = groups[layer]
        made = _made(told, tensors, layer)
        widths = told["model"]["head_dim"], told["model"].get("value_dim") or told["model"]["head_dim"]
        keys, values = (
            torch.empty((1, group.ledger.kv_heads, 0, _of_layer(width, layer)), dtype=made, device=device)
            for width in widths
        )
        slots, _ = group.layer(index, keys, values)
        for name, own in slots.tensors().items():
            own.copy_(_take(tensors, f"{name}.{layer}", tuple(own.shape), own.dtype))
    for group in groups.all:
        group.ledger.push()
    if tensors:
        raise CacheError(f"tensors {sorted(tensors)} do not belong to a session of this model and strategy")


def check(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Refuse tensors of a state that are not of the same names, dtypes and, but for the slots, shapes as others.

    Raises
    ------
    CacheError
        Naming the tensor.
    """
    if set(tensors) != set(like):
        raise CacheError(
            f"tensors {sorted(set(tensors) ^ set(like))} are missing or do not belong to a state like this"
        )
    for name, own in like.items():
        slots = 3 if name.startswith(("positions", "queues", *SCORES)) else 2
        shape = [*own.shape]
        shape[slots] = tensors[name].shape[slots] if tensors[name].dim() > slots else 0
        _check_tensor(tensors, name, tuple(shape), own.dtype)


def refill(state: Mapping[str, Tensor], seen: list[int], groups: Groups) -> None:
    """Fill groups in use from a state's tensors, which stay as they are; an unbounded group may have more slots."""
    tensors = dict(state)
    for number, group in enumerate(groups.all):
        for name in (f"positions.{number}", *(f"{kind}.{number}" for kind in SCORES)):
            if name in tensors:
                tensors[name] = _wider(tensors[name], group.ledger.slots, -1 if name.startswith("positions") else 0)
        if group.spec.budget is None:
            # Every slot that is empty may be written next.
            empty = tensors[f"positions.{number}"] < 0
            order = empty.logical_not().to(torch.uint8).argsort(stable=True, dim=-1).int()
            there = torch.arange(order.shape[-1], device="cpu") < empty.sum(-1, keepdim=True)
            tensors[f"queues.{number}"] = order.where(there, -1).contiguous()
        _fill(group, number, tensors, seen)
    owns, kepts = [], []
    for layer in groups.places:
        group, index = groups[layer]
        slots = group.slots[index]
        assert slots is not None
        for name, own in slots.tensors().items():
            kept = tensors[f"{name}.{layer}"]
            owns.append(own[:, :, : kept.shape[2]])
            kepts.append(kept)
    # One call for all: hundreds of copies would hold up whoever waits for the next decode step.
    torch._foreach_copy_(owns, kepts, non_blocking=True)
    for group in groups.all:
        group.ledger.push()


def _wider(tensor: Tensor, slots: int, value: int) -> Tensor:
    if tensor.shape[-1] == slots:
        return tensor
    return torch.nn.functional.pad(tensor, (0, slots - tensor.shape[-1]), value=value)


def _fill(group: Group, number: int, tensors: dict[str, Tensor], seen: list[int]) -> None:
    """Take over positions, scores and queues of one group."""
    ledger = group.ledger
    shape = ledger.shape
    ledger.host.positions.copy_(tensors.pop(f"positions.{number}"))
    for kind, own in zip(SCORES, ledger.host.attention() or (), strict=False):
        scores = _take(tensors, f"{kind}.{number}", shape, torch.float32)
        least, most = scores.aminmax()  # NaN comes through
        if not 0 <= least <= most < torch.inf:
            raise CacheError(f"{kind}.{number} has scores that are NaN, infinite or negative")
        own.copy_(scores)
    ledger.core.restore(_take(tensors, f"queues.{number}", shape, torch.int32).contiguous(), seen)


def _made(told: Mapping[str, Any], tensors: Mapping[str, Tensor], layer: int) -> torch.dtype:
    """The dtype in which the model made a layer's keys, which quantised weights do not tell."""
    if "made" in told:
        made = getattr(torch, str(told["made"]), None)
        if not isinstance(made, torch.dtype) or not made.is_floating_point:
            raise CacheError(f"the session says made={told['made']!r}; a floating point dtype is accepted")
        return made
    keys = tensors.get(f"keys.{layer}")
    if keys is None:
        raise CacheError(f"tensor keys.{layer} is missing")
    if not keys.is_floating_point():
        raise CacheError(f"keys.{layer} is {keys.dtype} {list(keys.shape)}, floating point is accepted")
    return keys.dtype


def _of_layer(told: Any, layer: int) -> int:
    return int(told[layer] if isinstance(told, list) else told)


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Remove a tensor of a shape and dtype; None: of any floating-point one."""
    tensor = _check_tensor(tensors, name, shape, dtype)
    del tensors[name]
    return tensor


def _check_tensor(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    tensor = tensors.get(name)
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


def read(path: str | os.PathLike[str], geometry: Geometry) -> State:
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
    own = asdict(Fingerprint.of(geometry))
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
    offsets = description.get("offsets", [])
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
    elif not isinstance(offsets, list) or (offsets and len(offsets) != len(seen)) or not all(map(count, offsets)):
        problem = f"offsets={offsets!r}"
    elif not isinstance(slots, list) or not all(count(n) and n for n in slots):
        problem = f"slots={slots!r}"
    if problem:
        raise CacheError(f"{path} says {problem}, which no session does")
