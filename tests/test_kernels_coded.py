"""The kernels over codes against naive torch twins, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math

import pytest
import torch

from test_kernels import DEVICE, MASS_DECAY, NATIVE, PEAK_DECAY, buffers, close, kernels, naive

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

STEPS = {8: 0.03076, 4: 0.3352, 2: 0.9957}
PAIRS = [(4, 4), (8, 4), (4, 2), (8, 8), (4, 8), (8, 2), (16, 4), (4, 16), (8, 16), (16, 2)]


def hadamard(size):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def rotation_of(width, seed=0):
    """Blocks of Hadamard matrices, largest first, times random signs; float64."""
    sizes = [1 << bit for bit in range(width.bit_length() - 1, -1, -1) if width >> bit & 1]
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return torch.block_diag(*map(hadamard, sizes)) * signs


def levels_of(codes, bits):
    """Levels of packed codes, float64 [..., width]."""
    parts = [codes.long() >> (bits * i) & (2**bits - 1) for i in range(8 // bits)]
    return torch.cat(parts, -1).double() * 2 - (2**bits - 1)


def encode_of(y, bits):
    """(codes, scales, coordinates in steps) of rotated vectors in float64."""
    norm = y.norm(dim=-1, keepdim=True)
    steps = y / (STEPS[bits] * norm / math.sqrt(y.shape[-1])) + 2 ** (bits - 1)
    code = torch.nan_to_num(steps, nan=2 ** (bits - 1)).floor().clamp(0, 2**bits - 1)
    scale = norm[..., 0] / (2 * code - (2**bits - 1)).norm(dim=-1)
    parts = code.long().unflatten(-1, (8 // bits, -1)).unbind(-2)
    return sum(part << bits * i for i, part in enumerate(parts)).to(torch.uint8), scale.half(), steps


def decoded(codes, scales, bits, rotation, mu, head_dim):
    """What the codes stand for, float64 [batch, heads, slots, head_dim]."""
    states = levels_of(codes, bits) * scales.double()[..., None] @ rotation.to(codes.device)
    return states[..., :head_dim] + mu.to(codes.device)[:, None]


def check_codes(codes, scales, expected, bits):
    """Equal, or coded from a coordinate within 1e-4 of a border of two codes; the scales follow."""
    wanted, wanted_scales, steps = expected
    actual = levels_of(codes, bits) / 2
    off = actual != levels_of(wanted, bits) / 2
    assert ((steps - steps.round()).abs()[off] < 1e-4).all(), "another code far from a border"
    assert ((actual - levels_of(wanted, bits) / 2).abs()[off] <= 1).all()
    norm = wanted_scales.double() * levels_of(wanted, bits).norm(dim=-1)
    close(scales.double() * levels_of(codes, bits).norm(dim=-1), norm, 1e-3)


class Case:
    """Coded slots, some empty with garbage in them, and a new token."""

    def __init__(self, seed, bits, dtype=torch.float32, group=2, head_dim=64, **options):
        generator = torch.Generator().manual_seed(seed)
        batch, kv_heads = options.pop("batch", 2), options.pop("kv_heads", 1 + NATIVE)
        slots = int(torch.randint(17, 300 if NATIVE else 50, (), generator=generator))
        slots = options.pop("slots", slots)
        self.bits, self.dtype, self.head_dim = bits, dtype, head_dim
        width = -(-head_dim // 8) * 8
        self.rotation = rotation_of(width).to(DEVICE)
        self.mu = torch.randn(kv_heads, head_dim, generator=generator, dtype=torch.float64).to(DEVICE)
        self.mu *= options.pop("mean", 1.0)
        filled = [slots, *(int(torch.randint(0, slots, (), generator=generator)) for _ in range(batch - 1))]
        keys, values, self.positions, self.mass, self.peak = buffers(
            batch, kv_heads, slots, head_dim, torch.float32, filled, generator
        )
        empty = self.positions < 0
        self.sides = []
        for states, mu, b in ((keys, self.mu, bits[0]), (values, torch.zeros_like(self.mu), bits[1])):
            if b == 16:
                self.sides.append([states.to(torch.bfloat16 if dtype == torch.float32 else dtype).contiguous(), None])
                continue
            codes, scales, _ = encode_of(self.rotated(torch.nan_to_num(states.double()) - mu[:, None]), b)
            codes[empty] = 77
            scales[empty] = math.nan
            self.sides.append([codes.contiguous(), scales.contiguous()])
        # Far from what the codes say, so that it is seen which of both is attended.
        kept = options.pop("first", 0)
        self.firsts = [None, None]
        for side in (0, 1):
            if kept and bits[side] < 16:
                first = torch.randn(batch, kv_heads, kept, width, generator=generator).to(DEVICE)
                first[empty[:, :, :kept]] = math.nan
                self.firsts[side] = first.to(torch.float16 if dtype == torch.float16 else torch.bfloat16)
        self.q = torch.randn(batch, kv_heads * group, head_dim, generator=generator).to(DEVICE, dtype)
        kv = torch.randn(batch, 2 * kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
        self.k, self.v = kv[:, :kv_heads], kv[:, kv_heads:]
        self.k = self.k + self.mu.to(dtype)
        self.used = (torch.arange(batch, dtype=torch.int32) + 3).to(DEVICE)
        self.seen = torch.tensor(filled, dtype=torch.int32, device=DEVICE)
        ring = torch.randint(0, slots, (batch, kv_heads, 4), generator=generator, dtype=torch.int32)
        for b in range(batch):
            if filled[b] < slots:
                ring[b, :, (b + 3) % 4] = empty[b].int().argmax(-1).cpu()
        if kept:
            ring[0, :, 3] = kept - 1
        self.ring = ring.to(DEVICE)
        self.active = self.sinks = None
        self.centred = True
        self.options = {
            "scale": head_dim**-0.5,
            "mass_decay": MASS_DECAY,
            "peak_decay": PEAK_DECAY,
            "value_weighted": True,
            "look_gap": 0,
            "softcap": 0.0,
            "window": 0,
            "chunked": False,
        } | options

    def rotated(self, states):
        missing = self.rotation.shape[0] - states.shape[-1]
        return torch.nn.functional.pad(states.double(), (0, missing)) @ self.rotation.T

    def states(self, side):
        """Keys (0) or values (1) as stored, float64."""
        stored, scales = self.sides[side]
        if scales is None:
            return stored.double()
        mu = self.mu if side == 0 else torch.zeros_like(self.mu)
        return decoded(stored, scales, self.bits[side], self.rotation, mu, self.head_dim)

    def attended(self, side):
        """Keys (0) or values (1) as attention sees them, float64."""
        states, first = self.states(side), self.firsts[side]
        if first is None:
            return states
        apart = (first.double() @ self.rotation)[..., : self.head_dim]
        if side == 0:
            apart = apart + self.mu[:, None]
        return torch.cat([apart, states[:, :, first.shape[2] :]], 2)

    def run(self):
        mean = self.rotated(self.mu).float() if self.centred and self.bits[0] < 16 else None
        return kernels.decode_coded(
            self.q,
            self.k,
            self.v,
            *self.sides[0],
            *self.sides[1],
            self.positions,
            self.mass,
            self.peak,
            self.ring,
            self.used,
            self.seen,
            self.active,
            self.sinks,
            rotation=self.rotation.float().contiguous(),
            mean=mean,
            bits=self.bits,
            key_first=self.firsts[0],
            value_first=self.firsts[1],
            **self.options,
        )

    def check(self, tolerance=None):
        """Run, compare the codes written with the twin's, and from them on the rest."""
        options = self.options
        before = [[None if t is None else t.clone() for t in side] for side in self.sides]
        positions, mass, peak = self.positions.clone(), self.mass.clone(), self.peak.clone()
        firsts = [None if first is None else first.clone() for first in self.firsts]
        out = self.run()
        alive = torch.ones(len(self.q), dtype=torch.bool) if self.active is None else self.active.cpu() != 0
        for row in alive.nonzero()[:, 0].tolist():
            for head in range(self.k.shape[1]):
                slot = int(self.ring[row, head, int(self.used[row]) % self.ring.shape[2]])
                positions[row, head, slot] = self.seen[row]
                mass[row, head, slot] = peak[row, head, slot] = 0
                for side, new in enumerate((self.k, self.v)):
                    x, (stored, scales), (old, old_scales) = new[row, head], self.sides[side], before[side]
                    if scales is None:
                        # The interpreter rounds to bfloat16 towards zero.
                        close(stored[row, head, slot], x, 0.0 if x.dtype == stored.dtype else 1e-2)
                        old[row, head, slot] = stored[row, head, slot]
                        continue
                    y = self.rotated(x.double() - (self.mu[head] if side == 0 else 0))
                    first = self.firsts[side]
                    if first is not None and slot < first.shape[2]:
                        close(first[row, head, slot], y, 1e-2)
                        firsts[side][row, head, slot] = first[row, head, slot]
                    check_codes(
                        stored[row, head, slot], scales[row, head, slot], encode_of(y, self.bits[side]), self.bits[side]
                    )
                    old[row, head, slot], old_scales[row, head, slot] = stored[row, head, slot], scales[row, head, slot]
        for side, old in zip(self.sides, before, strict=True):
            for actual, wanted in zip(side, old, strict=True):
                if actual is not None:
                    assert torch.equal(torch.nan_to_num(actual), torch.nan_to_num(wanted))
        for first, wanted in zip(self.firsts, firsts, strict=True):
            assert first is None or torch.equal(torch.nan_to_num(first), torch.nan_to_num(wanted))
        assert torch.equal(self.positions, positions)

        there = positions >= 0
        keys, values = (torch.where(there[..., None], self.states(side), 0.0) for side in (0, 1))
        attended = (torch.where(there[..., None], self.attended(side), 0.0) for side in (0, 1))
        distance = self.seen[:, None, None] - positions
        reach = (
            self.seen % options["window"] + 1 if options["chunked"] else torch.full_like(self.seen, options["window"])
        )
        visible = there & (distance < reach[:, None, None]) if options["window"] else there
        visible = visible & alive.to(DEVICE)[:, None, None]
        wanted, p = naive(
            self.q[:, :, None], *attended, visible[:, :, None], options["scale"], options["softcap"], self.sinks
        )
        p = p[:, :, 0] * (distance >= options["look_gap"])
        if options["value_weighted"]:
            p = p * torch.nan_to_num(values.norm(dim=-1) / keys.norm(dim=-1))
        idle = ~alive.to(DEVICE)[:, None, None]
        half = self.dtype != torch.float32 or 16 in self.bits
        close(out, wanted[:, :, 0], tolerance or (1e-2 if half else 1e-5))
        wanted = torch.where(idle, mass.double(), mass * options["mass_decay"] + p)
        close(self.mass, wanted, 5e-3 if half else 1e-4)
        wanted = torch.where(idle, peak.double(), torch.maximum(peak * options["peak_decay"], p))
        close(self.peak, wanted, 5e-3 if half else 1e-4)


@pytest.mark.parametrize("bits", PAIRS)
def test_decode_coded_bits(bits):
    Case(sum(bits), bits).check()


@pytest.mark.parametrize("head_dim", [8, 20, 64, 72, 80, 96, 120, 128, 256])
@pytest.mark.parametrize("bits", [(4, 4), (8, 2)])
def test_decode_coded_dims(head_dim, bits):
    Case(head_dim, bits, torch.bfloat16 if head_dim % 16 else torch.float32, head_dim=head_dim, batch=1).check()


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_coded_groups(group, dtype):
    Case(group, (4, 4), dtype, group, batch=1).check()


@pytest.mark.parametrize(
    "options",
    [
        {"window": 9},
        {"window": 9, "chunked": True},
        {"softcap": 2.0},
        {"window": 5, "softcap": 3.0, "look_gap": 3},
        {"value_weighted": False},
        {"value_weighted": False, "look_gap": 4},
        {"mean": 20.0, "softcap": 5.0},
    ],
)
def test_decode_coded_options(options):
    Case(7, (4, 4), **options).check()


def test_decode_coded_sinks():
    case = Case(8, (4, 4))
    case.sinks = torch.tensor([2.0, -1.0] * case.k.shape[1], device=DEVICE)
    case.check()


@pytest.mark.parametrize("kind", [torch.bool, torch.int8])
def test_decode_coded_leaves_idle_rows(kind):
    case = Case(9, (4, 4), batch=3)
    case.active = torch.tensor([1, 0, 1], device=DEVICE).to(kind)
    case.check()


def test_decode_coded_unscored():
    case, scored = Case(10, (4, 2)), Case(10, (4, 2))
    case.mass = case.peak = None
    close(case.run(), scored.run(), 1e-6)


def test_decode_coded_without_a_mean():
    case = Case(11, (4, 4), mean=0.0)
    case.centred = False
    case.check()


@pytest.mark.parametrize("head_dim", [20, 64, 80, 128])
@pytest.mark.parametrize("first", [1, 4])
def test_decode_coded_first(first, head_dim):
    Case(first, (4, 4), group=3, head_dim=head_dim, first=first).check()


@pytest.mark.parametrize("bits", [(8, 4), (4, 2), (8, 8), (16, 4), (4, 16)])
def test_decode_coded_first_bits(bits):
    Case(sum(bits), bits, first=4).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_decode_coded_first_types(dtype, group):
    Case(group, (4, 4), dtype, group, first=4).check()


@pytest.mark.parametrize(
    "options",
    [
        {"window": 9},
        {"softcap": 2.0},
        {"window": 5, "softcap": 3.0, "look_gap": 3},
        {"value_weighted": False},
        {"slots": 4},
        {"slots": 40, "first": 20},
    ],
)
def test_decode_coded_first_options(options):
    Case(13, (4, 4), **{"first": 4} | options).check()


def test_decode_coded_first_of_idle_rows():
    case = Case(14, (4, 4), torch.bfloat16, batch=3, first=4)
    case.active = torch.tensor([1, 0, 1], device=DEVICE)
    case.sinks = torch.tensor([2.0, -1.0] * case.k.shape[1], device=DEVICE)
    case.check()


@pytest.mark.parametrize("first", [0, 4])
def test_decode_coded_runs_are_bit_identical(first):
    results = []
    for _ in range(2):
        case = Case(12, (4, 4), torch.bfloat16, 4, first=first)
        results.append([case.run(), case.mass, case.peak])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def states_case(seed, head_dim, dtype, columns, mean=True):
    """(states, strided, rotation, mu) of 2 rows."""
    generator = torch.Generator().manual_seed(seed)
    heads = 1 + NATIVE
    states = torch.randn(2, columns, heads, head_dim, generator=generator).transpose(1, 2).to(DEVICE, dtype)
    mu = torch.randn(heads, head_dim, generator=generator, dtype=torch.float64).to(DEVICE) * mean
    return states, rotation_of(-(-head_dim // 8) * 8).to(DEVICE), mu


def rotated(states, rotation):
    missing = rotation.shape[0] - states.shape[-1]
    return torch.nn.functional.pad(states.double(), (0, missing)) @ rotation.T


@pytest.mark.parametrize("head_dim", [8, 20, 64, 80, 96, 128])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_encode_and_decode_states(head_dim, bits):
    dtype = torch.bfloat16 if head_dim == 64 else torch.float32
    states, rotation, mu = states_case(head_dim + bits, head_dim, dtype, 37, mean=bits > 2)
    mean = rotated(mu, rotation).float() if bits > 2 else None
    codes, scales = kernels.encode_states(states, rotation.float(), mean, bits)
    for head in range(states.shape[1]):
        expected = encode_of(rotated(states[:, head].double() - mu[head], rotation), bits)
        check_codes(codes[:, head], scales[:, head], expected, bits)
    wanted = decoded(codes, scales, bits, rotation, mu, head_dim)
    for kind, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        args = (codes, scales, rotation.float(), mu.float() if bits > 2 else None, head_dim, kind)
        close(kernels.decode_states(*args), wanted, tolerance)
    for kind in (torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(head_dim)
        first = torch.randn(*states.shape[:2], 4, len(rotation), generator=generator).to(DEVICE, kind)
        wanted[:, :, :4] = (first.double() @ rotation)[..., :head_dim] + mu[:, None]
        args = (codes, scales, rotation.float(), mu.float() if bits > 2 else None, head_dim, torch.float32)
        close(kernels.decode_states(*args, first), wanted, 1e-6)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_place_coded(bits):
    """Chosen columns arrive as `encode_states` codes them; other slots keep their bits."""
    states, rotation, mu = states_case(bits, 64, torch.bfloat16, 9)
    mean, rotation = rotated(mu, rotation).float(), rotation.float()
    heads, slots = states.shape[1], 70
    source = torch.full((2, heads, slots), -1, dtype=torch.int32)
    for row in range(2):
        for head in range(heads):
            source[row, head, torch.randperm(slots)[: 5 + row]] = torch.randperm(9)[: 5 + row].int()
    source = source.to(DEVICE)
    codes = torch.full((2, heads, slots, 8 * bits), 77, dtype=torch.uint8, device=DEVICE)
    scales = torch.full((2, heads, slots), math.nan, dtype=torch.float16, device=DEVICE)
    expected = codes.clone(), scales.clone()
    coded = kernels.encode_states(states, rotation, mean, bits)
    for row, head, slot in (source >= 0).nonzero().tolist():
        for target, new in zip(expected, coded, strict=True):
            target[row, head, slot] = new[row, head, source[row, head, slot]]
    kernels.place_coded(source, states, codes, scales, rotation, mean)
    for actual, wanted in zip((codes, scales), expected, strict=True):
        assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))
    source[:, :, 0], source[:, :, 1] = 3, -1
    for size in (1, 4):
        first = torch.full((2, heads, size, 64), 7.0, dtype=torch.bfloat16, device=DEVICE)
        kernels.place_coded(source, states, codes, scales, rotation, mean, first)
        y = rotated(states, rotation.double()) - mean.double()[:, None]
        chosen = source[:, :, :size, None].long()
        wanted = torch.where(chosen < 0, 7.0, y.gather(2, chosen.clamp(min=0).expand(first.shape)))
        close(first, wanted, 1e-2)
        assert (first[chosen.expand(first.shape) < 0] == 7).all()


def test_encode_states_of_nothing_and_of_too_much():
    states = torch.zeros(1, 1, 3, 64, device=DEVICE)
    states[0, 0, 1] = math.nan
    states[0, 0, 2] = 1e30
    codes, scales = kernels.encode_states(states, rotation_of(64).float().to(DEVICE), None, 4)
    assert scales[0, 0, 0] == 0
    assert not scales[0, 0, 1].isfinite()
    assert (
        kernels.decode_states(codes, scales, rotation_of(64).float().to(DEVICE), None, 64, torch.float32)[0, 0, 0] == 0
    ).all()


def naive_distinctness(keys, held):
    unit = torch.where(held[..., None], keys.double(), 0.0)
    unit = torch.nan_to_num(unit / unit.norm(dim=-1, keepdim=True))
    mean = unit.sum(2, keepdim=True)
    return -torch.nan_to_num((unit * mean).sum(-1) / mean.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_distinctness(dtype, head_dim):
    states, _, mu = states_case(head_dim, head_dim, dtype, 75)
    states = (states + mu.to(dtype)[:, None]).contiguous()
    held = torch.rand(states.shape[:3], generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.2
    states[~held] = math.nan
    wanted = naive_distinctness(states, held)
    close(kernels.distinctness((states, None, held)), wanted, 1e-5)
    parts = [(states[:, :, a:b].contiguous(), None, held[:, :, a:b].contiguous()) for a, b in ((0, 40), (40, 75))]
    close(kernels.distinctness(*parts), wanted, 1e-5)
    assert torch.equal(kernels.distinctness((states, None, held)), kernels.distinctness((states, None, held)))


@pytest.mark.parametrize("head_dim", [8, 64, 72, 80])
@pytest.mark.parametrize("bits", [8, 4])
def test_distinctness_of_codes(head_dim, bits):
    states, rotation, mu = states_case(head_dim, head_dim, torch.float32, 75)
    mean = rotated(mu, rotation).float()
    held = torch.rand(states.shape[:3], generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.2
    codes, scales = kernels.encode_states(states, rotation.float(), mean, bits)
    wanted = naive_distinctness(decoded(codes, scales, bits, rotation, mu, head_dim), held)
    scales[~held] = math.nan
    part = (codes, scales, held)
    close(kernels.distinctness(part, mean=mean, width=len(rotation)), wanted, 1e-5)
    parts = [tuple(t[:, :, a:b].contiguous() for t in part) for a, b in ((0, 40), (40, 75))]
    close(kernels.distinctness(*parts, mean=mean, width=len(rotation)), wanted, 1e-5)


def test_distinctness_of_nothing():
    states = torch.randn(1, 1, 40, 64, device=DEVICE)
    none = torch.zeros(1, 1, 40, dtype=torch.bool, device=DEVICE)
    assert (kernels.distinctness((states, None, none)) == 0).all()
