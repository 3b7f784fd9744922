"""A decode step over codes in the Rust core, against decoding everything and plain torch in double precision."""

from typing import Any

import pytest
import torch
from torch import Tensor

from liquidfusion import _core
from liquidfusion.compute.codes import Codes, Coding, rotate
from liquidfusion.compute.softmax import visible
from liquidfusion.exceptions import ConfigError, ScoreError, TensorError

SLOTS, NOW = 50, 50


class Given:
    """Two rows of two kv heads with 50 slots; the new token stands at position 50."""

    def __init__(self, bits: tuple[int, int] = (4, 4), dims: tuple[int, int] = (64, 64), **changes: Any) -> None:
        torch.manual_seed(4)
        self.first, self.group = changes.pop("first", 3), changes.pop("group", 3)
        centred = changes.pop("centred", True)
        mu = torch.randn(2, dims[0]) if centred else None
        self.codings = Coding(bits[0], dims[0], mu), Coding(bits[1], dims[1])
        slot = torch.randint(5, SLOTS, (2, 2))
        slot[0, 0] = 1  # one of the first slots
        order = torch.stack([torch.randperm(SLOTS) for _ in range(4)]).view(2, 2, SLOTS).int()
        positions = order.masked_fill(order < 5, -1).scatter_(2, slot[..., None], NOW)
        held = [coding.encode(torch.randn(2, 2, SLOTS, dim)) for coding, dim in zip(self.codings, dims, strict=True)]
        firsts = [torch.randn(2, 2, self.first, coding.width).bfloat16() for coding in self.codings]
        self.arguments: dict[str, Any] = {
            "query": torch.randn(2, 2 * self.group, 1, dims[0]),
            "key": torch.randn(2, 2, 1, dims[0]),
            "value": torch.randn(2, 2, 1, dims[1]),
            "slot": slot,
            "position": [NOW, NOW],
            "keys": (*held[0], firsts[0] if self.first else None, bits[0]),
            "values": (*held[1], firsts[1] if self.first else None, bits[1]),
            "mu": mu,
            "positions": positions,
            "scale": 0.2,
            "window": 0,
            "chunked": False,
            "out": torch.full((2, 2 * self.group, 1, dims[1]), torch.nan),
            "scores": (torch.rand(2, 2, SLOTS), torch.rand(2, 2, SLOTS), 0.9, 0.8, 8, True),
        } | changes

    def run(self, threads: int = 1) -> dict[str, Any]:
        """Step in memory of its own."""
        own = {name: _copied(x) for name, x in self.arguments.items()}
        _core.step_coded(**own, threads=threads)
        return own

    def written(self) -> list[tuple[Codes, Tensor]]:
        """Codes and first slots of both sides after the new token was put into its slot."""
        done, at = [], self.arguments["slot"][..., None]
        for coding, side, new in zip(self.codings, ("keys", "values"), ("key", "value"), strict=True):
            codes, scales, first, _ = (_copied(x) for x in self.arguments[side])
            states = self.arguments[new]
            coded = coding.encode(states)
            codes.scatter_(2, at[..., None].expand(-1, -1, 1, codes.shape[3]), coded.codes)
            scales.scatter_(2, at, coded.scales)
            if first is not None:
                turned = coding.turned(states).bfloat16()
                for row, head in ((i, j) for i in range(2) for j in range(2)):
                    slot = int(at[row, head])
                    if slot < self.first:
                        first[row, head, slot] = turned[row, head, 0]
            done.append((Codes(codes, scales), first))
        return done


def _copied(x: Any) -> Any:
    return tuple(map(_copied, x)) if isinstance(x, tuple) else x.clone() if isinstance(x, Tensor) else x


def expected(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mass and peak."""
    a, sides, decoded = given.arguments, given.written(), []
    for coding, (codes, first) in zip(given.codings, sides, strict=True):
        turned = coding.levels(codes.codes).double() * codes.scales[..., None].double()
        if first is not None:
            turned[:, :, : given.first] = first.double()
        back = turned @ rotate(torch.eye(coding.head_dim)).T.double()
        decoded.append(back if coding.mu is None else back + coding.mu.double()[:, None])
    keys, values = decoded
    seen = visible(torch.full((2, 1), NOW), a["positions"], a["window"], a["chunked"])
    grouped = a["query"].double().view(2, 2, given.group, 1, -1)
    logits = (grouped @ keys[:, :, None].transpose(3, 4) * a["scale"]).masked_fill(~seen, -torch.inf)
    shares = logits.softmax(-1)
    output = (shares @ values[:, :, None]).view(2, 2 * given.group, 1, -1)
    mass, peak, mass_decay, peak_decay, gap, weighted = a["scores"]
    look = shares.mean(2)[:, :, 0].masked_fill(NOW - a["positions"] < gap, 0.0)
    if weighted:
        length, weight = (coding.lengths(codes) for coding, (codes, _) in zip(given.codings, sides, strict=True))
        look = look * (weight / length).masked_fill(length == 0, 0.0)
    return output, mass * mass_decay + look, torch.maximum(peak * peak_decay, look)


def check(given: Given) -> None:
    """Compare a step with what it should be, on one thread and on two."""
    one, two = given.run(), given.run(threads=2)
    for side, (codes, first) in zip(("keys", "values"), given.written(), strict=True):
        assert torch.equal(one[side][0], codes.codes)
        assert torch.equal(one[side][1], codes.scales)
        if first is not None:  # torch rotates by a product of matrices
            torch.testing.assert_close(one[side][2], first, rtol=1e-2, atol=1e-5)
    output, mass, peak = expected(given)
    torch.testing.assert_close(one["out"].double(), output, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(one["scores"][0].double(), mass, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one["scores"][1].double(), peak, rtol=1e-4, atol=1e-5)
    assert torch.equal(one["out"], two["out"])
    assert all(torch.equal(a, b) for a, b in zip(one["scores"][:2], two["scores"][:2], strict=True))


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 2), (8, 4), (4, 2)])
@pytest.mark.parametrize("dims", [(64, 64), (40, 24), (5, 3), (80, 96)])
def test_step(bits: tuple[int, int], dims: tuple[int, int]) -> None:
    """Codes are written bit for bit as elsewhere, all that is seen attends, and scores fade and gain."""
    check(Given(bits, dims))


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 16},
        {"window": 16, "chunked": True},
        {"first": 0},
        {"first": 20},
        {"centred": False},
        {"group": 1},
        {"scores": (torch.rand(2, 2, SLOTS), torch.rand(2, 2, SLOTS), 0.9, 0.8, 0, False)},
    ],
    ids=["window", "chunk", "no first", "many first", "not centred", "one query", "not weighted"],
)
def test_variants(changes: dict[str, Any]) -> None:
    check(Given(**changes))


def test_a_large_step_does_not_depend_on_threads() -> None:
    given = Given(dims=(128, 128))
    for side in ("keys", "values"):
        codes, scales, first, bits = given.arguments[side]
        given.arguments[side] = codes.repeat(1, 1, 40, 1), scales.repeat(1, 1, 40), first, bits
    given.arguments["positions"] = torch.cat(
        [given.arguments["positions"], torch.randint(-1, NOW, (2, 2, 39 * SLOTS)).int()], 2
    )
    given.arguments["scores"] = (torch.rand(2, 2, 2000), torch.rand(2, 2, 2000), 0.9, 0.8, 8, True)
    one, two = given.run(), given.run(threads=2)
    assert torch.equal(one["out"], two["out"])
    assert torch.equal(one["scores"][0], two["scores"][0])


def test_rows_are_independent() -> None:
    """A row alone comes to the same bits."""
    given = Given()
    together = given.run()
    for name, x in given.arguments.items():
        if isinstance(x, tuple):
            given.arguments[name] = tuple(y[1:] if isinstance(y, Tensor) else y for y in x)
        elif isinstance(x, Tensor) and name != "mu":
            given.arguments[name] = x[1:]
    given.arguments["position"] = [NOW]
    assert torch.equal(given.run()["out"], together["out"][1:])


def test_without_scores_it_attends_alike() -> None:
    assert torch.equal(Given().run()["out"], Given(scores=None).run()["out"])


def test_what_is_not_seen_may_be_no_number() -> None:
    """A slot beyond the window whose token overflowed, coded and among the first ones."""
    given = Given(window=10, scores=None)
    before = given.run()["out"]
    unseen = (given.arguments["positions"] >= 0) & (given.arguments["positions"] <= NOW - 10)
    for side in ("keys", "values"):
        _, scales, first, _ = given.arguments[side]
        scales.masked_fill_(unseen, torch.inf)
        first.masked_fill_(unseen[..., : given.first, None], torch.nan)
    assert torch.equal(given.run()["out"], before)


def test_a_step_that_comes_to_no_number_changes_no_score() -> None:
    given = Given()
    given.arguments["query"][1, 2] = torch.nan
    own = {name: _copied(x) for name, x in given.arguments.items()}
    with pytest.raises(ScoreError, match="probabilities"):
        _core.step_coded(**own)
    assert all(torch.equal(a, b) for a, b in zip(own["scores"][:2], given.arguments["scores"][:2], strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(2, 5, 1, 64)}, TensorError, "multiple of 2 heads, got 5"),
        ({"query": torch.zeros(2, 6, 1, 64).double()}, TensorError, "query must be float32, got float64"),
        ({"key": torch.zeros(2, 2, 1, 32)}, TensorError, "keys codes must have the shape"),
        ({"value": torch.zeros(2, 2, 1, 80)}, TensorError, "values codes must have the shape"),
        ({"slot": torch.full((2, 2), SLOTS)}, TensorError, "slot must be from 0 to 49, got 50"),
        ({"position": [NOW]}, TensorError, "position must have one entry per row, 2, got 1"),
        ({"mu": torch.zeros(3, 64)}, TensorError, "mu must have the shape"),
        ({"window": -1}, ConfigError, "window must be at least 1 token, got -1"),
        ({"positions": torch.zeros(2, 2, 49, dtype=torch.int32)}, TensorError, "keys codes must have the shape"),
        ({"out": torch.zeros(2, 6, 1, 63)}, TensorError, "out must have the shape"),
        ({"first": 51}, TensorError, "keys first must have at most 50 slots, got 51"),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = Given(**changes)
    own = {name: _copied(x) for name, x in given.arguments.items()}
    with pytest.raises(error, match=message):
        _core.step_coded(**own)
    assert torch.equal(own["keys"][0], given.arguments["keys"][0])


@pytest.mark.parametrize("part", [0, 1, 2])
def test_coded_sides_are_checked(part: int) -> None:
    given = Given()
    for side in ("keys", "values"):
        wrong = list(given.arguments[side])
        wrong[part] = wrong[part][:, :, :, :-1].contiguous() if part != 1 else wrong[part][:, :, :-1].contiguous()
        own = {name: _copied(x) for name, x in given.arguments.items()} | {side: tuple(wrong)}
        with pytest.raises(TensorError, match=f"{side} (codes|scales|first) must have the shape"):
            _core.step_coded(**own)
        wrong = [*given.arguments[side][:3], 5]
        with pytest.raises(ConfigError, match="bits must be 8, 4 or 2, got 5"):
            _core.step_coded(**(own | {side: tuple(wrong)}))


def test_shared_memory_is_refused() -> None:
    given = Given()
    codes, scales, first, bits = given.arguments["keys"]
    for changes in ({"values": (codes, scales.clone(), first.clone(), bits)}, {"out": given.arguments["query"]}):
        with pytest.raises(TensorError, match="must not share memory"):
            _core.step_coded(**(given.arguments | changes))
