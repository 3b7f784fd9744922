"""What a KVCache does with one class, beside transformers' own cache in the same calls."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import liquidfusion as lf
from classes.families import Case
from classes.shrink import VOCABULARY, build, small

STRATEGIES = ("streaming", "h2o", "liquid_fusion")
PROMPT, NEW = (13, 21), 4
TOLERANCE = 1e-4
BUDGET = 12
"""Slots of the bounded run, fewer than its tokens."""

WORKS, REFUSED, LATE, CRASHED, WRONG, HF_FAILS = "works", "refused", "refused late", "crashed", "WRONG", "HF fails"


@dataclass
class Outcome:
    """`status`: one of the above. `reason`: the first line of what was raised, or where answers differ."""

    name: str
    kind: str
    multimodal: bool
    status: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}/{self.kind}: {self.status}" + (f" ({self.reason})" if self.reason else "")


class DiffersError(AssertionError):
    """Answers that should be equal are not."""


def probe(case: Case) -> dict[str, Any]:
    """Classify a class; JSON's types only."""

    def outcome(status: str, error: BaseException | None = None, where: str = "") -> dict[str, Any]:
        reason = (
            ""
            if error is None
            else f"{where}{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        return asdict(Outcome(case.name, case.kind, case.multimodal, status, reason[:300]))

    try:
        model = load(case)
        references = dict(expected(model))
    except Exception as error:
        return outcome(HF_FAILS, error)
    try:
        lf.KVCache(model, "streaming", 64)
    except lf.UnsupportedError as error:
        return outcome(REFUSED, error)
    except Exception as error:
        return outcome(CRASHED, error)
    for where, check in checks(model, references):
        try:
            check()
        except DiffersError as error:
            return outcome(WRONG, error, f"{where}: ")
        except lf.UnsupportedError as error:
            return outcome(LATE, error, f"{where}: ")
        except Exception as error:
            return outcome(CRASHED, error, f"{where}: ")
    return outcome(WORKS)


def load(case: Case) -> PreTrainedModel:
    """The small model of a case, attending as eager code does where the class knows it."""
    kind = getattr(transformers, case.kind)
    try:
        model = build(kind, small(case.config, case.overrides))
    except ValueError as error:
        if "attn_implementation" not in str(error):
            raise
        model = build(kind, small(case.config, case.overrides), None)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model


def prompt(lengths: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, none of them special, as one left-padded batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, max(lengths) - length :] = torch.randint(20, VOCABULARY, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


SCENARIOS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one row": (PROMPT[1:], {}),
    "left-padded": (PROMPT, {}),
    "chunked": (PROMPT, {"prefill_chunk_size": 8}),
    "beams": (PROMPT[1:], {"num_beams": 2}),
}


def answers(model: PreTrainedModel, lengths: tuple[int, ...], new: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Sequences, and logits `[steps, rows, vocabulary]`."""
    torch.manual_seed(0)
    out = model.generate(
        **prompt(lengths), max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True,
        **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def expected(model: PreTrainedModel) -> Iterator[tuple[str, tuple[Tensor, Tensor] | None]]:
    """What transformers' own cache answers; None where transformers cannot, but for the first."""
    for name, (lengths, options) in SCENARIOS.items():
        try:
            yield name, answers(model, lengths, NEW, **options)
        except Exception:
            if name == "one row":
                raise
            yield name, None


def keyword(model: PreTrainedModel) -> str:
    """Name of the cache argument."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def checks(model: PreTrainedModel, references: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each comparison by name."""
    one, many = references["left-padded"], references["chunked"]
    if one is not None and many is not None and not alike(one[1][0], many[1][0]):
        references["chunked"] = None  # transformers' own answer to a prompt in chunks is another one
        yield "chunked", lambda: refused(model)
    for name, (lengths, options) in SCENARIOS.items():
        for strategy in STRATEGIES if name != "beams" else STRATEGIES[-1:]:
            if references[name] is not None:
                yield (
                    f"{name}, {strategy}",
                    lambda n=name, s=strategy, w=lengths, o=options: compare(model, references[n], w, s, o),
                )
    for strategy in STRATEGIES[::2]:
        yield f"bounded, {strategy}", lambda s=strategy: bounded(model, s)
    yield "fork", lambda: fork(model)
    yield "relative positions", lambda: relative(model, references["one row"])
    if one is not None:
        yield "empty row", lambda: empty(model)


def compare(
    model: PreTrainedModel, reference: tuple[Tensor, Tensor], lengths: tuple[int, ...], strategy: str, options: Any
) -> None:
    """With room for everything: transformers' own logits."""
    kv = lf.KVCache(model, strategy, 64)
    sequences, logits = answers(model, lengths, NEW, **options, **{keyword(model): kv})
    if "num_beams" in options:
        if sequences.tolist() != reference[0].tolist():
            raise DiffersError("other sequences")
        return
    close(logits, reference[1])


def alike(first: Tensor, second: Tensor) -> bool:
    """Whether two answers are the same but for rounding."""
    return bool((first - second).abs().max() <= 10 * TOLERANCE * first.abs().max().clamp(min=1))


def refused(model: PreTrainedModel) -> None:
    """A prompt in chunks must be refused."""
    lengths, options = SCENARIOS["chunked"]
    try:
        answers(model, lengths, 1, **options, **{keyword(model): lf.KVCache(model, "streaming", 64)})
    except lf.UnsupportedError:
        return
    raise DiffersError("the model forgets between chunks, and they are not refused")


def close(own: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise `DiffersError` where logits are apart by more than the tolerance, relative to the largest of them."""
    apart = (own.float() - theirs.float()).abs()
    allowed = tolerance * max(1.0, float(theirs.abs().max()))
    if not bool((apart <= allowed).all()):
        step = int((apart.flatten(1).amax(1) > allowed).int().argmax())
        raise DiffersError(f"logits of step {step} differ by {float(apart[step].max()):.1e}")


def bounded(model: PreTrainedModel, strategy: str) -> None:
    """With fewer slots than tokens: runs, evicts, and a padded row is what it is alone."""
    lengths = (23, 30)
    kv = lf.KVCache(model, strategy, BUDGET)
    together = answers(model, lengths, 5, **{keyword(model): kv})
    if not bool(together[1].isfinite().all()):
        raise DiffersError("logits are not finite")
    if not kv.evictions:
        raise DiffersError("nothing was evicted")
    if harmless(model, lengths):
        alone = lf.KVCache(model, strategy, BUDGET)
        close(together[1][:1, :1], answers(model, lengths[:1], 1, **{keyword(model): alone})[1], 10 * TOLERANCE)


def harmless(model: PreTrainedModel, lengths: tuple[int, ...]) -> bool:
    """Whether transformers' own answer to a row is the same with padding before it."""
    together, alone = answers(model, lengths, 1)[1], answers(model, lengths[:1], 1)[1]
    return bool(((together[:, :1] - alone).abs().max() <= TOLERANCE * alone.abs().max().clamp(min=1)).all())


def fork(model: PreTrainedModel) -> None:
    """A copy, and what a session brings back, go on as the cache itself does."""
    kv = lf.KVCache(model, "liquid_fusion", BUDGET)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model(**prompt((20,)), **{keyword(model): kv})
        kv.save(f"{folder}/session")
        others = [copy.deepcopy(kv), lf.KVCache.load(f"{folder}/session", model)]
        for column in prompt((3,), seed=1)["input_ids"].T:
            first, *rest = (model(input_ids=column[:, None], **{keyword(model): c}).logits for c in (kv, *others))
            for other in rest:
                close(first, other, 0.0)


def relative(model: PreTrainedModel, reference: tuple[Tensor, Tensor]) -> None:
    """Ranks in the cache are positions while nothing is evicted, or they are refused before any work."""
    try:
        kv = lf.KVCache(model, "streaming", 64, positions="cache")
    except lf.UnsupportedError:
        return
    close(answers(model, PROMPT[1:], NEW, **{keyword(model): kv})[1], reference[1])


def empty(model: PreTrainedModel) -> None:
    """A row without any token leaves the others as they are alone."""
    lengths = (PROMPT[1], 0)
    if not harmless(model, lengths):
        return
    together, alone = (
        answers(model, some, NEW, **{keyword(model): lf.KVCache(model, "h2o", 64)})[1]
        for some in (lengths, lengths[:1])
    )
    close(together[:, :1], alone, 10 * TOLERANCE)
