"""The Rust core: every decision of LiquidFusion, on zero-copy views of CPU tensors."""

from collections.abc import Iterable
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypeAlias, TypedDict, final

__all__ = [
    "Ledger",
    "Spec",
    "__version__",
    "accumulate",
    "budget_from_percent",
    "build_info",
    "code_logits",
    "code_outputs",
    "code_squares",
    "encode",
    "parameters",
    "softmax",
    "step",
    "step_coded",
    "strategies",
]

__version__: str

class _StrategyInfo(TypedDict):
    name: str
    summary: str
    paper: str
    parameters: list[str]
    defaults: dict[str, Any]

class _ParameterInfo(TypedDict):
    name: str
    kind: Literal["int", "float", "bool", "choice"]
    least: float | None
    most: float | None
    open_low: bool
    choices: list[str]
    help: str

class _BuildInfo(TypedDict):
    version: str
    profile: str
    target: str
    simd: str

# Anything that exports DLPack from CPU memory, pinned or not: torch tensors, numpy arrays.
_Tensor: TypeAlias = Any

def parameters() -> list[_ParameterInfo]: ...
def strategies() -> list[_StrategyInfo]: ...
def budget_from_percent(percent: SupportsFloat, prompt_tokens: SupportsIndex, sink_size: SupportsIndex) -> int: ...
def build_info() -> _BuildInfo: ...
def accumulate(
    probabilities: _Tensor,
    ages: _Tensor,
    elapsed: Iterable[SupportsIndex],
    mass: _Tensor,
    peak: _Tensor,
    mass_decay: SupportsFloat,
    peak_decay: SupportsFloat,
    *,
    weights: _Tensor | None = None,
    threads: SupportsIndex | None = None,
) -> None: ...
def softmax(
    products: _Tensor,
    queries: _Tensor,
    columns: _Tensor,
    scale: SupportsFloat,
    window: SupportsIndex,
    chunked: bool,
    *,
    threads: SupportsIndex | None = None,
) -> None: ...
def step(
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    slot: _Tensor,
    position: Iterable[SupportsIndex],
    keys: _Tensor,
    values: _Tensor,
    positions: _Tensor,
    scale: SupportsFloat,
    window: SupportsIndex,
    chunked: bool,
    out: _Tensor,
    scores: tuple[_Tensor, _Tensor, SupportsFloat, SupportsFloat, SupportsIndex, bool] | None = None,
    *,
    threads: SupportsIndex | None = None,
) -> None: ...
def step_coded(
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    slot: _Tensor,
    position: Iterable[SupportsIndex],
    keys: tuple[_Tensor, _Tensor, _Tensor | None, SupportsIndex],
    values: tuple[_Tensor, _Tensor, _Tensor | None, SupportsIndex],
    mu: _Tensor | None,
    positions: _Tensor,
    scale: SupportsFloat,
    window: SupportsIndex,
    chunked: bool,
    out: _Tensor,
    scores: tuple[_Tensor, _Tensor, SupportsFloat, SupportsFloat, SupportsIndex, bool] | None = None,
    *,
    threads: SupportsIndex | None = None,
) -> None: ...
def encode(
    states: _Tensor,
    mu: _Tensor | None,
    bits: SupportsIndex,
    codes: _Tensor,
    scales: _Tensor,
    *,
    threads: SupportsIndex | None = None,
) -> None: ...
def code_logits(
    query: _Tensor,
    codes: _Tensor,
    scales: _Tensor,
    bits: SupportsIndex,
    out: _Tensor,
    *,
    threads: SupportsIndex | None = None,
) -> None: ...
def code_outputs(
    probabilities: _Tensor,
    codes: _Tensor,
    scales: _Tensor,
    bits: SupportsIndex,
    out: _Tensor,
    *,
    threads: SupportsIndex | None = None,
) -> None: ...
def code_squares(
    codes: _Tensor, scales: _Tensor, bits: SupportsIndex, out: _Tensor, *, threads: SupportsIndex | None = None
) -> None: ...

@final
class Spec:
    def __new__(
        cls,
        strategy: str,
        budget: SupportsIndex | None = None,
        **parameters: SupportsIndex | SupportsFloat | str | None,
    ) -> Spec: ...
    @property
    def strategy(self) -> str: ...
    @property
    def budget(self) -> int | None: ...
    @property
    def interval(self) -> int: ...
    @property
    def mass_decay(self) -> float: ...
    @property
    def peak_decay(self) -> float: ...
    @property
    def scored(self) -> bool: ...
    @property
    def distinct(self) -> bool: ...
    @property
    def bounded(self) -> bool: ...
    @property
    def value_weighted(self) -> bool: ...
    @property
    def look_gap(self) -> int: ...
    @property
    def peak_reach(self) -> int | None: ...
    @property
    def averaged(self) -> bool: ...
    @property
    def params(self) -> dict[str, Any]: ...
    def split(self, keep: SupportsIndex) -> tuple[int, int, int, int]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]: ...

@final
class Ledger:
    def __new__(
        cls,
        spec: Spec,
        positions: _Tensor,
        mass: _Tensor | None,
        peak: _Tensor | None,
        *,
        threads: SupportsIndex | None = None,
    ) -> Ledger: ...
    def begin(
        self, lengths: Iterable[SupportsIndex], slots: _Tensor, rows: Iterable[SupportsIndex] | None = None
    ) -> None: ...
    def chunk(
        self,
        layer: SupportsIndex,
        columns: _Tensor,
        mass: _Tensor | None,
        peak: _Tensor | None,
        source: _Tensor,
        distinct: _Tensor | None = None,
    ) -> None: ...
    def finish(self, distinct: _Tensor | None = None) -> int: ...
    def peek(
        self, out: _Tensor, skip: Iterable[SupportsIndex], rows: Iterable[SupportsIndex] | None = None
    ) -> None: ...
    def due(self) -> list[int]: ...
    def queue_lengths(self) -> list[int]: ...
    def queues(self, out: _Tensor, rows: Iterable[SupportsIndex] | None = None) -> None: ...
    def restore(
        self, queues: _Tensor, seen: Iterable[SupportsIndex], rows: Iterable[SupportsIndex] | None = None
    ) -> None: ...
    def advance(self, steps: Iterable[SupportsIndex], rows: Iterable[SupportsIndex] | None = None) -> None: ...
    def release(self, row: SupportsIndex) -> None: ...
    def copy_row(self, source: SupportsIndex, target: SupportsIndex) -> None: ...
    def reorder(self, rows: Iterable[SupportsIndex]) -> None: ...
    def grow(self, positions: _Tensor, mass: _Tensor | None, peak: _Tensor | None) -> None: ...
    def reset(self) -> None: ...
    @property
    def seen(self) -> list[int]: ...
    @property
    def evictions(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
