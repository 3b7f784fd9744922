"""Time the kernels over codes beside those over 16-bit slots, in one run on one card; checks first, the table last.

python benches/kernels_coded.py            # Llama-3.1-8B shape, about 3 minutes
python benches/kernels_coded.py --sweep    # other splits and numbers of registers too
compute-sanitizer --tool memcheck python benches/kernels_coded.py --small    # checks on small shapes, no timing
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from kernels import RULES, copy_rate, decode_layers, kernels, median_ms, place_case, time_decode

coded_module = sys.modules[f"{kernels.__name__}.coded"]
PAIRS = ((4, 4), (8, 4), (4, 2), (8, 8), (16, 4))


def rotation() -> torch.Tensor:
    """A Hadamard matrix of 128 rows with random signs of its columns, float32."""
    matrix = torch.ones(1, 1, device="cuda")
    while len(matrix) < 128:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix * (torch.randint(0, 2, (128,), device="cuda") * 2.0 - 1)


def coded_side(shape: tuple[int, int, int], bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random slots of head_dim 128, lengths about those of normal coordinates."""
    if bits == 16:
        return torch.randn(*shape, 128, dtype=torch.bfloat16, device="cuda"), None
    codes = torch.randint(0, 256, (*shape, 16 * bits), dtype=torch.uint8, device="cuda")
    scales = ((torch.rand(shape, device="cuda") + 0.5) * 2.0**-bits * 4).half()
    return codes, scales


def coded_layers(
    batch: int, slots: int, layers: int, heads: tuple[int, int], bits: tuple[int, int]
) -> list[tuple[torch.Tensor | None, ...]]:
    """Arguments of `kernels.decode_coded`, one tuple per layer, every slot filled."""
    shape = (batch, heads[1], slots)
    found = []
    for q, k, v, _, _, *rest in decode_layers(batch, 1, layers, (*heads, 128)):
        _, _, _, _, used, seen = rest
        positions = torch.randperm(slots, device="cuda").int().expand(shape).contiguous()
        scores = [torch.rand(shape, device="cuda") for _ in range(2)]
        ring = torch.randint(0, slots, (*shape[:2], 128), dtype=torch.int32, device="cuda")
        sides = [t for b in bits for t in coded_side(shape, b)]
        found.append((q, k, v, *sides, positions, *scores, ring, used, seen.fill_(slots)))
    return found


def coded_states(codes: torch.Tensor, scales: torch.Tensor | None, turn: torch.Tensor, mu: torch.Tensor | None):
    """What stored slots stand for, float64, in plain torch."""
    if scales is None:
        return codes.double()
    bits = codes.shape[-1] // 16
    parts = torch.cat([(codes >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], -1).double()
    states = ((2 * parts - (2**bits - 1)) * scales.double()[..., None]) @ turn.double()
    return states if mu is None else states + mu.double()[:, None]


def check_coded(bits: tuple[int, int], sinks: bool, idle: bool) -> str:
    """Compare a step over codes with float64 of what is stored after it, and the code of the new token."""
    (arguments,) = coded_layers(3, 700, 1, (32, 8), bits)
    turn, mu = rotation(), torch.randn(8, 128, device="cuda")
    q, k, v, keys, key_scales, values, value_scales, positions, mass, peak, ring, _, seen = arguments
    positions[1, :, 500:] = -1
    for scales in (key_scales, value_scales):
        if scales is not None:
            scales[1, :, 500:] = torch.nan
    ring[1] = 600
    old = mass.double(), peak.double()
    active = torch.tensor([1, 1, 0], dtype=torch.int8, device="cuda") if idle else None
    extra = torch.randn(32, device="cuda") if sinks else None
    options = {"scale": 128**-0.5, **RULES}
    mean = (mu @ turn.T).contiguous() if bits[0] < 16 else None
    out = kernels.decode_coded(*arguments, active, extra, rotation=turn, mean=mean, bits=bits, **options)
    rows = torch.arange(3 - idle, device="cuda")
    target = ring[rows, :, 0].long()
    for new, side, scales, centre in ((k, keys, key_scales, mu), (v, values, value_scales, None)):
        stored = coded_states(side, scales, turn, centre if scales is not None else None)
        stored = stored[rows[:, None], torch.arange(8, device="cuda"), target]
        error = ((stored - new[rows].double()).norm() / new[rows].double().norm()).item()
        b = 16 if scales is None else side.shape[-1] // 16
        assert error < {16: 1e-6, 8: 0.02, 4: 0.2, 2: 0.5}[b], (bits, error)
    there = positions >= 0
    keys = coded_states(keys, key_scales, turn, mu if bits[0] < 16 else None)
    values = coded_states(values, value_scales, turn, None)
    keys, values = (torch.where(there[..., None], t, 0.0) for t in (keys, values))
    x = torch.einsum("bhgd,bhsd->bhgs", q.double().unflatten(1, (8, 4)), keys) * options["scale"]
    x = x.masked_fill(~there[:, :, None], -torch.inf)
    if extra is not None:
        x = torch.cat([x, extra.double().reshape(1, 8, 4, 1).expand(3, -1, -1, -1)], -1)
    p = x.softmax(-1)[..., :700]
    wanted = torch.einsum("bhgs,bhsd->bhgd", p, values).flatten(1, 2)
    far = seen[:, None, None] - positions >= RULES["look_gap"]
    weight = torch.nan_to_num(values.norm(dim=-1) / keys.norm(dim=-1))
    looks = p.mean(2) * far * weight
    for score in old:
        score[rows[:, None], torch.arange(8, device="cuda"), target] = 0
    results = [(out, wanted, 2e-2), (mass, old[0] * RULES["mass_decay"] + looks, 5e-3)]
    results.append((peak, torch.maximum(old[1] * RULES["peak_decay"], looks), 5e-3))
    errors = []
    for actual, expected, limit in results:
        error = ((actual[rows].double() - expected[rows]).norm() / expected[rows].norm()).item()
        assert error < limit, (bits, errors, error)
        errors.append(error)
    if idle:
        assert (out[2] == 0).all()
        assert torch.equal(mass[2].double(), old[0][2])
    return f"errors at bits {bits}: output {errors[0]:.1e}, mass {errors[1]:.1e}, peak {errors[2]:.1e}"


def check_states() -> str:
    """Check the coding of chunks, its way back, and distinctness against plain torch."""
    turn, mu = rotation(), torch.randn(8, 128, device="cuda")
    mean = (mu @ turn.T).contiguous()
    source, new, _ = place_case(2, 8, 300, 100)
    errors = []
    for bits in (8, 4, 2):
        codes, scales = kernels.encode_states(new, turn, mean, bits)
        states = coded_states(codes, scales, turn, mu)
        close = kernels.decode_states(codes, scales, turn, mu, 128, torch.float32)
        assert (close - states).norm() / states.norm() < 1e-5
        errors.append(((states - new.double()).norm() / (new - mu[:, None]).double().norm()).item())
        slots = (
            torch.zeros(2, 8, 300, 16 * bits, dtype=torch.uint8, device="cuda"),
            torch.zeros(2, 8, 300, device="cuda"),
        )
        slots = slots[0], slots[1].half()
        kernels.place_coded(source, new, *slots, turn, mean)
        column = source.clamp(min=0).long()
        placed = torch.where((source >= 0)[..., None], codes.gather(2, column[..., None].expand(slots[0].shape)), 0)
        assert torch.equal(slots[0], placed)
    held = torch.rand(2, 8, 100, device="cuda") > 0.1
    codes, scales = kernels.encode_states(new, turn, mean, 4)
    for part, states in (
        ((new.contiguous(), None, held), new),
        ((codes, scales, held), coded_states(codes, scales, turn, mu)),
    ):
        unit = torch.nn.functional.normalize(states.double(), dim=-1) * held[..., None]
        total = unit.sum(2, keepdim=True)
        wanted = -(unit * total).sum(-1) / total.norm(dim=-1)
        actual = kernels.distinctness(part, mean=mean, width=None if part[1] is None else 128)
        assert (actual - wanted).norm() / wanted.norm() < 1e-4
    return "noise of 8, 4 and 2 bits: " + ", ".join(f"{error:.3f}" for error in errors)


def coded_time(layers: list[tuple[torch.Tensor | None, ...]], bits: tuple[int, int], turn: torch.Tensor) -> float:
    """Microseconds per layer, replayed from one CUDA graph over all layers."""
    mean = torch.randn(layers[0][1].shape[1], 128, device="cuda")

    def step() -> None:
        for arguments in layers:
            kernels.decode_coded(*arguments, rotation=turn, mean=mean, bits=bits, scale=128**-0.5, **RULES)

    return median_ms(step, 20) / len(layers) * 1e3


def bench_coded(rate: float, sweep: bool) -> list[str]:
    """Rows of the table: the decode step of one layer over codes beside that over 16 bits."""
    turn = rotation()
    rows = []
    for batch in (1, 8, 64, 256, 512):
        count = {1: 32, 8: 8, 64: 4}.get(batch, 2)
        layers = list(decode_layers(batch, 2048, count, (32, 8, 128)))
        base = time_decode(layers)
        del layers
        for bits in ((4, 4), (8, 4), (4, 2)) if batch == 64 else ((4, 4),):
            layers = coded_layers(batch, 2048, count, (32, 8), bits)
            read = batch * 8 * 2048 * (16 * sum(bits) + 4 + 4 + 16)
            time, floor = coded_time(layers, bits, turn), read / rate * 1e6
            rows.append(
                f"decode B={batch} bits={bits}: {time:.1f} us, 16 bits {base:.1f} us, ratio {time / base:.3f}, "
                f"floor {floor:.1f} us, {floor / time:.0%} of the copy rate"
            )
            if sweep and bits == (4, 4):
                rows += sweep_coded(layers, bits, turn)
            del layers
    return rows


def sweep_coded(layers: list[tuple[torch.Tensor | None, ...]], bits: tuple[int, int], turn: torch.Tensor) -> list[str]:
    """Times of other splits and numbers of registers."""
    config, registers = coded_module._config, coded_module.REGISTERS
    rows, pairs = [], layers[0][7].shape[0] * layers[0][7].shape[1]
    for coded_module.REGISTERS in (128, 168):
        for splits in (1, 2, 3, 4, 6, 8, 16, 32, 64):
            if not 64 <= pairs * splits <= 20000:
                continue
            each = -(-64 // splits) * 32
            coded_module._config = lambda *_, c=(-(-2048 // each), each): c
            rows.append(
                f"    registers {coded_module.REGISTERS} splits {splits}: {coded_time(layers, bits, turn):.1f} us"
            )
    coded_module._config, coded_module.REGISTERS = config, registers
    return rows


def bench_states(rate: float) -> list[str]:
    """Rows of the table: a chunk into coded slots, codes into states, distinctness; one layer's keys."""
    turn, mean = rotation(), torch.randn(8, 128, device="cuda")
    rows = []
    for batch, columns in ((1, 2048), (64, 256)):
        source, new, stored = place_case(batch, 8, 2048, columns)
        codes, scales = coded_side((batch, 8, 2048), 4)
        held = torch.ones(batch, 8, 2048, dtype=torch.bool, device="cuda")
        slots = batch * 8 * 2048
        codes_distinct = partial(kernels.distinctness, (codes, scales, held), mean=mean, width=128)
        for name, call, moved in (
            (f"place {columns} columns", partial(kernels.place, source, new, stored), slots * 4 + 2 * new.nbytes),
            (
                f"place {columns} columns as codes",
                partial(kernels.place_coded, source, new, codes, scales, turn, mean),
                slots * 4 + new.nbytes + new.nbytes // 4,
            ),
            (
                "codes to states",
                partial(kernels.decode_states, codes, scales, turn, mean, 128, torch.bfloat16),
                slots * (66 + 256),
            ),
            ("distinctness of 16 bits", partial(kernels.distinctness, (stored, None, held)), slots * (2 * 257 + 4)),
            ("distinctness of codes", codes_distinct, slots * (2 * 67 + 4)),
        ):
            time, floor = median_ms(call, 10) * 1e3, moved / rate * 1e6
            rows.append(f"{name}, B={batch}: {time:.0f} us, floor {floor:.0f} us")
    return rows


def check() -> list[str]:
    """Every kernel against plain torch."""
    return [*(check_coded(bits, bits == (4, 4), bits[1] == 4) for bits in PAIRS), check_states()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="also time other splits and numbers of registers")
    parser.add_argument("--small", action="store_true", help="check each kernel on small shapes, without timing")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, *check(), sep="\n", flush=True)
    if options.small:
        return
    rate = copy_rate()
    print(f"copy {rate / 1e12:.2f} TB/s", *bench_coded(rate, options.sweep), *bench_states(rate), sep="\n")


if __name__ == "__main__":
    main()
