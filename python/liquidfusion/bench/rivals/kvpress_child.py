"""Answer prompts with a press of kvpress: a program for an interpreter of its own, which needs no LiquidFusion there.

kvpress needs an older transformers than LiquidFusion does, so :mod:`liquidfusion.bench.rivals.process` starts this file
with the interpreter of an environment that has kvpress, and speaks lines of JSON with it: first the model, then one
job a line. What a press evicts, and when, is kvpress' own code; here are only the calls around it, as kvpress' own
pipeline makes them, for several prompts at once.

Source: https://github.com/NVIDIA/kvpress (Apache-2.0), whose pipeline compresses the context in one call, lets the
question follow at the positions it had in the whole text, and decodes greedily.
"""

import ast
import contextlib
import json
import sys
import time
import types
from importlib import import_module
from typing import Any

torch: Any = import_module("torch")


class Answerer:
    """A model of the older transformers, and what a press makes of its cache.

    Parameters
    ----------
    model, dtype, device
        A directory or hub id, the name of a torch dtype, and a torch device.
    threads
        Threads of torch on a CPU.
    """

    def __init__(self, model: str, dtype: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers = import_module("transformers")
        self._cache_class = transformers.DynamicCache
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
        # The presses that mask keys head by head refuse "eager"; "sdpa" is what kvpress is tested with.
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.model: Any = loaded.to(device).eval()
        self._device = torch.device(device)
        self._fed = 0
        self._modules = [layer.self_attn for layer in self.model.model.layers]
        self.model.model.layers[0].register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002 - a hook's signature
        hidden = args[0] if args else kwargs["hidden_states"]
        self._fed += hidden.shape[0] * hidden.shape[1]

    def run(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the answer to every prompt of one job; all of them are one batch.

        Parameters
        ----------
        job
            ``press`` (an expression such as ``"SnapKVPress(window_size=32)"``), ``chat`` (whether the prompts went
            through the chat template), ``ends`` (ids that end a text), and ``prompts``, each with ``context`` and
            ``question`` (ids), ``kept`` (tokens of the context to keep), ``max_tokens``, ``stop`` and ``until``.
        """
        press = build(job["press"])
        decoding = type(press).__name__ in ("DecodingPress", "PrefillDecodingPress", "CompressionRatioDecodingPress")
        uneven = type(press).__name__ in _UNEVEN
        prompts = job["prompts"]
        if (decoding or uneven) and len(prompts) > 1:
            return self._one_by_one(job)
        try:
            return self._batch(press, job, decoding, uneven)
        except ValueError:  # presses that mask seek a key that no query looks at, which many queries may rule out
            if len(prompts) == 1:
                raise
            return self._one_by_one(job)

    def _one_by_one(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        return [self.run({**job, "prompts": [prompt]})[0] for prompt in job["prompts"]]

    def _batch(self, press: Any, job: dict[str, Any], decoding: bool, uneven: bool) -> list[dict[str, Any]]:
        prompts = job["prompts"]
        with torch.inference_mode():
            self._synchronize()
            start = time.perf_counter()
            self._fed = 0
            parts = [self._compress(press, prompt, job["chat"], decoding) for prompt in prompts]
            read = self._fed
            kept = [(cache.get_seq_length(), masked) for cache, masked in parts]
            cache, mask = self._join(parts)
            around = press(self.model) if decoding else contextlib.nullcontext()
            with around:
                answers = self._decode(cache, mask, prompts, set(job["ends"]))
            self._synchronize()
            seconds = time.perf_counter() - start
            for module in self._modules:
                module.masked_key_indices = None
        passes = read / sum(len(prompt["context"]) for prompt in prompts)
        pair = 2 * self._modules[0].head_dim * self.model.dtype.itemsize
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // len(prompts)
        for prompt, answer, (length, masked) in zip(prompts, answers, kept, strict=True):
            added = len(prompt["question"]) + answer["fed"]
            heads = sum(layer.keys.shape[1] for layer in cache.layers)
            pairs = held // pair if decoding or uneven else heads * (length + added) - masked
            answer |= {
                "seconds": seconds,
                "batch_size": len(prompts),
                "cache_bytes": pairs * pair,
                "allocated_bytes": held,
                "passes": passes,
            }
        return answers

    def _compress(self, press: Any, prompt: dict[str, Any], chat: bool, decoding: bool) -> tuple[Any, int]:
        """Return the cache of a context and how many of its pairs are masked rather than taken out."""
        ids = torch.tensor([prompt["context"]], device=self._device)
        kept, total = min(prompt["kept"], len(prompt["context"])), len(prompt["context"])
        cache = self._cache_class()
        for module in self._modules:
            module.masked_key_indices = None
        if press is None or decoding:
            if decoding:
                press.target_size = prompt["kept"]
            self.model.model(input_ids=ids, past_key_values=cache)
            return cache, 0
        # int(total * (1 - ratio)) is how presses count; half a token keeps the product off the whole number below.
        press.compression_ratio = 0.0 if kept == total else 1 - (kept + 0.5) / total
        with _without_template(chat), press(self.model):
            self.model.model(input_ids=ids, past_key_values=cache)
        found = [getattr(module, "masked_key_indices", None) for module in self._modules]
        cache.masked = found
        return cache, sum(len(indices[0]) for indices in found if indices is not None)

    def _join(self, parts: list[tuple[Any, int]]) -> tuple[Any, Any]:
        """Return one cache of all rows, shorter ones padded on the left, and its mask ``[batch, columns]``."""
        lengths = [cache.get_seq_length() for cache, _ in parts]
        longest = max(lengths)
        mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=self._device)
        if len(parts) == 1:
            return parts[0][0], mask
        joined = self._cache_class()
        for index, module in enumerate(self._modules):
            layers = [cache.layers[index] for cache, _ in parts]
            padded = [
                [
                    torch.nn.functional.pad(part, (0, 0, longest - part.shape[2], 0))
                    for part in (layer.keys, layer.values)
                ]
                for layer in layers
            ]
            joined.update(*(torch.cat(rows) for rows in zip(*padded, strict=True)), index)
            masked = [getattr(cache, "masked", [None] * len(self._modules))[index] for cache, _ in parts]
            rows = [
                (torch.full_like(indices[1], row), indices[1], indices[2] + longest - lengths[row])
                for row, indices in enumerate(masked)
                if indices is not None
            ]
            module.masked_key_indices = tuple(torch.cat(part) for part in zip(*rows, strict=True)) if rows else None
        return joined, mask

    def _decode(self, cache: Any, mask: Any, prompts: list[dict[str, Any]], ends: set[int]) -> list[dict[str, Any]]:
        questions = [prompt["question"] for prompt in prompts]
        longest = max(map(len, questions))
        ids = torch.tensor([[min(ends, default=0)] * (longest - len(q)) + q for q in questions], device=self._device)
        fresh = torch.tensor([[0] * (longest - len(q)) + [1] * len(q) for q in questions], device=self._device)
        start = torch.tensor([[len(prompt["context"])] for prompt in prompts], device=self._device)
        positions = start + (fresh.cumsum(1) - 1).clamp(min=0)
        answers: list[dict[str, Any]] = [{"tokens": [], "finish_reason": "length"} for _ in prompts]
        waiting = set(range(len(prompts)))
        plain = len(prompts) == 1
        for step in range(max(prompt["max_tokens"] for prompt in prompts)):
            mask = torch.cat((mask, fresh), 1)
            extra = {} if plain else {"attention_mask": mask}
            logits = self.model(
                input_ids=ids, past_key_values=cache, position_ids=positions, logits_to_keep=1, **extra
            ).logits[:, -1]
            chosen = logits.argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                if row in waiting and self._ends(answers[row], prompts[row], token, step, ends):
                    waiting.discard(row)
            if not waiting:
                break
            ids, fresh, positions = chosen[:, None], torch.ones_like(chosen[:, None]), positions[:, -1:] + 1
        return answers

    def _ends(self, answer: dict[str, Any], prompt: dict[str, Any], token: int, step: int, ends: set[int]) -> bool:
        """Add a token to an answer; return whether the answer has ended."""
        answer["fed"] = len(answer["tokens"])
        if token in ends:
            answer["finish_reason"] = "stop"
            return True
        answer["tokens"].append(token)
        if prompt["stop"] or prompt["until"]:
            text = self.tokenizer.decode(answer["tokens"], skip_special_tokens=True)
            found = prompt["until"] and all(part.lower() in text.lower() for part in prompt["until"])
            if found or any(part in text for part in prompt["stop"]):
                answer["finish_reason"] = "stop"
                return True
        return bool(step + 1 >= prompt["max_tokens"])

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


_UNEVEN = (
    "PyramidKVPress",
    "ThinKPress",
    "PerLayerCompressionPress",
    "SimLayerKVPress",
    "RestoreKVPress",
    "FinchPress",
)
"""Presses whose layers, or the positions after them, differ: their prompts are not joined to a batch."""


@contextlib.contextmanager
def _without_template(chat: bool) -> Any:
    """Tell KVzip that a prompt outside the chat template has no prefix that it may leave unscored."""
    module: Any = import_module("kvpress.presses.kvzip_press")
    if chat:
        yield
        return
    original = module.AutoTokenizer

    def plain(*args: Any, **kwargs: Any) -> Any:
        tokenizer = original.from_pretrained(*args, **kwargs)
        tokenizer.chat_template = None
        return tokenizer

    module.AutoTokenizer = types.SimpleNamespace(from_pretrained=plain)
    try:
        yield
    finally:
        module.AutoTokenizer = original


def build(text: str) -> Any:
    """Return the press of an expression: names of kvpress' presses, calls of them, and constants; None for ``full``."""
    if text == "full":
        return None
    kvpress = import_module("kvpress")

    def make(node: Any) -> Any:
        if isinstance(node, ast.Name):
            return kind(node)()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            named = {word.arg: make(word.value) for word in node.keywords if word.arg}
            return kind(node.func)(*map(make, node.args), **named)
        return ast.literal_eval(node)

    def kind(node: ast.Name) -> Any:
        if not hasattr(kvpress, node.id):
            names = ", ".join(name for name in kvpress.__all__ if name.endswith("Press"))
            raise ValueError(f"kvpress {version()} has no {node.id}; it has {names}")
        return getattr(kvpress, node.id)

    return make(ast.parse(text, mode="eval").body)


def version() -> str:
    """Return the version of kvpress."""
    return str(import_module("importlib.metadata").version("kvpress"))


def main() -> None:
    """Read the model, then jobs, until the input ends; write one line for each."""
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not end up among the answers
    try:
        import_module("datasets")
    except ImportError:  # kvpress imports it for two presses that read statistics from the hub
        sys.modules["datasets"] = types.ModuleType("datasets")
        sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]
    answerer = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if answerer is None:
                import_module("kvpress")
                answerer = Answerer(**job)
                reply: Any = {"kvpress": version(), "transformers": import_module("transformers").__version__}
            else:
                reply = {"answers": answerer.run(job)}
        except Exception as error:  # whatever a press dies of, the parent hears of it and goes on
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
