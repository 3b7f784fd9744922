"""A plan: the full cache beside the bounded one."""

from liquidfusion.bench.jobs.planning import Plan
from liquidfusion.bench.terminal.output import number, table


def show_plan(plan: Plan, title: str, strategy: str) -> None:
    """Print a plan."""
    fits = {True: "yes", False: "no"}
    kept = "unbounded" if plan.budget is None else f"budget {plan.budget}"
    rows = [
        ("weights", number(plan.weight_bytes, "bytes"), number(plan.weight_bytes, "bytes")),
        ("cache", number(plan.full_cache_bytes, "bytes"), number(plan.bounded_cache_bytes, "bytes")),
        ("fits", fits[plan.full_fits], fits[plan.bounded_fits]),
        ("largest batch", number(plan.full_largest_batch), number(plan.bounded_largest_batch)),
        ("largest budget that fits", "", f"{number(plan.largest_budget)} tokens"),
        ("least time per step", _ms(plan.full_least_seconds), _ms(plan.bounded_least_seconds)),
    ]
    if plan.speedup is not None:  # nothing was measured on other devices
        rows += [
            ("time to expect", _ms(plan.full_step_seconds), _ms(plan.bounded_step_seconds)),
            ("speed-up to expect", "1", f"{plan.speedup:.2f}"),
            (
                "tokens/s at the largest batch",
                _whole(plan.full_tokens_per_second),
                _whole(plan.bounded_tokens_per_second),
            ),
        ]
    table((title, "full cache", f"{strategy}, {kept}"), rows)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else number(1000 * seconds, "ms")


def _whole(value: float | None) -> str:
    return "-" if value is None else number(round(value))
