"""``experiment``: a sweep written down in YAML."""

import types
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from liquidfusion.bench import inputs
from liquidfusion.bench import parameters as of_strategies
from liquidfusion.bench.caches import HOW
from liquidfusion.bench.models import DTYPES
from liquidfusion.bench.sweep.cells import Cell, Grid
from liquidfusion.bench.tasks import TASKS
from liquidfusion.exceptions import ConfigError

SHIPPED = Path(__file__).parent / "configs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """The keys of an experiment; ``configs/experiment.yaml`` has their defaults and says what they are."""

    models: list[str]
    strategies: list[str]
    cache_sizes: list[float]
    budgets: list[int]
    memory: list[str]
    bits: list[str]
    parameters: dict[str, Any]
    rival: list[str]
    rival_python: str
    tasks: dict[str, Any]
    device: str
    dtype: str
    jobs: int
    seed: int
    repeat: int
    output_dir: str

    def cells(self) -> list[Cell]:
        """Return the cells to measure.

        Raises
        ------
        ConfigError
            A size or a parameter is out of range.
        """
        tasks = {task: _options(task, given) for task, given in self.tasks.items()}
        own = ("tasks", "device", "jobs", "output_dir")
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        return Grid(tasks=tasks, **shared | {"rival_python": self.rival_python or None}).cells()


def _options(task: str, given: dict[str, Any] | None) -> dict[str, Any]:
    """Return a task's options, its ``prompt_file`` read."""
    options = dict(given or {})
    path, prompt = options.pop("prompt_file", None), options.pop("prompt", None)
    read = inputs.task_options(TASKS[task], {"prompt": prompt, "prompt_file": None if path is None else Path(path)})
    return options | {name: str(value) if isinstance(value, Path) else value for name, value in read.items()}


def available(directories: Sequence[Path] = ()) -> list[str]:
    """Return the names of all experiments: shipped ones and those in `directories`."""
    found = {
        str(path.relative_to(folder).with_suffix(""))
        for folder in (*directories, SHIPPED)
        for path in folder.rglob("*.yaml")
    }
    return sorted(found - {"experiment"})


def load(words: Sequence[str], directories: Sequence[Path] = ()) -> Experiment:
    """Return the experiment that ``key=value`` words describe.

    Parameters
    ----------
    words
        ``experiment=NAME`` takes ``NAME.yaml``; any other key overrides it, nested ones with dots between them. Values
        are YAML: ``budgets=[128,256]``.
    directories
        Where to look for experiments before those that are shipped.

    Raises
    ------
    ConfigError
        A file cannot be read or a key is unknown or has a value of the wrong kind; the message names key and
        accepted values.
    """
    settings = _read(SHIPPED / "experiment.yaml")
    overrides = []
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise ConfigError(f"{word!r}: key=value is accepted, such as experiment=custom/fast_test")
        if key == "experiment":
            settings |= _read(_find(value, directories))
        else:
            overrides.append((key, value))
    for key, value in overrides:
        _set(settings, key, value)
    return _checked(settings)


def _find(name: str, directories: Sequence[Path]) -> Path:
    for folder in (*directories, SHIPPED):
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    raise ConfigError(f"experiment {name!r} is unknown; accepted: {', '.join(available(directories))}")


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = "" if place is None else f", line {place.line + 1}"
        raise ConfigError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: keys and values are needed, such as seed: 1")
    return settings


def _set(settings: dict[str, Any], key: str, text: str) -> None:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}={text}: the value is not YAML") from None
    *path, last = key.split(".")
    place = settings
    for name in path:
        inner = place.get(name)
        place[name] = place = dict(inner) if isinstance(inner, dict) else {}
    place[last] = value


def _checked(settings: dict[str, Any]) -> Experiment:
    kinds = get_type_hints(Experiment)
    for key, value in settings.items():
        if key not in kinds:
            raise ConfigError(f"key {key!r} is unknown; accepted: {', '.join(kinds)}")
        settings[key] = _as(key, value, kinds[key])
    _choices("strategies", settings["strategies"], of_strategies.strategy_names())
    _choices("tasks", settings["tasks"], list(TASKS))
    _choices("dtype", [settings["dtype"]], list(DTYPES))
    _choices("parameters", settings["parameters"], [*of_strategies.table(), *HOW])
    for task, options in settings["tasks"].items():
        if not isinstance(options, dict | types.NoneType):
            raise ConfigError(f"tasks.{task}: {options!r}: options and their values are accepted")
        _choices(f"tasks.{task}", options or {}, [*TASKS[task].options(), "prompt", "prompt_file"])
    return Experiment(**settings)


def _as(key: str, value: Any, kind: Any) -> Any:
    """Return `value` if it is of the kind that `key` needs; a number passes for a list of one."""
    if get_origin(kind) is list:
        inner = get_args(kind)[0]
        items = value if isinstance(value, list) else [value]
        # a number of bits or bytes is written as a number, and means the same as text
        text = key in ("bits", "memory")
        return [_as(key, str(item) if text and isinstance(item, int) else item, inner) for item in items]
    plain = get_origin(kind) or kind
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, plain) or isinstance(value, bool):
        names = {str: "text", int: "a whole number", float: "a number", dict: "keys and values"}
        raise ConfigError(f"key {key!r}: {value!r} is not {names[plain]}")
    return value


def _choices(key: str, values: Any, accepted: list[str]) -> None:
    for value in values:
        if value not in accepted:
            raise ConfigError(f"key {key!r}: {value!r} is unknown; accepted: {', '.join(accepted)}")
