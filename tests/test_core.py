"""The bindings: shared memory, every refusal typed and without effect, the GIL released, state saved and moved."""

import copy
import math
import pickle
import threading
import time

import numpy as np
import pytest
import torch

from liquidfusion import _core
from liquidfusion.compute import looks
from liquidfusion.exceptions import CacheError, ConfigError, ScoreError, TensorError

LAYERS, BATCH, HEADS, SLOTS = 2, 3, 2, 32
SHAPE = (LAYERS, BATCH, HEADS, SLOTS)


def tensors(shape: tuple[int, ...] = SHAPE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape), torch.zeros(shape)


def slots_out() -> torch.Tensor:
    return torch.full(SHAPE[:3], -7, dtype=torch.int64)


@pytest.fixture
def ledger() -> tuple[_core.Ledger, torch.Tensor, torch.Tensor, torch.Tensor]:
    bound = tensors()
    return _core.Ledger(_core.Spec("h2o", SLOTS, eviction_interval=2), *bound), *bound


def decode(core: _core.Ledger, steps: int, mass: torch.Tensor | None = None) -> None:
    out = slots_out()
    for step in range(steps):
        core.begin([1] * BATCH, out)
        if mass is not None:
            mass += torch.rand(mass.shape, generator=torch.Generator().manual_seed(step))
        core.finish()


def test_memory_is_shared_both_ways(ledger):
    core, positions, mass, _ = ledger
    out = slots_out()
    mass.fill_(3.0)
    core.begin([1, 1, 1], out)
    assert (out == 0).all()
    assert (positions[..., 0] == 0).all(), "what Rust writes is seen in torch"
    assert (mass[..., 0] == 0).all()
    core.finish()
    decode(core, SLOTS - 2)
    core.begin([1, 1, 1], out)
    mass[0, 0, 0, 5] = math.nan
    with pytest.raises(ScoreError, match=r"mass of layer 0, row 0, head 0, index 5 is NaN"):
        core.finish()  # what torch writes is seen in Rust
    mass[0, 0, 0, 5] = 0.0
    assert core.finish() == LAYERS * BATCH * HEADS * 2


def test_numpy_and_torch_are_alike():
    out = slots_out().numpy()
    positions, mass, peak = (tensor.numpy() for tensor in tensors())
    core = _core.Ledger(_core.Spec("h2o", SLOTS), positions, mass, peak)
    core.begin([1, 0, 1], out)
    core.finish()
    assert (positions[:, [0, 2], :, 0] == 0).all()
    assert (positions[:, 1] == -1).all()
    assert (out[:, 1] == -1).all()


def test_pinned_memory_is_accepted():
    if not torch.cuda.is_available():
        pytest.skip("pinning memory needs a GPU")
    positions, mass, peak = (tensor.pin_memory() for tensor in tensors())
    core = _core.Ledger(_core.Spec("h2o", SLOTS), positions, mass, peak)
    core.reset()
    assert (positions == -1).all()


class Elsewhere:
    """Claims to lie on a GPU, as far as DLPack goes."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: object) -> object:
        raise AssertionError("memory of another device must not be touched")


def replaced(index: int, value: object) -> list[object]:
    arguments: list[object] = list(tensors())
    arguments[index] = value
    return arguments


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.full(SHAPE, -1), "positions must be int32, got int64"),
        (1, torch.zeros(SHAPE, dtype=torch.float64), "mass must be float32, got float64"),
        (1, torch.zeros(SHAPE, dtype=torch.bfloat16), "mass must be float32, got bfloat16"),
        (2, torch.zeros(SHAPE[1:]), r"peak must have the shape \[layers, batch, kv_heads, slots\], got \[3, 2, 32\]"),
        (2, torch.zeros(2, 3, 2, 31), r"peak must have the shape \[2, 3, 2, 32\], got \[2, 3, 2, 31\]"),
        (1, torch.zeros(2, 3, 32, 2).transpose(2, 3), "mass must be C-contiguous"),
        (1, torch.zeros(*SHAPE[:3], 64)[..., ::2], "mass must be C-contiguous"),
        (0, frozen(np.full(SHAPE, -1, np.int32)), "positions must be .*(writable|read)"),
        (1, [0.0], "mass must be a CPU tensor or array that exports DLPack, got list"),
        (2, None, "mass and peak must both be tensors or both None"),
        (1, torch.zeros(SHAPE, device="meta"), "mass must be"),
    ],
)
def test_wrong_tensors_are_refused(index, value, message):
    with pytest.raises(TensorError, match=message):
        _core.Ledger(_core.Spec("h2o", SLOTS), *replaced(index, value))


def test_other_devices_are_refused():
    with pytest.raises((TensorError, AssertionError)) as error:
        _core.Ledger(_core.Spec("h2o", SLOTS), *replaced(1, Elsewhere()))
    assert isinstance(error.value, TensorError)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_tensors_are_refused():
    with pytest.raises(TensorError, match="on the CPU, pinned or not, got a tensor on cuda:0"):
        _core.Ledger(_core.Spec("h2o", SLOTS), *replaced(1, torch.zeros(SHAPE, device="cuda")))


def test_shared_memory_is_refused():
    positions, mass, _ = tensors()
    with pytest.raises(TensorError, match="must not share memory"):
        _core.Ledger(_core.Spec("h2o", SLOTS), positions, mass, mass)
    with pytest.raises(TensorError, match="must not share memory"):
        _core.accumulate(
            torch.zeros(1, 1, 1, 1, 4), torch.zeros(1, 1, dtype=torch.int32), [1], *[torch.zeros(1, 1, 4)] * 2, 1.0, 1.0
        )


def test_scored_strategies_need_scores_and_exactly_their_budget():
    with pytest.raises(TensorError, match="h2o needs the tensors mass and peak, got None"):
        _core.Ledger(_core.Spec("h2o", SLOTS), tensors()[0], None, None)
    _core.Ledger(_core.Spec("streaming", SLOTS), tensors()[0], None, None)
    with pytest.raises(TensorError, match="a budget of 31 needs 31 slots, got 32"):
        _core.Ledger(_core.Spec("h2o", 31), *tensors())


def test_begin_checks_before_it_writes(ledger):
    core, positions, _, _ = ledger
    out = slots_out()
    for lengths, error, message in [
        ([1, 1], TensorError, "lengths must have one entry per row, 3, got 2"),
        ([1, -1, 1], ConfigError, r"lengths\[1\] must be from 0 to 2147483647, got -1"),
        ([1, 2**70, 1], ConfigError, r"lengths\[1\] must be"),
        ([1, 1.5, 1], ConfigError, "lengths must be an integer, got 1.5"),
        (7, ConfigError, "lengths must be a sequence of integers, got 7"),
    ]:
        with pytest.raises(error, match=message):
            core.begin(lengths, out)
    with pytest.raises(TensorError, match=r"slots must have the shape \[2, 3, 2\], got \[2, 2, 3\]"):
        core.begin([1, 1, 1], torch.zeros(2, 2, 3, dtype=torch.int64))
    with pytest.raises(TensorError, match="slots must be int64, got int32"):
        core.begin([1, 1, 1], slots_out().int())
    assert (positions == -1).all()
    assert (out == -7).all()
    assert core.seen == [0, 0, 0]


def test_calls_in_the_wrong_order(ledger):
    core, *_ = ledger
    out, columns = slots_out(), torch.arange(2, dtype=torch.int32).repeat(BATCH, 1)
    scores = torch.zeros(BATCH, HEADS, SLOTS + 2)
    source = torch.full((BATCH, HEADS, SLOTS), -7, dtype=torch.int32)
    with pytest.raises(CacheError, match="finish must come after begin"):
        core.finish()
    with pytest.raises(CacheError, match="chunk must come between begin and finish"):
        core.chunk(0, columns, scores, scores.clone(), source)
    core.begin([2, 2, 2], out)
    with pytest.raises(CacheError, match="begin must not come twice"):
        core.begin([1, 1, 1], out)
    core.chunk(0, columns, scores, scores.clone(), source)
    with pytest.raises(CacheError, match="layer 0 was already decided"):
        core.chunk(0, columns, scores, scores.clone(), source)
    with pytest.raises(CacheError, match="layer 1 is missing"):
        core.finish()
    for call in (lambda: core.reorder([0, 1, 2]), lambda: core.copy_row(0, 1)):
        with pytest.raises(CacheError, match="between begin and finish"):
            call()
    core.reset()
    assert core.seen == [0, 0, 0]
    decode(core, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-30])
def test_bad_scores_change_nothing(ledger, bad):
    core, positions, mass, peak = ledger
    n = 2 * SLOTS
    scores = torch.rand(BATCH, HEADS, SLOTS + n)
    columns = torch.arange(n, dtype=torch.int32).repeat(BATCH, 1)
    source = torch.full((BATCH, HEADS, SLOTS), -7, dtype=torch.int32)
    core.begin([n] * BATCH, slots_out())
    spoiled = scores.clone()
    spoiled[2, 1, SLOTS + 3] = bad
    with pytest.raises(ScoreError, match=rf"peak of layer 1, row 2, head 1, index {SLOTS + 3} is"):
        core.chunk(1, columns, scores, spoiled, source)
    assert (source == -7).all()
    assert (positions == -1).all()
    assert not mass.any()
    assert not peak.any()
    core.chunk(0, columns, scores, scores.clone(), source)
    core.chunk(1, columns, scores, scores.clone(), source)
    core.finish()
    assert (positions >= 0).all()
    assert core.evictions == LAYERS * BATCH * HEADS * SLOTS
    assert core.queue_lengths() == [4, 4, 4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 2, 1], "after 1 of them came 2"),
        ([0, 1, -1], "must number its 3 new tokens, got 2"),
        ([0, 1, -2], "-1 for padding, got -2"),
    ],
)
def test_chunk_columns_are_checked(ledger, row, message):
    core, *_ = ledger
    core.begin([3, 3, 3], slots_out())
    columns = torch.tensor([[0, 1, 2], [0, 1, 2], row], dtype=torch.int32)
    scores = torch.zeros(BATCH, HEADS, SLOTS + 3)
    source = torch.zeros(BATCH, HEADS, SLOTS, dtype=torch.int32)
    with pytest.raises(TensorError, match=message):
        core.chunk(0, columns, scores, scores.clone(), source)


def accumulation(**changes: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "probabilities": torch.rand(2, 3, 2, 5, 70),
        "ages": torch.arange(4, -1, -1, dtype=torch.int32).repeat(2, 1),
        "elapsed": [5, 5],
        "mass": torch.rand(2, 3, 70),
        "peak": torch.rand(2, 3, 70),
        "mass_decay": 0.9,
        "peak_decay": 0.99,
    }
    return arguments | changes


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulate(threads, weighted):
    ages = torch.tensor([[2, 1, -1, 0, -1], [4, 3, 2, 1, 0]], dtype=torch.int32)
    elapsed = [3, 5]
    weights = torch.rand(2, 3, 70) if weighted else None
    given = accumulation(ages=ages, elapsed=elapsed)
    mean = given["probabilities"].double().mean(2)
    expected = {}
    for name, decay in (("mass", 0.9), ("peak", 0.99)):
        fade = torch.where(ages >= 0, decay ** ages.double(), 0.0)[:, None, :, None]
        looks = (mean * fade).sum(2) if name == "mass" else (mean * fade).amax(2)
        looks = looks * weights if weighted else looks
        old = given[name].double() * torch.tensor([decay**n for n in elapsed])[:, None, None]
        expected[name] = old + looks if name == "mass" else torch.maximum(old, looks)
    _core.accumulate(**given, weights=weights, threads=threads)
    for name, value in expected.items():
        torch.testing.assert_close(given[name].double(), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("columns", [70, 50])
@pytest.mark.parametrize("weighted", [False, True])
def test_torch_adds_looks_as_the_core_does(columns, weighted):
    """On other devices torch does what the core does on the CPU, padding and columns that no query reached included."""
    ages = torch.tensor([[2, 1, -1, 0, -1], [4, 3, 2, 1, 0]], dtype=torch.int32)
    weights = torch.rand(2, 3, columns) if weighted else None
    unused = torch.zeros(0)
    block = looks.Block(unused, unused, ages, [3, 5], [0, 0], 5, weights, 0, None)
    rule = looks.Rule(0.9, 0.99, 0, None, weighted)
    probabilities = torch.rand(2, 3, 2, 5, columns)
    start = torch.rand(2, 2, 3, 70)
    start[..., columns:] = 0  # columns that no query has reached yet
    own, expected = start.clone(), start.clone()
    looks.accumulate_by_torch(probabilities, block, rule, *own)
    looks.accumulate(probabilities, block, rule, *expected)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(own, start, rtol=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5])
def test_accumulate_refuses_bad_scores(bad):
    given = accumulation()
    given["probabilities"][1, 2, 0, 4, 69] = bad
    before = given["mass"].clone(), given["peak"].clone()
    with pytest.raises(ScoreError, match=r"probabilities\[1, 2, 0, 4, 69\] is"):
        _core.accumulate(**given)
    assert torch.equal(given["mass"], before[0])
    assert torch.equal(given["peak"], before[1])
    # Padding is neither read nor refused.
    given["ages"][1, 4] = -1
    _core.accumulate(**given)
    given["probabilities"][1, 2, 0, 4, 69] = -0.0
    given["ages"][1, 4] = 0
    _core.accumulate(**given)
    given["mass"][0, 1, 2] = bad
    with pytest.raises(ScoreError, match=r"mass\[0, 1, 2\] is"):
        _core.accumulate(**given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"probabilities": torch.zeros(2, 3, 2, 5, 70, dtype=torch.bfloat16)},
            TensorError,
            "probabilities must be float32, got bfloat16",
        ),
        ({"probabilities": torch.zeros(2, 3, 5, 70)}, TensorError, r"probabilities must have the shape \[batch"),
        (
            {"ages": torch.zeros(2, 4, dtype=torch.int32)},
            TensorError,
            r"ages must have the shape \[2, 5\], got \[2, 4\]",
        ),
        ({"mass": torch.zeros(2, 3, 71)}, TensorError, r"mass must have the shape \[2, 3, 70\], got \[2, 3, 71\]"),
        ({"elapsed": [5]}, TensorError, "elapsed must have one entry per row, 2, got 1"),
        ({"elapsed": [5, -1]}, ConfigError, "elapsed must be from 0 to .*, got -1"),
        ({"mass_decay": 1.5}, ConfigError, "mass_decay must be a number from 0 to 1, got 1.5"),
        ({"peak_decay": math.nan}, ConfigError, "peak_decay must be a number from 0 to 1, got NaN"),
        ({"threads": 0}, ConfigError, "threads must be an integer of at least 1, got 0"),
        ({"peak": frozen(np.zeros((2, 3, 70), np.float32))}, TensorError, "peak must be .*(writable|read)"),
    ],
)
def test_accumulate_checks_its_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        _core.accumulate(**accumulation(**changes))


def test_threads_do_not_change_decisions(monkeypatch):
    results = []
    for threads in (1, 2, 5):
        bound = tensors((8, 4, 4, 600))
        core = _core.Ledger(_core.Spec("liquid_fusion", 600, distinct_ratio=0.0), *bound, threads=threads)
        out = torch.empty(8, 4, 4, dtype=torch.int64)
        generator = torch.Generator().manual_seed(0)
        for _ in range(700):
            core.begin([1, 1, 0, 1], out)
            bound[1].add_(torch.rand(600, generator=generator))
            core.finish()
        results.append(bound[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    monkeypatch.setenv("LIQUIDFUSION_NUM_THREADS", "none")
    with pytest.raises(ConfigError, match="LIQUIDFUSION_NUM_THREADS must be an integer of at least 1, got none"):
        _core.Ledger(_core.Spec("h2o", SLOTS), *tensors())


def test_the_gil_is_released():
    probabilities = torch.rand(1, 8, 4, 256, 2048)
    ages = torch.arange(255, -1, -1, dtype=torch.int32)[None]
    mass, peak = torch.zeros(1, 8, 2048), torch.zeros(1, 8, 2048)
    stop, ticks = threading.Event(), [0]

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    other = threading.Thread(target=tick)
    other.start()
    try:
        most = 0
        for _ in range(20):
            before = ticks[0]
            _core.accumulate(probabilities, ages, [256], mass, peak, 1.0, 1.0, threads=1)
            most = max(most, ticks[0] - before)
    finally:
        stop.set()
        other.join()
    # Holding the GIL, at most a tick at either end would fit between the two readings.
    assert most > 10


def test_two_threads_may_use_one_ledger(ledger):
    core, *_ = ledger
    errors = []

    def work() -> None:
        for _ in range(200):
            try:
                core.begin([1, 1, 1], slots_out())
                core.finish()
            except CacheError as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    core.reset()
    assert core.seen == [0, 0, 0]


def test_saved_state_goes_on(ledger):
    core, positions, mass, peak = ledger
    decode(core, SLOTS + 9, mass)
    queues = torch.empty(SHAPE, dtype=torch.int32)
    core.queues(queues)
    bound = positions.clone(), mass.clone(), peak.clone()
    other = _core.Ledger(_core.Spec("h2o", SLOTS, eviction_interval=2), *bound)
    other.restore(queues, core.seen)
    decode(core, 40, mass)
    decode(other, 40, bound[1])
    assert torch.equal(positions, bound[0])
    assert core.seen == other.seen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, _: q[0, 0, 0].fill_(0), "slot 0 is queued twice"),
        (lambda q, _: q[0, 0, 0, :1].fill_(99), "slot 99 is queued, there are 32"),
        (lambda q, _: q[1, 2, 1, -1:].fill_(3), "behind the end of the queue must be -1, got 3"),
        (lambda q, _: q[1, 2, 1, 1:].fill_(-1), "layer 1, row 2, head 1"),
        (lambda _, p: p[0, 1, 0, :1].fill_(1000), "holds position 1000, 41 tokens were seen"),
        (lambda _, p: p[0, 1, 0, :2].fill_(40), "position 40 is stored twice"),
    ],
)
def test_restore_checks_everything(ledger, change, message):
    core, positions, mass, _ = ledger
    decode(core, SLOTS + 9, mass)
    queues = torch.empty(SHAPE, dtype=torch.int32)
    core.queues(queues)
    before = core.queue_lengths()
    change(queues, positions)
    with pytest.raises(CacheError, match=message):
        core.restore(queues, core.seen)
    assert core.queue_lengths() == before


def test_reorder_moves_rows(ledger):
    core, _, mass, _ = ledger
    core.begin([1, 0, 1], slots_out())
    core.finish()
    decode(core, SLOTS + 5, mass)
    queues, moved = torch.empty(SHAPE, dtype=torch.int32), torch.empty(SHAPE, dtype=torch.int32)
    core.queues(queues)
    seen = core.seen
    core.reorder([2, 2, 1])
    core.queues(moved)
    assert torch.equal(moved, queues[:, [2, 2, 1]])
    assert core.seen == [seen[2], seen[2], seen[1]]
    for rows, error in (([0, 1], TensorError), ([0, 1, 3], ConfigError), ([0, 1, -1], ConfigError)):
        with pytest.raises(error, match="rows must"):
            core.reorder(rows)


def test_peek_feeds_a_ring(ledger):
    core, *_ = ledger
    out = torch.empty(LAYERS, BATCH, HEADS, 4, dtype=torch.int32)
    core.peek(out, [0, 3, SLOTS - 1])
    assert out[1, :, 1].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [31, -1, -1, -1]]
    with pytest.raises(ConfigError, match="skip must not be negative, got -1"):
        core.peek(out, [0, -1, 0])


def test_only_full_grows(ledger):
    with pytest.raises(CacheError, match="h2o is bounded by its budget and cannot grow"):
        ledger[0].grow(*tensors((*SHAPE[:3], 64)))
    positions = tensors((1, 1, 1, 2))[0]
    core = _core.Ledger(_core.Spec("full"), positions, None, None)
    out = torch.zeros(1, 1, 1, dtype=torch.int64)
    for _ in range(2):
        core.begin([1], out)
        core.finish()
    with pytest.raises(CacheError, match="row 0 needs 3 slots and has 2: grow first"):
        core.begin([1], out)
    more = tensors((1, 1, 1, 5))[0]
    more[..., :2] = positions
    core.grow(more, None, None)
    core.begin([1], out)
    core.finish()
    assert out.item() == 2
    assert more.flatten().tolist() == [0, 1, 2, -1, -1]
    assert core.queue_lengths() == [2]


@pytest.mark.parametrize("info", _core.strategies(), ids=lambda info: info["name"])
def test_every_strategy_describes_itself(info):
    spec = _core.Spec(info["name"])
    assert info["summary"]
    assert list(info["defaults"]) == info["parameters"]
    assert set(info["parameters"]) == {name for name, value in spec.params.items() if value is not None}
    assert (spec.budget is None) == (not spec.bounded)
    for one in (spec, _core.Spec(info["name"], 64)):
        for same in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert same == one
            assert hash(same) == hash(one)
            assert same.params == one.params
            assert same.split(20) == one.split(20)
    assert spec == _core.Spec(info["name"])
    assert (spec == _core.Spec(info["name"], 77)) == (not spec.bounded)
    assert info["name"] in repr(spec)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "lru"}, 'strategy must be one of .*liquid_fusion.*, got "lru"'),
        ({"strategy": 3}, "strategy must be a string, got 3"),
        ({"budget": 0}, "budget must be an integer from 1 to 2147483647, got 0"),
        ({"budget": 10**30}, "budget must be an integer"),
        ({"budget": 7}, "budget 7 is out of range"),
        ({"budget": 12.5}, "budget must be an integer, got 12.5"),
        ({"heavy_ratio": -0.1}, "heavy_ratio must be a number from 0 to 1, got -0.1"),
        ({"recent_ratio": 0}, "recent_ratio must be a number above 0 and at most 1, got 0"),
        ({"peak_ratio": "x"}, "peak_ratio must be a number, got 'x'"),
        ({"sink_update_rate": math.nan}, "sink_update_rate must be a number from 0 to 1, got NaN"),
        ({"sink_size": -1}, "sink_size must be an integer from 0"),
        ({"window_size": 0}, "window_size must be an integer from 1"),
        ({"budget": 84, "eviction_interval": 11}, "eviction_interval must be at most 10 .*, got 11"),
        ({"peak_reach": 0}, "peak_reach must be an integer from 1 to 2147483647, got 0"),
        ({"age_half_life": -1}, "age_half_life must be an integer from 0 to 2147483647, got -1"),
        ({"sinks": "loose"}, 'sinks must be "pinned" or "adaptive", got "loose"'),
        ({"value_weighted": 2}, "value_weighted must be True or False, got 2"),
    ],
)
def test_bad_parameters_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        _core.Spec(**({"strategy": "liquid_fusion"} | arguments))


@pytest.mark.parametrize("row", _core.parameters(), ids=lambda row: row["name"])
def test_the_table_says_what_is_accepted(row):
    """Each parameter's ends, and what lies beyond them, for a strategy that listens to it."""
    name = row["name"]
    listening = next(info["name"] for info in _core.strategies() if name in info["parameters"])
    inside, outside = {
        "int": lambda: ([row["least"]], [row["least"] - 1, row["most"] + 1, 1.5, "1"]),
        "float": lambda: ([row["most"]], [row["least"] - 1e-9, row["most"] + 1e-9, math.nan, "1"]),
        "bool": lambda: ([True, False], [2, "yes"]),
        "choice": lambda: (row["choices"], ["other", 1]),
    }[row["kind"]]()
    if row["kind"] == "float":
        (outside if row["open_low"] else inside).append(row["least"])
    for value in inside:
        if name != "window_size":  # too small a budget
            assert _core.Spec(listening, 4096, **{name: value}).params[name] == value
    for value in outside:
        with pytest.raises(ConfigError, match=f"^{name} must be"):
            _core.Spec(listening, 4096, **{name: value})
    assert _core.Spec(listening, **{name: None}) == _core.Spec(listening)
    assert row["help"].endswith(".")


def test_only_what_is_listened_to_is_accepted():
    for name, heard in [("h2o", "window_size, heavy_ratio, recent_ratio, eviction_interval"), ("full", "no parameter")]:
        for unheard in ("sink_size", "sink_sice"):
            with pytest.raises(ConfigError, match=f"^{name} does not listen to {unheard}; it listens to {heard}$"):
                _core.Spec(name, 64, **{unheard: 4})
    assert _core.Spec("h2o", 64, sink_size=None) == _core.Spec("h2o", 64)


def test_peaks_reach_as_far_as_the_budget():
    assert _core.Spec("liquid_fusion", 84).peak_reach == 84
    assert _core.Spec("liquid_fusion", 84, peak_reach=5).params["peak_reach"] == 5
    assert _core.Spec("h2o", 84).peak_reach is None


def test_budget_from_percent():
    assert _core.budget_from_percent(20, 1001, 4) == 201
    assert _core.budget_from_percent(1, 10, 4) == 8
    for percent in (0, 101, math.nan):
        with pytest.raises(ConfigError, match="cache size must be above 0 and at most 100 percent"):
            _core.budget_from_percent(percent, 10, 4)
    with pytest.raises(ConfigError, match="prompt_tokens must be an integer from 1"):
        _core.budget_from_percent(5, 0, 4)


def filled(strategy: str = "h2o", steps: int = SLOTS + 9, **options: object) -> tuple[_core.Ledger, ...]:
    """A ledger of which every row has seen `steps` tokens, and its tensors."""
    positions, mass, peak = tensors()
    core = _core.Ledger(_core.Spec(strategy, SLOTS, eviction_interval=2, **options), positions, mass, peak)
    decode(core, steps, mass)
    return core, positions, mass, peak


def test_rows_that_take_no_part_rest():
    core, positions, *_ = filled()
    before, queues = positions.clone(), torch.empty(SHAPE, dtype=torch.int32)
    core.queues(queues)
    out = torch.full((LAYERS, 2, HEADS), -7, dtype=torch.int64)
    core.begin([1, 0], out, rows=[2, 0])
    assert (out[:, 0] == queues[:, 2, :, 0]).all(), "the first row of the call is the ledger's third"
    assert (out[:, 1] == -1).all()
    core.finish()
    assert core.seen == [SLOTS + 9, SLOTS + 9, SLOTS + 10]
    assert torch.equal(positions[:, :2], before[:, :2])
    assert (positions[:, 2].amax(-1) == SLOTS + 9).all()

    n = 5
    columns = torch.arange(n, dtype=torch.int32)[None]
    scores = torch.rand(1, HEADS, SLOTS + n)
    source = torch.full((1, HEADS, SLOTS), -7, dtype=torch.int32)
    core.begin([n], torch.empty(LAYERS, 1, HEADS, dtype=torch.int64), rows=[1])
    for layer in range(LAYERS):
        core.chunk(layer, columns, scores, scores.clone(), source)
        assert (
            sorted(source[0, 0][source[0, 0] >= 0].tolist()) == list(range(n))[-len(source[0, 0][source[0, 0] >= 0]) :]
        )
    core.finish()
    assert core.seen == [SLOTS + 9, SLOTS + 14, SLOTS + 10]
    assert torch.equal(positions[:, 0], before[:, 0])
    assert (positions[:, 1].amax(-1) == SLOTS + 13).all()
    for rows, error, message in [
        ([0, 3], ConfigError, "rows must be from 0 to 2, got 3"),
        ([1, 1], ConfigError, "rows must name a row once, got 1 twice"),
        ([0], TensorError, r"slots must have the shape \[2, 1, 2\], got \[2, 2, 2\]"),
        (0, ConfigError, "rows must be a sequence of integers, got 0"),
    ]:
        with pytest.raises(error, match=message):
            core.begin([1, 1], out, rows)


def test_a_released_row_is_as_new():
    core, positions, mass, peak = filled()
    others = [tensor[:, [0, 2]].clone() for tensor in (positions, mass, peak)]
    core.release(1)
    assert (positions[:, 1] == -1).all()
    assert not mass[:, 1].any()
    assert not peak[:, 1].any()
    assert all(torch.equal(t[:, [0, 2]], old) for t, old in zip((positions, mass, peak), others, strict=True))
    assert core.seen == [SLOTS + 9, 0, SLOTS + 9]
    assert core.queue_lengths()[1] == SLOTS
    fresh, fresh_positions, fresh_mass, _ = filled(steps=0)
    for one, values in ((core, mass), (fresh, fresh_mass)):
        for step in range(SLOTS + 5):
            one.begin([1], torch.empty(LAYERS, 1, HEADS, dtype=torch.int64), rows=[1])
            values[:, 1] += torch.rand(values[:, 1].shape, generator=torch.Generator().manual_seed(step))
            one.finish()
    assert torch.equal(positions[:, 1], fresh_positions[:, 1])
    for row, message in ((3, "row must be from 0 to 2, got 3"), (-1, "row must be from 0 to 2, got -1")):
        with pytest.raises(ConfigError, match=message):
            core.release(row)
    core.begin([1, 1, 1], slots_out())
    with pytest.raises(CacheError, match="release must not come between begin and finish"):
        core.release(0)


def test_a_copied_row_goes_on_alike():
    core, positions, mass, peak = filled()
    core.release(2)
    core.copy_row(0, 2)
    for tensor in (positions, mass, peak):
        assert torch.equal(tensor[:, 2], tensor[:, 0])
    for step in range(20):
        core.begin([1, 1], torch.empty(LAYERS, 2, HEADS, dtype=torch.int64), rows=[0, 2])
        new = torch.rand((LAYERS, HEADS, SLOTS), generator=torch.Generator().manual_seed(step))
        mass[:, 0] += new
        mass[:, 2] += new
        core.finish()
    assert torch.equal(positions[:, 2], positions[:, 0])
    assert core.seen == [SLOTS + 29, SLOTS + 9, SLOTS + 29]
    with pytest.raises(ConfigError, match="target must be from 0 to 2, got 3"):
        core.copy_row(0, 3)


def test_one_row_is_restored():
    core, positions, mass, _ = filled()
    queues = torch.empty(SHAPE, dtype=torch.int32)
    core.queues(queues)
    other, other_positions, other_mass, _ = filled(steps=3)
    other_positions[:, 2], other_mass[:, 2] = positions[:, 0], mass[:, 0]
    other.restore(queues[:, :1].contiguous(), [core.seen[0]], rows=[2])
    assert other.seen == [3, 3, core.seen[0]]
    after = torch.empty(SHAPE, dtype=torch.int32)
    other.queues(after)
    assert torch.equal(after[:, 2], queues[:, 0])
    assert (after[:, 0, :, 0] == 3).all()
    with pytest.raises(TensorError, match=r"queues must have the shape \[2, 1, 2, 32\], got \[2, 3, 2, 32\]"):
        other.restore(queues, core.seen, rows=[2])
    with pytest.raises(CacheError, match="layer 0, row 0, head 0"):
        other.restore(queues[:, :1].contiguous(), [core.seen[0]], rows=[0])


def test_reorder_is_checked_before_anything_is_written(ledger):
    core, _, mass, _ = ledger
    decode(core, SLOTS + 5, mass)
    before, after = (torch.empty(SHAPE, dtype=torch.int32) for _ in range(2))
    core.queues(before)
    for rows in ([2], [0, 0, 3], [0, 0, -1], [0, 0, 1.5]):
        with pytest.raises((TensorError, ConfigError), match="rows must"):
            core.reorder(rows)
    core.queues(after)
    assert torch.equal(before, after)


@pytest.mark.parametrize("options", [("keydiff", {}), ("liquid_fusion", {"distinct_ratio": 0.5})], ids=lambda o: o[0])
def test_distinctness_is_needed_where_it_decides(options):
    strategy, parameters = options
    spec = _core.Spec(strategy, SLOTS, eviction_interval=2, **parameters)
    assert spec.distinct
    positions, mass, peak = tensors()
    core = _core.Ledger(spec, positions, *((mass, peak) if spec.scored else (None, None)))
    decode(core, SLOTS - 3)
    core.begin([1] * BATCH, slots_out())
    with pytest.raises(TensorError, match=f"{strategy} needs distinct, got None"):
        core.finish()
    distinct = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) - 0.5
    for bad in (math.nan, math.inf):
        spoiled = distinct.clone()
        spoiled[1, 0, 1, 3] = bad
        with pytest.raises(ScoreError, match=r"distinct of layer 1, row 0, head 1, index 3 is .*; distinctness must"):
            core.finish(spoiled)
    with pytest.raises(TensorError, match=r"distinct must have the shape \[2, 3, 2, 32\], got \[2, 3, 2, 31\]"):
        core.finish(distinct[..., 1:].contiguous())
    distinct[positions < 0] = math.nan  # no token is there
    assert core.finish(distinct) == LAYERS * BATCH * HEADS * 2

    n = 9
    columns = torch.arange(n, dtype=torch.int32).repeat(BATCH, 1)
    scores = torch.rand(BATCH, HEADS, SLOTS + n)
    given = (scores, scores.clone()) if spec.scored else (None, None)
    source = torch.full((BATCH, HEADS, SLOTS), -7, dtype=torch.int32)
    core.begin([n] * BATCH, slots_out())
    with pytest.raises(TensorError, match=f"{strategy} needs distinct, got None"):
        core.chunk(0, columns, *given, source)
    assert (source == -7).all()
    for layer in range(LAYERS):
        core.chunk(layer, columns, *given, source, distinct=torch.rand(BATCH, HEADS, SLOTS + n) - 0.5)
    core.finish(torch.rand(SHAPE))
    assert (positions >= 0).all()


def test_keydiff_keeps_the_most_distinct():
    core, positions, *_ = filled("keydiff", steps=0)
    distinct = torch.linspace(-1, 1, SLOTS).expand(SHAPE).contiguous()  # of slot i, which holds position i
    for _ in range(SLOTS - 2):
        core.begin([1] * BATCH, slots_out())
        core.finish(distinct)
    queue = torch.empty((*SHAPE[:3], 4), dtype=torch.int32)
    core.peek(queue, [0] * BATCH)
    assert queue[0, 0, 0].tolist() == [SLOTS - 2, SLOTS - 1, 0, 1], "the empty slots, then those least distinct"
    assert (positions >= 0).sum() == LAYERS * BATCH * HEADS * (SLOTS - 2)


def test_flushed_denormals_change_nothing():
    """Numbers of every size down to the smallest: the same scores on one thread and on two, flushed or not."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-149, 0, (1, 8, 2, 20, 4096), generator=generator)
    given = torch.pow(2.0, exponents.double()).float()
    ages = torch.arange(19, -1, -1, dtype=torch.int32)[None]
    start = torch.pow(2.0, torch.randint(-149, 0, (2, 1, 8, 4096), generator=generator).double()).float()
    assert (given[given > 0] < torch.finfo(torch.float32).tiny).any()

    def scores(threads: int) -> torch.Tensor:
        bound = start.clone()
        for _ in range(3):
            _core.accumulate(given, ages, [20], bound[0], bound[1], 0.05, 0.3, weights=start[0], threads=threads)
        return bound.view(torch.int32)

    plain = scores(1)
    assert torch.equal(plain, scores(2))
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine does not flush denormals")
    try:
        flushed = [scores(threads) for threads in (1, 2, 2, 2)]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(plain, one) for one in flushed)


@pytest.mark.parametrize("half_life", [4096, 2**31 - 1])
def test_a_fresh_ledger_costs_little(half_life):
    """A cache is made for every `generate` inside `use`; what depends on the context's length is worked out later."""
    bound = tensors((2, 1, 2, 64))
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        _core.Ledger(_core.Spec("liquid_fusion", 64, age_half_life=half_life), *bound)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3


@pytest.mark.parametrize("seen", [3, SLOTS + 10])
def test_rows_catch_up_as_by_calls_of_one_token(seen):
    (core, positions, mass, _), (other, other_positions, other_mass, _) = filled(steps=seen), filled(steps=seen)
    steps = {0: 1, 2: 0}
    lengths = other.queue_lengths()
    steps[0] = lengths[0] - 3  # an interval of 2 must be left, and one more
    assert steps[0] > 0
    for _ in range(steps[0]):
        other.begin([1], torch.empty(LAYERS, 1, HEADS, dtype=torch.int64), rows=[0])
        assert not other.finish()
    core.advance(list(steps.values()), rows=list(steps))
    assert (core.seen, core.queue_lengths(), core.evictions) == (other.seen, other.queue_lengths(), other.evictions)
    assert torch.equal(positions, other_positions)
    assert torch.equal(mass, other_mass)
    queues = [torch.empty(SHAPE, dtype=torch.int32) for _ in range(2)]
    core.queues(queues[0])
    other.queues(queues[1])
    assert torch.equal(*queues)
    for steps_, rows, error, message in [
        ([1], [0], CacheError, r"steps\[0\] must be from 0 to 0, before row 0 needs victims, got 1"),
        ([-1], [0], CacheError, r"steps\[0\] must be from 0"),
        ([1, 1], [0], TensorError, "steps must have one entry per row, 1, got 2"),
        ([1], [3], ConfigError, "rows must be from 0 to 2, got 3"),
    ]:
        with pytest.raises(error, match=message):
            core.advance(steps_, rows)
    core.begin([1], torch.empty(LAYERS, 1, HEADS, dtype=torch.int64), rows=[1])
    with pytest.raises(CacheError, match="advance must not come between begin and finish"):
        core.advance([0, 0, 0])


def test_some_rows_queues():
    core, *_ = filled()
    every, some = torch.empty(SHAPE, dtype=torch.int32), torch.empty(LAYERS, 2, HEADS, SLOTS, dtype=torch.int32)
    core.queues(every)
    core.queues(some, rows=[2, 0])
    assert torch.equal(some, every[:, [2, 0]])
    first = torch.empty(LAYERS, 1, HEADS, 2, dtype=torch.int32)
    core.peek(first, [1], rows=[1])
    assert torch.equal(first, every[:, 1:2, :, 1:3])
    with pytest.raises(TensorError, match="skip must have one entry per row, 1, got 3"):
        core.peek(first, [0, 0, 0], rows=[1])
