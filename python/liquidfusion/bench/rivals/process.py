"""A rival in a process of its own: started once for a model, spoken to in lines of JSON, gone with this process."""

import atexit
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from liquidfusion.exceptions import LiquidFusionError

_PROGRAM = Path(__file__).with_name("kvpress_child.py")


class RivalError(LiquidFusionError):
    """A rival cannot be started, or died; the message says why and what to do."""


class Process:
    """The program that answers with kvpress' presses, with one model loaded.

    Parameters
    ----------
    python
        The interpreter of an environment that has kvpress and the transformers it needs.
    model, dtype, device
        A directory or hub id, the name of a torch dtype, and a torch device.
    threads
        Threads of torch on a CPU: as many as the methods of this process have.

    Raises
    ------
    RivalError
        The interpreter cannot be started, or has no kvpress.
    """

    def __init__(self, python: str, model: str, dtype: str, device: str, threads: int) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf8")  # noqa: SIM115 - as long as the process
        # The modules that this interpreter was told to look at are those that the other one must not see.
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            self._process = subprocess.Popen(
                [python, str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                text=True,
                encoding="utf8",
            )
        except OSError as error:
            self._errors.close()
            raise RivalError(f"the rivals' interpreter {python} cannot be started: {error.strerror}") from error
        try:
            started = self._ask(model=model, dtype=dtype, device=device, threads=threads)
            self.versions = {name: str(value) for name, value in started.items()}
        except RivalError:
            self.close()
            raise

    def answers(self, **job: Any) -> list[dict[str, Any]]:
        """Return what the program makes of a job; see :meth:`kvpress_child.Answerer.run`.

        Raises
        ------
        RivalError
            The press failed, or the process died.
        """
        found: list[dict[str, Any]] = self._ask(**job)["answers"]
        return found

    def _ask(self, **message: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:  # both are pipes; for the type checker
            raise RivalError("the rivals' process has no pipes")
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
            line = stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if not line:
            _KEPT.clear()  # another question starts another process
            self._errors.seek(0)
            last = [text.strip() for text in self._errors.read().splitlines() if text.strip()][-1:]
            raise RivalError(f"the rivals' process died: {last[0] if last else 'it said nothing'}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RivalError(f"kvpress: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


_KEPT: dict[tuple[object, ...], Process] = {}


def process(python: str, model: str, dtype: str, device: str, threads: int) -> Process:
    """Return the process for a model, started on first use; it ends with this one or for another model."""
    key = (python, model, dtype, device, threads)
    if key not in _KEPT:
        end()
        _KEPT[key] = Process(python, model, dtype, device, threads)
    return _KEPT[key]


@atexit.register
def end() -> None:
    """End the process that is kept, if there is one."""
    while _KEPT:
        _KEPT.popitem()[1].close()
