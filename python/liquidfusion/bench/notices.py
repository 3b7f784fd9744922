"""What a user should know although the work goes on: one line each, told once."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class Notice(UserWarning):
    """Something that the user asked for is not done as it was asked, or means less than it seems."""


def notice(text: str) -> None:
    """Tell the user; in Python as a warning, on the command line as a line on standard error."""
    warnings.warn(text, Notice, stacklevel=3)


@contextmanager
def as_lines() -> Iterator[None]:
    """Print each notice, and what a model costs at few bits, as one line on standard error, each text once."""
    told: set[str] = set()
    with warnings.catch_warnings():
        other = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: object) -> None:
            if not issubclass(category, Notice | RuntimeWarning):
                other(message, category, *place)  # type: ignore[arg-type]
            elif str(message) not in told:
                told.add(str(message))
                print(f"warning: {message}", file=sys.stderr, flush=True)

        warnings.simplefilter("always", Notice)
        warnings.showwarning = show  # type: ignore[assignment]
        yield
