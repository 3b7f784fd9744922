"""Coded keys and values against a naive twin: plain Python and numpy in double precision, no code in common."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liquidfusion.compute import codes
from liquidfusion.compute.codes import Codes, Coding
from liquidfusion.exceptions import ConfigError, TensorError

DIMS = (64, 128, 80, 96, 72, 40, 16, 8, 20, 5, 1, 100, 256)
STEPS = {8: 0.03076, 4: 0.3352, 2: 0.9957}


class Twin:
    """The coding of one vector as it is described: rotate, divide by the step, round down, scale to the length."""

    def __init__(self, bits, head_dim):
        self.bits, self.head_dim = bits, head_dim
        self.width = head_dim
        while self.width % 8:
            self.width += 1
        self.rotation = np.zeros((self.width, self.width))
        start, rest, size = 0, self.width, 1 << 20
        while rest:
            if size <= rest:
                for i in range(size):
                    for j in range(size):
                        odd = bin(i & j).count("1") % 2
                        self.rotation[start + i, start + j] = (-1 if odd else 1) / math.sqrt(size)
                start, rest = start + size, rest - size
            else:
                size //= 2
        state = 7
        for i in range(self.width):
            state = (6364136223846793005 * state + 1442695040888963407) & (2**64 - 1)
            if state >= 2**63:
                self.rotation[:, i] *= -1

    def rotated(self, x):
        return self.rotation[:, : self.head_dim] @ np.asarray(x, dtype=np.float64)

    def coordinates(self, y):
        """Where each coordinate lies among the borders of the codes: code c has [c, c + 1)."""
        rms = np.linalg.norm(y) / math.sqrt(self.width)
        return y / (STEPS[self.bits] * rms) + 2 ** (self.bits - 1)

    def unpack(self, packed):
        parts, width = 8 // self.bits, self.width
        return np.array([(int(packed[j % (width // parts)]) >> (j // (width // parts) * self.bits)) % 2**self.bits
                         for j in range(width)])  # fmt: skip

    def decoded(self, packed, scale):
        """In rotated space."""
        return float(scale) * (2.0 * self.unpack(packed) - (2**self.bits - 1))

    def check(self, x, packed, scale):
        """Each code is the right one, or its coordinate within 1e-4 of a border; the scale keeps the length."""
        y = self.rotated(x)
        if not y.any():
            assert scale == 0
            return
        at, found = self.coordinates(y), self.unpack(packed)
        right = np.clip(np.floor(at), 0, 2**self.bits - 1)
        near = np.abs(at - np.round(at)) < 1e-4
        assert ((found == right) | (near & (np.abs(found - right) <= 1))).all()
        expected = np.linalg.norm(y) / np.linalg.norm(2.0 * found - (2**self.bits - 1))
        assert float(scale) == pytest.approx(min(expected, 65504), rel=6e-4, abs=4e-8)


def vectors(shape, seed=0, dtype=torch.float32, bias=0.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + bias
    return x.to(dtype)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_the_twins(bits, head_dim, dtype):
    x = vectors((2, 3, 4, head_dim), head_dim + bits, dtype)
    x[0, 1, 2] = 0
    x[1, 0, 0] *= 1000
    x[1, 0, 1] *= 1e-3
    mu = vectors((3, head_dim), 1)
    twin, coding = Twin(bits, head_dim), Coding(bits, head_dim, mu)
    for coded in (coding.encode(x), codes.encode(x.float() - mu[:, None], bits)):
        assert coded.codes.shape == (2, 3, 4, twin.width * bits // 8)
        assert coded.scales.shape == (2, 3, 4)
        for index in np.ndindex(2, 3, 4):
            centred = (x[index].float() - mu[index[1]]).numpy()
            twin.check(centred, coded.codes[index].numpy(), coded.scales[index])
    back = coding.decode(coded, torch.float32)
    for index in np.ndindex(2, 3, 4):
        rotated = twin.decoded(coded.codes[index].numpy(), coded.scales[index])
        expected = twin.rotation[:, :head_dim].T @ rotated + mu[index[1]].numpy()
        np.testing.assert_allclose(back[index], expected, rtol=1e-5, atol=1e-4 * (1 + np.abs(expected).max()))


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([8, 4, 2]),
    head_dim=st.integers(1, 140),
    columns=st.integers(0, 5),
    exponent=st.integers(-44, 25),
    seed=st.integers(0, 2**31),
)
def test_torch_and_the_core_agree_bit_for_bit(bits, head_dim, columns, exponent, seed):
    x = vectors((1, 2, columns, head_dim), seed) * 10.0**exponent
    if columns > 1:
        x[0, 0, 1] = 0
    core, plain = Coding(bits, head_dim).encode(x), codes.encode(x, bits)
    assert torch.equal(core.codes, plain.codes)
    assert torch.equal(core.scales, plain.scales)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_code_depends_on_its_vector_alone(bits):
    x = vectors((4, 3, 70, 96), 5)
    mu = vectors((3, 96), 6)
    coding = Coding(bits, 96, mu)
    whole, plain = coding.encode(x), codes.encode(x - mu[:, None], bits)
    for batch, column in ((0, 0), (3, 69), (2, 17)):
        for one in (
            coding.encode(x[batch : batch + 1, :, column : column + 1]),
            codes.encode(x[batch : batch + 1, :, column : column + 1] - mu[:, None], bits),
        ):
            for part, all_of_it in zip(one, whole, strict=True):
                assert torch.equal(part[0, :, 0], all_of_it[batch, :, column])
    assert all(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))
    threaded = Coding(bits, 96, mu, threads=1).encode(x)
    assert all(torch.equal(a, b) for a, b in zip(whole, threaded, strict=True))


@pytest.mark.parametrize(("bits", "most"), [(8, 0.012), (4, 0.125), (2, 0.4)])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 72, 40])
def test_error_and_length(bits, most, head_dim):
    x = vectors((1, 1, 500, head_dim), 3)
    x[..., 3] *= 30  # one channel that sticks out, as keys have them
    x[..., 40 % head_dim] += 5
    coding = Coding(bits, head_dim)
    back = coding.decode(coding.encode(x), torch.float32)
    error = (back - x).norm(dim=-1) / x.norm(dim=-1)
    assert error.square().mean().sqrt() < most
    # Where coordinates do not fill whole bytes the part that decodes into the padding is cut off.
    torch.testing.assert_close(back.norm(dim=-1), x.norm(dim=-1), rtol=2e-3, atol=0)


def test_far_ends():
    coding = Coding(4, 64)
    x = vectors((1, 1, 6, 64))
    x[0, 0, 0] *= 1e9
    x[0, 0, 1] *= 1e-12
    x[0, 0, 2] = 0
    x[0, 0, 3, 5] = torch.nan
    x[0, 0, 4, 5] = torch.inf
    for coded in (coding.encode(x), codes.encode(x, 4)):
        scales = coded.scales[0, 0]
        assert scales[0] == 65504
        assert scales[1] == 0
        assert scales[2] == 0
        assert not scales[3].isfinite()
        assert not scales[4].isfinite()
        assert scales[5] > 0
        back = coding.decode(Codes(coded.codes[:, :, 1:3], coded.scales[:, :, 1:3]), torch.bfloat16)
        assert not back.any()


def rotated(coding, coded):
    """What the codes stand for, not rotated back, by the twin."""
    twin = Twin(coding.bits, coding.head_dim)
    found = torch.zeros((*coded.scales.shape, twin.width), dtype=torch.float64)
    for index in np.ndindex(*coded.scales.shape):
        mu = np.zeros(coding.head_dim) if coding.mu is None else coding.mu[index[1]].numpy()
        found[index] = torch.from_numpy(
            twin.decoded(coded.codes[index].numpy(), coded.scales[index]) + twin.rotated(mu)
        )
    return found


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("head_dim", [64, 128, 80, 96, 72, 40, 5])
@pytest.mark.parametrize("centred", [False, True])
def test_attention_over_codes_is_attention_over_what_they_stand_for(bits, head_dim, centred):
    batch, heads, queries, slots = 1, 2, 5, 300
    mu = vectors((heads, head_dim), 9) if centred else None
    coding = Coding(bits, head_dim, mu)
    coded = coding.encode(vectors((batch, heads, slots, head_dim), 1, bias=0.5))
    plain = coding.decode(coded, torch.float32).double()
    query = vectors((batch, heads, queries, head_dim), 2)
    weights = vectors((batch, heads, queries, slots), 3).softmax(-1)
    logits, outputs = coding.logits(query, coded), coding.outputs(weights, coded)
    torch.testing.assert_close(logits.double(), query.double() @ plain.transpose(2, 3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.double(), weights.double() @ plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        coding.lengths(coded).double(), rotated(coding, coded).norm(dim=-1), rtol=1e-4, atol=1e-5
    )
    if head_dim % 8 == 0:
        torch.testing.assert_close(coding.lengths(coded).double(), plain.norm(dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_other_devices_take_plain_torch(bits, monkeypatch):
    """The paths of other devices, on the CPU."""
    coding = Coding(bits, 80, vectors((2, 80), 9))
    coded = coding.encode(vectors((1, 2, 33, 80), 1))
    query, weights = vectors((1, 2, 3, 80), 2), vectors((1, 2, 3, 33), 3).softmax(-1)
    held = torch.ones(1, 2, 33, dtype=torch.bool)

    def everything():
        return [
            coding.logits(query, coded),
            coding.outputs(weights, coded),
            coding.lengths(coded),
            coding.distinctness(coded, held),
        ]

    core = everything()
    monkeypatch.setattr(codes, "_HOST", "none")
    for ours, plain in zip(core, everything(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    again = coding.encode(vectors((1, 2, 33, 80), 1))
    assert all(torch.equal(a, b) for a, b in zip(coded, again, strict=True))


def test_empty_slots_hold_nothing():
    coding = Coding(4, 64, vectors((2, 64)))
    empty = coding.empty(1, 2, 5, "cpu")
    assert coding.nbytes == 34
    assert sum(t.nbytes for t in empty) == 1 * 2 * 5 * coding.nbytes
    assert not any(t.any() for t in empty)
    assert Coding(4, 64).outputs(torch.ones(1, 2, 1, 5), empty).eq(0).all()
    assert Coding(4, 64).lengths(empty).eq(0).all()
    assert Coding(4, 64).distinctness(empty, torch.zeros(1, 2, 5, dtype=torch.bool)).eq(0).all()


def test_autocast_changes_nothing():
    coding = Coding(4, 64, vectors((2, 64)))
    x, query = vectors((1, 2, 9, 64)), vectors((1, 2, 1, 64), 4)
    coded = coding.encode(x)
    expected = coding.logits(query, coded), coding.decode(coded, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = coding.encode(x)
        found = coding.logits(query, coded), coding.decode(coded, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(coded, inside, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def naive_distinctness(keys, held):
    keys = keys.double()
    units = [k / (k.norm() or 1.0) if h else k * 0 for k, h in zip(keys, held, strict=True)]
    mean = sum(units)
    norm = mean.norm() or 1.0
    return torch.stack([-(u @ mean) / norm if h else torch.tensor(0.0) for u, h in zip(units, held, strict=True)])


@settings(deadline=None, max_examples=40)
@given(
    slots=st.integers(1, 70),
    head_dim=st.sampled_from([64, 80, 5]),
    share=st.floats(0, 1),
    bias=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_distinctness(slots, head_dim, share, bias, seed):
    keys = vectors((2, 2, slots, head_dim), seed, bias=bias)
    keys[0, 0, 0] = 0
    held = torch.rand((2, 2, slots), generator=torch.Generator().manual_seed(seed)) <= share
    found = codes.distinctness(keys, held)
    coding = Coding(4, head_dim, vectors((2, head_dim), seed + 1))
    coded = coding.encode(keys)
    decoded, from_codes = rotated(coding, coded), coding.distinctness(coded, held)
    for index in np.ndindex(2, 2):
        torch.testing.assert_close(
            found[index].double(), naive_distinctness(keys[index], held[index]).double(), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            from_codes[index].double(), naive_distinctness(decoded[index], held[index]).double(), rtol=1e-3, atol=2e-4
        )


def test_distinctness_has_one_order():
    keys, held = vectors((3, 4, 517, 64), 1, bias=1.0), torch.ones(3, 4, 517, dtype=torch.bool)
    coding = Coding(4, 64, vectors((4, 64), 2))
    coded = coding.encode(keys)
    alone = Codes(coded.codes[1:2], coded.scales[1:2])
    assert torch.equal(codes.distinctness(keys, held)[1:2], codes.distinctness(keys[1:2], held[1:2]))
    assert torch.equal(coding.distinctness(coded, held)[1:2], coding.distinctness(alone, held[1:2]))
    one_thread = Coding(4, 64, vectors((4, 64), 2), threads=1)
    assert torch.equal(coding.distinctness(coded, held), one_thread.distinctness(coded, held))


def test_the_rotation_is_orthonormal():
    for head_dim in DIMS:
        matrix = codes.rotation(head_dim, torch.device("cpu"))
        assert matrix.shape == (codes.width(head_dim), head_dim)
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(head_dim), rtol=0, atol=1e-6)
        np.testing.assert_allclose(matrix, Twin(4, head_dim).rotation[:, :head_dim], atol=1e-6)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"\[2, 4, 8\], got 5"):
        Coding(5, 64)
    with pytest.raises(TensorError, match=r"\[kv_heads, 64\]"):
        Coding(4, 64, torch.zeros(2, 63))
    with pytest.raises(TensorError, match="mu must be float32"):
        Coding(4, 64, torch.zeros(2, 64, dtype=torch.bfloat16))
