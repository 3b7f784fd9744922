"""The table of docs/models.md: every language model class of the installed transformers, small, with a KVCache.

`python tests/classes/table.py` looks at all of them and compares with what was recorded; `--write` records each as it
ends and renews the table; `--new` looks at those that the record has not; names choose some. A class that was served
and now answers otherwise fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD = HERE / "table.json"
PAGE = HERE.parents[1] / "docs" / "models.md"
MARKS = "<!-- classes: begin -->\n", "<!-- classes: end -->"
"""What stands between them on the page is written here."""
SECONDS = 60
"""Processor time given to a class."""
PATIENCE = 10
"""How many times as long it may take by the clock, on a machine with other work."""

sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("TRITON_INTERPRET", "0")


def main() -> int:
    """Look, compare, and write if told to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types, with or without a variant; default: all")
    parser.add_argument(
        "--write", action="store_true", help="record each outcome and renew the table in docs/models.md"
    )
    parser.add_argument("--new", action="store_true", help="look only at classes without a recorded outcome")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of a class in seconds of processor time")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    # What is imported now need not be in each process.
    import transformers.models.llama.modeling_llama  # noqa: F401

    from classes import families, probe
    from liquidfusion.hf import cache  # noqa: F401

    record = recorded()
    named = [
        case for case in families.cases()
        if not chosen.names or {case.name, case.name.split("#")[0]} & set(chosen.names)
    ]  # fmt: skip
    if not named:
        parser.error(f"no class is called {chosen.names}")
    worse, outcomes = [], {}
    try:
        for case in named:
            if chosen.new and case.key in record:
                continue
            start = time.monotonic()
            outcome = outcomes[case.key] = forked(probe.probe, case, chosen.seconds)
            before = record.get(case.key, {}).get("status", "new")
            changed = "" if before == outcome["status"] else f"  [was: {before}]"
            print(f"{probe.Outcome(**outcome)}  {time.monotonic() - start:.1f} s{changed}", flush=True)
            if outcome["status"] in (probe.WRONG, probe.CRASHED) or (
                before == probe.WORKS and outcome["status"] != probe.WORKS
            ):
                worse.append(case.key)
            if chosen.write:  # at once, so that a run that is interrupted can go on with --new
                keep(record | outcomes)
    except KeyboardInterrupt:
        print("interrupted; --new goes on with the rest")
        worse.append("not all were looked at")
    summary(list(outcomes.values()))
    if chosen.write:
        page, begin, end = PAGE.read_text(), *MARKS
        before, _, rest = page.partition(begin)
        PAGE.write_text(before + begin + rendered(recorded()) + end + rest.partition(end)[2])
    if worse:
        print(f"wrong, crashed, or no longer served: {', '.join(worse)}")
    return int(bool(worse))


def recorded() -> dict[str, dict[str, Any]]:
    """Outcomes on record, by `Case.key`; none if there is no record."""
    return dict(json.loads(RECORD.read_text())["classes"]) if RECORD.exists() else {}


def waiting() -> list[str]:
    """Classes that nobody has looked at yet, by `Case.key`."""
    return list(json.loads(RECORD.read_text())["waiting"]) if RECORD.exists() else []


def keep(outcomes: dict[str, dict[str, Any]]) -> None:
    """Write the record, and which classes it has not."""
    import transformers

    from classes.families import cases

    record = {
        "transformers": transformers.__version__,
        "waiting": sorted(case.key for case in cases() if case.key not in outcomes),
        "classes": dict(sorted(outcomes.items())),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def summary(outcomes: list[dict[str, Any]]) -> None:
    """Counts, of those that transformers itself can run."""
    for name, group in (
        ("causal", [o for o in outcomes if not o["multimodal"]]),
        ("multimodal", [o for o in outcomes if o["multimodal"]]),
        ("all", outcomes),
    ):
        counts = Counter(outcome["status"] for outcome in group)
        able = len(group) - counts["HF fails"]
        shares = {status: f"{n} ({n / able:.0%})" for status, n in counts.most_common() if status != "HF fails"}
        print(f"{name}: {len(group)}, of which transformers runs {able}: {shares}")


def rendered(record: dict[str, dict[str, Any]]) -> str:
    """The outcomes as a part of a Markdown page."""
    import transformers

    def listed(outcomes: list[dict[str, Any]]) -> str:
        return ", ".join(f"`{name}`" for name in sorted({outcome["name"] for outcome in outcomes}, key=str.lower))

    outcomes = list(record.values())
    able = [outcome for outcome in outcomes if outcome["status"] != "HF fails"]
    served = [outcome for outcome in able if outcome["status"] == "works"]
    why: dict[str, list[dict[str, Any]]] = {}
    for outcome in able:
        if outcome not in served:
            reason = (
                outcome["reason"].split(": ", 1)[-1].removeprefix(f"{outcome['kind']} ").split("; call the model")[0]
            )
            why.setdefault(reason.replace("|", "\\|"), []).append(outcome)
    rows = "".join(f"| {reason} | {listed(group)} |\n" for reason, group in sorted(why.items()))
    later = [key.split("/")[0] for key in waiting()]
    still = ", ".join(f"`{name}`" for name in sorted(set(later), key=str.lower))
    return (
        f"\nOf transformers {transformers.__version__}'s classes {len(able)} run small from a generic configuration, "
        f"counting variants; {len(served)} are served ({len(served) / len(able):.0%}). By `model_type`, causal and "
        f"multimodal classes of one type together, a variant after `#`:\n\n{listed(served)}.\n\n"
        f"| refused, since it | classes |\n|---|---|\n{rows}\n"
        f"Not looked at, since such a configuration does not run by itself: "
        f"{listed([outcome for outcome in outcomes if outcome['status'] == 'HF fails'])}.\n\n"
        + (f"On no record yet, so not counted above ({len(later)}): {still}.\n\n" if later else "")
    )


def forked(function: Any, case: Any, seconds: int) -> dict[str, Any]:
    """A function's result from a process of its own, which may not take longer or tear this one down."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(read)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            signal.alarm(PATIENCE * seconds)
            os.write(write, json.dumps(function(case)).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if answer:
        return dict(json.loads(answer))
    reason = (
        f"took longer than {seconds} s" if status in (signal.SIGALRM, signal.SIGPROF) else f"ended with status {status}"
    )
    return {"name": case.name, "kind": case.kind, "multimodal": case.multimodal, "status": "crashed", "reason": reason}


if __name__ == "__main__":
    sys.exit(main())
