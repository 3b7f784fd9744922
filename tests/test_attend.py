"""Attention in the Rust core, and the looks of a block of queries, against plain torch in double precision."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from liquidfusion import _core
from liquidfusion.compute import looks
from liquidfusion.compute.looks import Block, Rule
from liquidfusion.compute.softmax import How, Positions, attend, visible
from liquidfusion.exceptions import ConfigError, ScoreError, TensorError


def placed(batch: int, heads: int, slots: int, empty: int) -> Tensor:
    """Positions in any order, the first ones gone."""
    positions = torch.stack([torch.randperm(slots) for _ in range(batch * heads)]).view(batch, heads, slots).int()
    return positions.masked_fill(positions < empty, -1)


@pytest.mark.parametrize(("window", "chunked"), [(0, False), (16, False), (16, True)])
@pytest.mark.parametrize("kinds", [1, 2])
def test_softmax(window: int, chunked: bool, kinds: int) -> None:
    """Empty slots, windows, padding, and queries that see nothing."""
    torch.manual_seed(0)
    products, columns = torch.randn(2, 2, 3, 5, 37) * 10, placed(2, kinds, 37, 4)
    queries = torch.tensor([[-1, 3, 4, 20, 40], [0, 5, 11, 16, 36]], dtype=torch.int32)
    seen = visible(queries, columns, window, chunked)
    logits = (products.double() * 0.3).masked_fill(~seen, -torch.inf)
    expected = logits.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    for threads in (1, 2):
        found = products.clone()
        _core.softmax(found, queries, columns, 0.3, window, chunked, threads=threads)
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-9)


def test_a_large_softmax_does_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    products, columns = torch.randn(1, 3, 3, 16, 4096), torch.arange(4096, dtype=torch.int32)[None, None]
    queries = torch.arange(4080, 4096, dtype=torch.int32)[None]
    one, two = products.clone(), products.clone()
    _core.softmax(one, queries, columns, 1.0, 0, False, threads=1)
    _core.softmax(two, queries, columns, 1.0, 0, False, threads=2)
    assert torch.equal(one, two)


def test_products_that_are_no_numbers_stay_so() -> None:
    """A score that comes of them is refused later, by its name."""
    products = torch.tensor([[0.0, torch.nan, 1.0], [0.0, torch.inf, 1.0]]).view(1, 1, 1, 2, 3)
    _core.softmax(
        products, torch.full((1, 2), 5, dtype=torch.int32), torch.zeros(1, 1, 3, dtype=torch.int32), 1, 0, False
    )
    assert bool(products.isnan().any(-1).all())


def decoded(
    dtype: torch.dtype = torch.float32, batch: int = 2, group: int = 3, dims: tuple[int, int] = (64, 64), **changes: Any
) -> dict[str, Any]:
    """Arguments of a decode step: two kv heads, 50 slots, the new token at position 50."""
    torch.manual_seed(4)
    key_dim, value_dim = dims
    slot, positions = torch.randint(0, 50, (batch, 2)), placed(batch, 2, 50, 5)
    positions.scatter_(2, slot[..., None], 50)
    return {
        "query": torch.randn(batch, 2 * group, 1, key_dim).to(dtype),
        "key": torch.randn(batch, 2, 1, key_dim).to(dtype),
        "value": torch.randn(batch, 2, 1, value_dim).to(dtype),
        "slot": slot,
        "position": [50] * batch,
        "keys": torch.randn(batch, 2, 50, key_dim).to(dtype),
        "values": torch.randn(batch, 2, 50, value_dim).to(dtype),
        "positions": positions,
        "scale": 0.2,
        "window": 0,
        "chunked": False,
        "out": torch.full((batch, 2 * group, 1, value_dim), torch.nan, dtype=dtype),
        "scores": (torch.rand(batch, 2, 50), torch.rand(batch, 2, 50), 0.9, 0.8, 8, True),
    } | changes


def copied(given: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in memory of their own."""
    own = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}
    if given["scores"] is not None:
        own["scores"] = tuple(x.clone() if isinstance(x, Tensor) else x for x in given["scores"])
    return own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dims", [(64, 64), (24, 40), (5, 3)])
@pytest.mark.parametrize(("window", "chunked", "weighted"), [(0, False, True), (16, False, False), (16, True, True)])
def test_step(
    dtype: torch.dtype, group: int, dims: tuple[int, int], window: int, chunked: bool, weighted: bool
) -> None:
    """Key and value are written, all that is seen attends, and scores fade and gain."""
    given = decoded(dtype, 2, group, dims, window=window, chunked=chunked)
    given["scores"] = (*given["scores"][:5], weighted)
    keys, values, at = given["keys"].clone(), given["values"].clone(), given["slot"][..., None, None]
    keys.scatter_(2, at.expand(-1, -1, 1, dims[0]), given["key"])
    values.scatter_(2, at.expand(-1, -1, 1, dims[1]), given["value"])
    positions = given["positions"]
    seen = visible(torch.full((2, 1), 50), positions, window, chunked)
    grouped = given["query"].double().view(2, 2, group, 1, dims[0])
    logits = (grouped @ keys.double()[:, :, None].transpose(3, 4) * 0.2).masked_fill(~seen, -torch.inf)
    shares = logits.softmax(-1)
    output = (shares @ values.double()[:, :, None]).view(2, 2 * group, 1, dims[1])
    look = shares.mean(2)[:, :, 0].masked_fill(50 - positions < 8, 0.0)
    if weighted:
        look = look * looks.look_weights(keys, values)
    mass, peak = given["scores"][0] * 0.9 + look, torch.maximum(given["scores"][1] * 0.8, look)
    runs = []
    for threads in (1, 2):
        own = copied(given)
        _core.step(**own, threads=threads)
        assert torch.equal(own["keys"], keys)
        assert torch.equal(own["values"], values)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(own["out"].double(), output, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(own["scores"][0].double(), mass, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own["scores"][1].double(), peak, rtol=1e-5, atol=1e-6)
        runs.append(own)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in ("out", "keys", "values"))
    assert all(torch.equal(a, b) for a, b in zip(runs[0]["scores"][:2], runs[1]["scores"][:2], strict=True))


def test_a_large_step_does_not_depend_on_threads() -> None:
    given = decoded(batch=8, group=2, dims=(128, 128))
    given |= {name: given[name].repeat(1, 1, 20, 1) for name in ("keys", "values")}
    given["positions"] = torch.cat([given["positions"] - 50 * i for i in range(20)], 2).clamp(min=-1)
    given["scores"] = (torch.rand(8, 2, 1000), torch.rand(8, 2, 1000), 0.9, 0.8, 8, True)
    one, two = copied(given), copied(given)
    _core.step(**one, threads=1)
    _core.step(**two, threads=2)
    assert torch.equal(one["out"], two["out"])
    assert torch.equal(one["scores"][0], two["scores"][0])


def test_a_step_without_scores_attends_alike() -> None:
    scored, plain = decoded(), decoded(scores=None)
    _core.step(**scored)
    _core.step(**plain)
    assert torch.equal(scored["out"], plain["out"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(2, 5, 1, 64)}, TensorError, "multiple of 2 heads, got 5"),
        ({"key": torch.zeros(2, 2, 1, 63)}, TensorError, "key must have the shape"),
        ({"value": torch.zeros(2, 2, 2, 64)}, TensorError, "value must have the shape"),
        ({"slot": torch.full((2, 2), 50)}, TensorError, "slot must be from 0 to 49, got 50"),
        ({"slot": torch.full((2, 2), -1)}, TensorError, "slot must be from 0 to 49, got -1"),
        ({"position": [50]}, TensorError, "position must have one entry per row, 2, got 1"),
        ({"position": [2**31, 0]}, ConfigError, "position must be from 0 to 2147483647"),
        ({"window": -1}, ConfigError, "window must be at least 1 token, got -1"),
        ({"keys": torch.zeros(2, 2, 50, 64).half()}, TensorError, "keys must be float32 or bfloat16, got float16"),
        ({"values": torch.zeros(2, 2, 50, 64).bfloat16()}, TensorError, "values must be float32, got bfloat16"),
        ({"values": torch.zeros(2, 2, 64, 50).transpose(2, 3)}, TensorError, "values must be C-contiguous"),
        ({"positions": torch.zeros(2, 2, 49, dtype=torch.int32)}, TensorError, "positions must have the shape"),
        ({"chunked": "no"}, ConfigError, "chunked must be True or False"),
    ],
)
def test_a_step_checks_its_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = decoded(**changes)
    before = given["keys"].clone()
    with pytest.raises(error, match=message):
        _core.step(**given)
    assert torch.equal(given["keys"], before)


@pytest.mark.parametrize(("written", "read"), [("out", "query"), ("keys", "values"), ("keys", "query")])
def test_a_step_refuses_shared_memory(written: str, read: str) -> None:
    given = decoded()
    same = torch.zeros(2, 2, 50, 64)
    given[written] = same if written == "keys" else given["query"]
    given[read] = same if read == "values" else given[written].flatten()[: 2 * 6 * 64].view(2, 6, 1, 64)
    with pytest.raises(TensorError, match="must not share memory"):
        _core.step(**given)


def test_a_step_that_comes_to_no_number_changes_no_score() -> None:
    given = decoded()
    given["query"][1, 2] = torch.nan
    mass, peak = (x.clone() for x in given["scores"][:2])
    with pytest.raises(ScoreError, match="probabilities"):
        _core.step(**given)
    assert torch.equal(given["scores"][0], mass)
    assert torch.equal(given["scores"][1], peak)


@pytest.mark.parametrize("start", [0, 3, 12, 30])
@pytest.mark.parametrize("stored", [0, 20])
@pytest.mark.parametrize("reach", [None, 6, 100])
def test_columns_are_left_out_alike(start: int, stored: int, reach: int | None) -> None:
    """Knowing how far a column is from the queries saves work and changes no bit of mass and peak."""
    torch.manual_seed(start)
    first, queries = 50, 8
    end = stored + start + queries
    new = torch.arange(first, first + start + queries, dtype=torch.int32)[None, None].expand(1, 2, -1)
    old = torch.stack([torch.randperm(first)[:stored] for _ in range(2)]).view(1, 2, stored).int()
    rule = Rule(0.99, 0.95, 4, reach, value_weighted=True)
    block = Block(
        torch.arange(first + start, first + start + queries, dtype=torch.int32)[None],
        torch.cat((old, new), 2),
        torch.arange(queries - 1, -1, -1, dtype=torch.int32)[None],
        [0] if start else [40],
        [first],
        40,
        torch.rand(1, 2, end),
        stored,
        start,
    )
    shares = torch.rand(1, 2, 3, queries, end).softmax(-1)
    scores = torch.rand(2, 1, 2, end + 5)
    scores[:, ..., stored + start :] = 0.0
    found = []
    for told in (block, replace(block, rank=None)):
        mass, peak = scores.clone().unbind()
        looks.observe(shares.clone(), told, rule, mass, peak)
        found.append((mass, peak))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("softcap", "sinks"), [*itertools.product([0.0, 5.0], [False, True])])
def test_positions_say_what_a_mask_says(softcap: float, sinks: bool) -> None:
    torch.manual_seed(2)
    query, keys, values = torch.randn(2, 6, 5, 16), torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    how = How(0.25, 12, softcap, torch.randn(6) if sinks else None)
    told = Positions(torch.tensor([[30, 31, 32, 33, 34], [-1, 1, 2, 3, 4]], dtype=torch.int32), placed(2, 3, 40, 2))
    for watched in (True, False):
        shares: list[list[Tensor]] = [[], []]
        outputs = [
            attend(query, keys, values, mask, how, (lambda x, kept=kept: kept.append(x)) if watched else None)
            for mask, kept in zip((told, visible(*told, how.window)), shares, strict=True)
        ]
        torch.testing.assert_close(outputs[0], outputs[1])
        for a, b in zip(*shares, strict=True):
            torch.testing.assert_close(a, b)
