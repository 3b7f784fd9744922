"""Each kernel against its naive torch twin, on random shapes with NaN in every buffer that must not be read.

Without a GPU the kernels run in Triton's interpreter. The file needs no built extension: it loads
`liquidfusion.compute.kernels` by its path where the package cannot be imported.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

try:
    from liquidfusion.compute import kernels
except ImportError:
    _path = Path(__file__).parents[1] / "python" / "liquidfusion" / "compute" / "kernels" / "__init__.py"
    _spec = importlib.util.spec_from_file_location("liquidfusion_kernels", _path)
    kernels = importlib.util.module_from_spec(_spec)
    sys.modules["liquidfusion_kernels"] = kernels
    _spec.loader.exec_module(kernels)

# The interpreter computes with numpy, which warns of the NaN and infinities that the kernels mask.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATIVE = DEVICE == "cuda"
MASS_DECAY, PEAK_DECAY = 0.998, 0.9995
# The interpreter, slow, leaves out what differs from its neighbours in nothing that it can see.
DIMS = [(dtype, d) for dtype in (torch.float32, torch.bfloat16, torch.float16) for d in (64, 80, 96, 128, 256)]
DIMS = DIMS if NATIVE else [*DIMS[:9], DIMS[-1]]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def close(actual, expected, tolerance):
    """Relative error in the norm at most `tolerance`; NaN never passes."""
    actual, expected = actual.double(), expected.double()
    assert torch.isfinite(actual).all()
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance:.0e}"


def naive(q, k, v, visible, scale, softcap, sinks=None):
    """Output [b, hq, n, d] and group-mean probabilities [b, hkv, n, c] in float64; k and v are [b, hkv, c, d]."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = (torch.nan_to_num(t).repeat_interleave(group, 1) for t in (k, v))
    x = torch.nan_to_num(q) @ k.transpose(-1, -2) * scale
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    mask = visible.repeat_interleave(group, 1)
    x = x.masked_fill(~mask, -math.inf)
    if sinks is not None:
        x = torch.cat([x, sinks.double()[:, None, None].expand(*x.shape[:3], 1)], -1)
    p = torch.nan_to_num(x.softmax(-1))[..., : k.shape[2]]
    return p @ v, p.unflatten(1, (-1, group)).mean(2)


def buffers(batch, kv_heads, slots, head_dim, dtype, filled, generator):
    """Slots of which `filled[b]` hold a token, the rest NaN, with positions and scores."""
    shape = (batch, kv_heads, slots)
    keys = torch.randn(*shape, head_dim, generator=generator)
    values = torch.randn(*shape, head_dim, generator=generator)
    positions = torch.full(shape, -1, dtype=torch.int32)
    mass = torch.rand(shape, generator=generator)
    peak = torch.rand(shape, generator=generator)
    for b in range(batch):
        for h in range(kv_heads):
            order = torch.randperm(slots, generator=generator)
            positions[b, h, order[: filled[b]]] = torch.arange(filled[b], dtype=torch.int32)
    empty = positions < 0
    keys[empty] = math.nan
    values[empty] = math.nan
    mass[empty] = 0
    peak[empty] = 0
    return [t.to(DEVICE) for t in (keys.to(dtype), values.to(dtype), positions, mass, peak)]


def look_weights(keys, values):
    """Length of the value over that of the key; what no slot holds may be NaN and counts nothing."""
    return torch.nan_to_num(torch.nan_to_num(values.double()).norm(dim=-1) / keys.double().norm(dim=-1))


def naive_decode(q, k, v, keys, values, positions, mass, peak, ring, used, seen, sinks=None, **options):
    """Twin of `kernels.decode`, written over copies: (out, keys, values, positions, mass, peak)."""
    keys, values, positions, mass, peak = (t.clone() for t in (keys, values, positions, mass, peak))
    rows = torch.arange(q.shape[0], device=q.device)
    slots = ring[rows, :, used.long() % ring.shape[2]].long()
    at = slots[..., None]
    keys.scatter_(2, at[..., None].expand(-1, -1, 1, keys.shape[3]), k[:, :, None])
    values.scatter_(2, at[..., None].expand(-1, -1, 1, values.shape[3]), v[:, :, None])
    positions.scatter_(2, at, seen[:, None, None].expand_as(at))
    mass.scatter_(2, at, 0.0)
    peak.scatter_(2, at, 0.0)
    visible = positions >= 0
    if options["window"]:
        reach = seen % options["window"] + 1 if options.get("chunked") else torch.full_like(seen, options["window"])
        visible &= seen[:, None, None] - positions < reach[:, None, None]
    out, p = naive(q[:, :, None], keys, values, visible[:, :, None], options["scale"], options["softcap"], sinks)
    p = p[:, :, 0]
    p = p * (seen[:, None, None] - positions >= options["look_gap"])
    if options["value_weighted"]:
        p = p * look_weights(keys, values)
    mass = mass * options["mass_decay"] + p
    peak = torch.maximum(peak * options["peak_decay"], p)
    return out[:, :, 0], keys, values, positions, mass, peak


def decode_case(
    seed, dtype, group, head_dim, *, batch=2, kv_heads=2, slots=None, window=0, softcap=0.0, weighted=False
):
    generator = torch.Generator().manual_seed(seed)
    slots = slots or int(torch.randint(17, 300 if NATIVE else 70, (), generator=generator))
    filled = [slots, *(int(torch.randint(0, slots, (), generator=generator)) for _ in range(batch - 1))]
    state = buffers(batch, kv_heads, slots, head_dim, dtype, filled, generator)
    q = torch.randn(batch, kv_heads * group, head_dim, generator=generator).to(DEVICE, dtype)
    # Strided as a fused projection leaves them.
    kv = torch.randn(batch, 2 * kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
    k, v = kv[:, :kv_heads], kv[:, kv_heads:]
    ring = torch.randint(0, slots, (batch, kv_heads, 4), generator=generator, dtype=torch.int32)
    used = torch.arange(batch, dtype=torch.int32) + 3
    for b in range(batch):
        if filled[b] < slots:  # the new token takes an empty slot
            empty = (state[2][b] < 0).int().argmax(-1)
            ring[b, :, used[b] % 4] = empty.cpu()
    arguments = [
        q,
        k,
        v,
        *state,
        ring.to(DEVICE),
        used.to(DEVICE),
        torch.tensor(filled, dtype=torch.int32, device=DEVICE),
    ]
    options = {
        "scale": head_dim**-0.5,
        "mass_decay": MASS_DECAY,
        "peak_decay": PEAK_DECAY,
        "value_weighted": weighted,
        "look_gap": 3 * weighted,
        "softcap": softcap,
        "window": window,
    }
    return arguments, options


def check_decode(arguments, options):
    expected = naive_decode(*arguments, **options)
    written = arguments[3:8]
    out = kernels.decode(*arguments, **options)
    close(out, expected[0], TOLERANCE[out.dtype])
    for actual, wanted in zip(written[:3], expected[1:4], strict=True):
        assert torch.equal(torch.nan_to_num(actual), torch.nan_to_num(wanted))
    for actual, wanted in zip(written[3:], expected[4:], strict=True):
        close(actual, wanted, 1e-4)


@pytest.mark.parametrize(("dtype", "head_dim"), DIMS)
def test_decode_dims(dtype, head_dim):
    check_decode(*decode_case(head_dim, dtype, 2, head_dim, kv_heads=1 + NATIVE))


@pytest.mark.parametrize("group", range(1, 9))
def test_decode_groups(group):
    check_decode(*decode_case(group, torch.float32, group, 64, weighted=True, kv_heads=1 + NATIVE))


@pytest.mark.parametrize(("window", "softcap", "weighted"), [(9, 0.0, False), (0, 2.0, True), (5, 3.0, True)])
def test_decode_window_and_softcap(window, softcap, weighted):
    check_decode(*decode_case(7, torch.float32, 2, 64, window=window, softcap=softcap, weighted=weighted))


@pytest.mark.parametrize("window", [1, 8])
def test_decode_chunks(window):
    arguments, options = decode_case(8, torch.float32, 2, 64, window=window, weighted=True)
    check_decode(arguments, options | {"chunked": True})


@pytest.mark.parametrize("value_dim", [32, 80])
def test_decode_values_of_another_size_than_keys(value_dim):
    arguments, options = decode_case(12, torch.float32, 2, 96, weighted=True)
    arguments[2], arguments[4] = arguments[2][..., :value_dim], arguments[4][..., :value_dim].contiguous()
    check_decode(arguments, options)


def latent_case(seed, dtype, group, rank, rotary, **case):
    """A case of `decode` with one kv head whose values are the front of its keys, and the same for `decode_latent`."""
    arguments, options = decode_case(seed, dtype, group, rank + rotary, kv_heads=1, **case)
    arguments[2], arguments[4] = arguments[1][..., :rank], arguments[3][..., :rank]
    own = [t.clone() for t in (*arguments[:2], arguments[3], *arguments[5:])]
    return arguments, own, options, rank


def check_latent(arguments, own, options, rank, **given):
    expected = naive_decode(*arguments, **options)
    out = kernels.decode_latent(*own, rank=rank, **given, **options)
    close(out, expected[0], TOLERANCE[out.dtype])
    for actual, wanted in zip(own[2:4], (expected[1], expected[3]), strict=True):
        assert torch.equal(torch.nan_to_num(actual), torch.nan_to_num(wanted))
    for actual, wanted in zip(own[4:6], expected[4:], strict=True):
        close(actual, wanted, 1e-4)


@pytest.mark.parametrize(
    ("dtype", "group", "rank", "rotary"),
    [
        (torch.float32, 4, 24, 8),
        (torch.float32, 40, 256, 32),
        (torch.bfloat16, 16, 512, 64),
        (torch.float16, 20, 128, 16),
    ],
)
def test_decode_latents(dtype, group, rank, rotary):
    check_latent(*latent_case(group, dtype, group, rank, rotary, weighted=True))


@pytest.mark.parametrize(("window", "softcap", "chunked"), [(9, 0.0, False), (0, 2.0, False), (8, 3.0, True)])
def test_decode_latents_window_and_softcap(window, softcap, chunked):
    arguments, own, options, rank = latent_case(7, torch.float32, 20, 32, 16, window=window, softcap=softcap)
    check_latent(arguments, own, options | {"chunked": chunked}, rank)


def test_decode_latents_leave_idle_rows():
    arguments, own, options, rank = latent_case(3, torch.float32, 20, 32, 16, batch=3, weighted=True)
    before = [t.clone() for t in own]
    expected = naive_decode(*arguments, **options)
    out = kernels.decode_latent(*own, rank=rank, active=torch.tensor([1, 0, 1], device=DEVICE).bool(), **options)
    for row in (0, 2):
        close(out[row], expected[0][row], 1e-5)
        close(own[4][row], expected[4][row], 1e-4)
    assert (out[1] == 0).all()
    for actual, wanted in zip(own, before, strict=True):
        assert torch.equal(torch.nan_to_num(actual[1]), torch.nan_to_num(wanted[1]))


def test_decode_latents_unscored_and_with_sinks():
    arguments, own, options, rank = latent_case(4, torch.float32, 20, 32, 16)
    sinks = torch.linspace(-1, 3, 20, device=DEVICE)
    expected = naive_decode(*arguments, **options, sinks=sinks)
    own[4] = own[5] = None
    close(kernels.decode_latent(*own, rank=rank, sinks=sinks, **options), expected[0], 1e-5)
    assert torch.equal(own[3], expected[3])


def test_decode_latents_are_one_node_of_a_compiled_graph():
    arguments, own, options, rank = latent_case(5, torch.float32, 4, 32, 16, slots=40)
    expected = naive_decode(*arguments, **options)
    compiled = torch.compile(partial(kernels.decode_latent, rank=rank, **options), backend="eager", fullgraph=True)
    close(compiled(*own), expected[0], 1e-5)
    assert torch.equal(torch.nan_to_num(own[2]), torch.nan_to_num(expected[1]))


@pytest.mark.parametrize("mass_decay", [0.0, 1.0])
def test_decode_decays(mass_decay):
    arguments, options = decode_case(9, torch.float32, 2, 64)
    check_decode(arguments, options | {"mass_decay": mass_decay})


def test_decode_unscored():
    arguments, options = decode_case(3, torch.float32, 2, 64)
    expected = naive_decode(*arguments, **options)
    arguments[6] = arguments[7] = None
    close(kernels.decode(*arguments, **options), expected[0], 1e-5)
    assert torch.equal(arguments[5], expected[3])


def test_decode_without_a_slot_writes_nothing():
    arguments, options = decode_case(3, torch.float32, 2, 64)
    arguments[8].fill_(-1)
    before = [t.clone() for t in arguments[3:6]]
    kernels.decode(*arguments, **options)
    for actual, wanted in zip(arguments[3:6], before, strict=True):
        assert torch.equal(torch.nan_to_num(actual), torch.nan_to_num(wanted))


def test_decode_sinks():
    arguments, options = decode_case(4, torch.float32, 2, 64)
    sinks = torch.linspace(-1, 3, arguments[0].shape[1], device=DEVICE)
    check_decode(arguments, options | {"sinks": sinks})


@pytest.mark.parametrize("kind", [torch.bool, torch.int8])
def test_decode_leaves_idle_rows(kind):
    arguments, options = decode_case(3, torch.float32, 2, 64, batch=3, weighted=True)
    before = [t.clone() for t in arguments]
    expected = naive_decode(*arguments, **options)
    out = kernels.decode(*arguments, active=torch.tensor([1, 0, 1], device=DEVICE).to(kind), **options)
    for row in (0, 2):
        close(out[row], expected[0][row], 1e-5)
        close(arguments[6][row], expected[4][row], 1e-4)
    assert (out[1] == 0).all()
    for actual, wanted in zip(arguments, before, strict=True):
        assert torch.equal(torch.nan_to_num(actual[1]), torch.nan_to_num(wanted[1]))


def test_decode_runs_are_bit_identical():
    results = []
    for _ in range(2):
        arguments, options = decode_case(11, torch.bfloat16, 4, 64, slots=70, weighted=True)
        results.append([kernels.decode(*arguments, **options), *arguments[6:8]])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_decode_is_one_node_of_a_compiled_graph():
    arguments, options = decode_case(5, torch.float32, 2, 64, slots=40)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(*tensors):
        return kernels.decode(*tensors, **options) * 2

    expected = naive_decode(*arguments, **options)
    out = torch.compile(step, backend=backend, fullgraph=True)(*arguments)
    close(out, expected[0] * 2, 1e-5)
    close(arguments[6], expected[4], 1e-4)
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("liquidfusion.decode" in str(target) for target in targets)


def naive_prefill(q, k, v, keys, values, positions, ages, mass, peak, *, first_position, sinks=None, **options):
    """Twin of `kernels.prefill`."""
    count = ages.amax(1) + 1
    end = torch.as_tensor(first_position, device=q.device) + count
    column_ages = torch.cat(
        [
            torch.where(positions >= 0, end[:, None, None] - 1 - positions, -1),
            ages[:, None].expand(-1, k.shape[1], -1),
        ],
        2,
    )
    distance = column_ages[:, :, None] - ages[:, None, :, None]
    real = (column_ages >= 0)[:, :, None] & (ages >= 0)[:, None, :, None]
    visible = real & (distance >= 0)
    if options["window"]:
        visible &= distance < options["window"]
    k_all, v_all = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    out, p = naive(q, k_all, v_all, visible, options["scale"], options["softcap"], sinks)
    p = p * (distance >= options["look_gap"])
    norm = torch.ones((), dtype=torch.float64)
    if options["value_weighted"]:
        norm = look_weights(torch.cat([keys, k], 2), torch.cat([values, v], 2))
    age = ages.clamp_min(0).double()[:, None, :, None]
    pad = torch.zeros_like(k[..., 0], dtype=torch.float32)
    mass, peak = (torch.cat([t, pad], 2).double() for t in (mass, peak))
    mass_decay, peak_decay = options["mass_decay"], options["peak_decay"]
    count = count[:, None, None].double()
    mass = mass * mass_decay**count + norm * (p * mass_decay**age).sum(2)
    own = torch.arange(column_ages.shape[2], device=q.device) >= keys.shape[2]
    far = own & (distance > options["peak_reach"]) if options["peak_reach"] else torch.zeros_like(visible)
    peak = torch.maximum(peak * peak_decay**count, norm * (p * peak_decay**age).masked_fill(far, 0.0).amax(2))
    return out, mass, peak


def prefill_case(
    seed,
    dtype,
    group,
    head_dim,
    queries,
    slots,
    *,
    batch=2,
    kv_heads=1,
    window=0,
    softcap=0.0,
    weighted=False,
    padded=True,
    full=False,
    decays=(MASS_DECAY, PEAK_DECAY),
    reach=None,
):
    generator = torch.Generator().manual_seed(seed)
    filled = [slots if full else int(torch.randint(0, slots + 1, (), generator=generator)) for _ in range(batch)]
    state = buffers(batch, kv_heads, slots, head_dim, dtype, filled, generator)
    q = torch.randn(batch, queries, kv_heads * group, head_dim, generator=generator).transpose(1, 2)
    k, v = torch.randn(2, batch, queries, kv_heads, head_dim, generator=generator).transpose(2, 3)
    ages = torch.arange(queries - 1, -1, -1, dtype=torch.int32).repeat(batch, 1)
    if padded:
        for b in range(1, batch):
            ages[b, : min(5 * b, queries - 2)] = -1
        for t in (q, k, v):
            t.masked_fill_((ages < 0)[:, None, :, None], math.nan)
    arguments = [q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype), *state[:3], ages.to(DEVICE), *state[3:]]
    options = {
        "scale": head_dim**-0.5,
        "mass_decay": decays[0],
        "peak_decay": decays[1],
        "value_weighted": weighted,
        "look_gap": 3 * weighted,
        "peak_reach": reach,
        "softcap": softcap,
        "window": window,
        "first_position": torch.tensor(filled, dtype=torch.int32, device=DEVICE),
    }
    return arguments, options


def check_prefill(arguments, options):
    expected = naive_prefill(*arguments, **options)
    actual = kernels.prefill(*arguments, **options)
    close(actual[0], expected[0], TOLERANCE[actual[0].dtype])
    close(actual[1], expected[1], 1e-4)
    close(actual[2], expected[2], 1e-4)


@pytest.mark.parametrize(("dtype", "head_dim"), DIMS)
def test_prefill_dims(dtype, head_dim):
    queries, slots = (333, 200) if NATIVE else (37, 21)
    check_prefill(*prefill_case(head_dim, dtype, 2, head_dim, queries, slots))


@pytest.mark.parametrize("group", range(1, 9))
def test_prefill_groups(group):
    queries, slots = (200, 70) if NATIVE else (35, 17)
    padded = group % 4 == 0
    case = prefill_case(group, torch.float32, group, 64, queries, slots, batch=1 + padded, padded=padded, weighted=True)
    check_prefill(*case)


@pytest.mark.parametrize("slots", [0, 25])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (6, 0.0), (50, 3.0)])
def test_prefill_masks(slots, padded, window, softcap):
    queries = 300 if NATIVE else 45
    check_prefill(*prefill_case(1, torch.float32, 2, 64, queries, slots, window=window, softcap=softcap, padded=padded))


@pytest.mark.parametrize("decays", [(1.0, 0.9995), (0.998, 0.998), (1.0, 1.0), (0.0, 0.9995), (31 / 32, 0.9995)])
def test_prefill_decays(decays):
    check_prefill(*prefill_case(2, torch.float32, 2, 64, 45, 20, decays=decays))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [0, 64])
def test_prefill_plain(dtype, slots):
    queries = 700 if NATIVE else 40
    check_prefill(*prefill_case(4, dtype, 4, 128, queries, slots, padded=False, full=True, weighted=True))


@pytest.mark.parametrize("reach", [1, 20, 64, 150, 1000])
@pytest.mark.parametrize(("slots", "padded", "window"), [(0, False, 0), (25, False, 0), (25, True, 0), (0, False, 40)])
def test_prefill_reach(reach, slots, padded, window):
    queries = 900 if NATIVE else 200
    rest = {"window": window, "padded": padded, "weighted": True}
    check_prefill(*prefill_case(8, torch.float32, 2, 64, queries, slots, reach=reach, **rest))


@pytest.mark.parametrize("decays", [(0.95, 0.95), (0.999, 0.95), (0.95, 0.999)])
def test_prefill_forgets_what_has_faded(decays):
    """With 0.95 the mass no longer tells the looks of queries 540 tokens ago from none; they are not even read."""
    queries = 2000 if NATIVE else 700
    case = prefill_case(9, torch.float32, 2, 64, queries, 20, batch=1, padded=False, decays=decays, reach=30)
    check_prefill(*case)


@pytest.mark.parametrize(("padded", "slots"), [(False, 0), (True, 25)])
def test_prefill_sinks(padded, slots):
    queries = 300 if NATIVE else 45
    arguments, options = prefill_case(5, torch.float32, 2, 64, queries, slots, padded=padded, full=not padded)
    sinks = torch.linspace(-1, 3, arguments[0].shape[1], device=DEVICE)
    check_prefill(arguments, options | {"sinks": sinks})


def test_prefill_sinks_after_fused_attention(monkeypatch):
    """The fused attention knows no sinks: they are put into what it gives."""
    arguments, options = prefill_case(5, torch.float32, 2, 64, 45, 25, padded=False, full=True, batch=1)
    module = sys.modules[f"{kernels.__name__}.prefill"]

    def fused(q, k, v, causal, scale):
        x = q @ k.repeat_interleave(2, 1).mT * scale
        if causal:
            x = x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1), -math.inf)
        return x.softmax(-1) @ v.repeat_interleave(2, 1), x.logsumexp(-1)

    monkeypatch.setattr(module, "_fused", fused)
    sinks = torch.linspace(-1, 3, arguments[0].shape[1], device=DEVICE)
    check_prefill(arguments, options | {"sinks": sinks})


def test_prefill_unscored():
    arguments, options = prefill_case(3, torch.float32, 2, 64, 40, 20)
    expected = naive_prefill(*arguments, **options)
    arguments[7] = arguments[8] = None
    out, mass, peak = kernels.prefill(*arguments, **options)
    close(out, expected[0], 1e-5)
    assert mass is None
    assert peak is None


def test_prefill_agrees_with_decode_token_by_token():
    """The chunk rule and the decode rule give the same ledger when nothing is evicted."""
    n, head_dim = 12, 64
    arguments, options = prefill_case(6, torch.float32, 2, head_dim, n, 0, batch=1, padded=False)
    q, k, v = arguments[:3]
    expected = kernels.prefill(*arguments, **options)
    keys, values, positions, mass, peak = buffers(
        1, 1, n, head_dim, torch.float32, [0], torch.Generator().manual_seed(0)
    )
    ring = torch.arange(n, dtype=torch.int32, device=DEVICE).reshape(1, 1, n)
    del options["first_position"], options["peak_reach"]
    for t in range(n):
        used = torch.tensor([t], dtype=torch.int32, device=DEVICE)
        new = (q[:, :, t], k[:, :, t], v[:, :, t])
        out = kernels.decode(*new, keys, values, positions, mass, peak, ring, used, used, **options)
        close(out, expected[0][:, :, t], 1e-5)
    close(mass, expected[1], 1e-5)
    close(peak, expected[2], 1e-5)


@pytest.mark.parametrize(("dtype", "head_dim"), DIMS)
def test_place(dtype, head_dim):
    """Chosen columns arrive as they are; the other slots keep their bits, also NaN's."""
    generator = torch.Generator().manual_seed(head_dim)
    batch, heads, columns, slots = 2, 1 + NATIVE, 9, 70
    new = torch.randn(batch, columns, heads, head_dim, generator=generator).transpose(1, 2)
    stored = torch.randn(batch, heads, slots, head_dim, generator=generator)
    stored[..., 3, :] = math.nan
    source = torch.full((batch, heads, slots), -1, dtype=torch.int32)
    for row in range(batch):
        for head in range(heads):
            count = 5 + row
            chosen = torch.randperm(slots, generator=generator)[:count]
            source[row, head, chosen] = torch.randperm(columns, generator=generator)[:count].int()
    source[..., slots - 1] = columns - 1
    new, stored, source = new.to(DEVICE, dtype), stored.to(DEVICE, dtype), source.to(DEVICE)
    expected = stored.clone()
    for row, head, slot in (source >= 0).nonzero().tolist():
        expected[row, head, slot] = new[row, head, source[row, head, slot]]
    for given in (new, new.mT.contiguous().mT):  # the second's last axis has gaps
        slots_now = stored.clone()
        kernels.place(source, given, slots_now)
        assert torch.equal(slots_now.view(torch.uint8), expected.view(torch.uint8))


def test_available():
    assert kernels.available() == NATIVE
    assert not kernels.available("cpu")
