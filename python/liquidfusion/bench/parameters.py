"""The parameters of the strategies, as the core's one table has them; imports neither torch nor transformers."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from liquidfusion import _core
from liquidfusion.exceptions import ConfigError

KINDS: dict[str, type] = {"int": int, "float": float, "bool": bool, "choice": str}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter that a strategy may listen to.

    Attributes
    ----------
    kind
        ``"int"``, ``"float"``, ``"bool"`` or ``"choice"``.
    least, most, open_low
        The range of a number; with `open_low` the least itself is excluded.
    choices
        What a choice may be.
    help
        One sentence for users.
    """

    name: str
    kind: str
    least: float | None = None
    most: float | None = None
    open_low: bool = False
    choices: tuple[str, ...] = ()
    help: str = ""

    @property
    def type(self) -> type:
        """The type of its values."""
        return KINDS[self.kind]

    def check(self, value: Any) -> None:
        """Refuse a value of another kind or out of range.

        Raises
        ------
        ConfigError
            The message names the parameter, the value and what is accepted.
        """
        if self.kind == "choice":
            right, accepted = value in self.choices, ", ".join(self.choices)
        elif self.kind == "bool":
            right, accepted = isinstance(value, bool), "true or false"
        else:
            kinds = int if self.kind == "int" else (int, float)
            right = isinstance(value, kinds) and not isinstance(value, bool)
            right = right and (self.least is None or (value > self.least if self.open_low else value >= self.least))
            right = right and (self.most is None or value <= self.most)
            number = "a whole number" if self.kind == "int" else "a number"
            low = "" if self.least is None else f" {'above' if self.open_low else 'from'} {self.least:g}"
            accepted = f"{number}{low}{'' if self.most is None else f' to {self.most:g}'}"
        if not right:
            raise ConfigError(f"{self.name} {value!r}: {accepted} is accepted")


@cache
def table() -> dict[str, Parameter]:
    """Return name → parameter, in the order in which they are shown."""
    rows: list[dict[str, Any]] = [dict(row) for row in _core.parameters()]
    return {row["name"]: Parameter(**row | {"choices": tuple(row["choices"])}) for row in rows}


@cache
def _listeners() -> dict[str, frozenset[str]]:
    return {entry["name"]: frozenset(entry["parameters"]) for entry in _core.strategies()}


def strategy_names() -> list[str]:
    """Return the name of every strategy the core registers, in its order."""
    return list(_listeners())


def listens(strategy: str) -> frozenset[str]:
    """Return the names of the parameters that a strategy listens to.

    Raises
    ------
    ConfigError
        There is no such strategy; the message lists them.
    """
    if strategy not in _listeners():
        raise ConfigError(f"strategy {strategy!r} is unknown; accepted: {', '.join(_listeners())}")
    return _listeners()[strategy]


def defaults(strategy: str) -> dict[str, Any]:
    """Return name → the strategy's own value of what it listens to."""
    return next(dict(entry["defaults"]) for entry in _core.strategies() if entry["name"] == strategy)
