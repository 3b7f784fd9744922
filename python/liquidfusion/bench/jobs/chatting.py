"""``chat``: a conversation without end on one cache, in constant memory."""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TextStreamer

import liquidfusion as lf
from liquidfusion.bench import decoding, machine
from liquidfusion.bench.caches import HOW, CacheOptions
from liquidfusion.bench.models import Loaded, first_line
from liquidfusion.bench.notices import notice
from liquidfusion.bench.terminal.output import number
from liquidfusion.exceptions import ConfigError

COMMANDS = "/reset starts anew, /stats tells what the cache holds, /quit ends"
_ANSWER = "<<answer>>"
"""Stands for an answer when the text between two turns is cut out of a chat template."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its text, the tokens fed and written for it, and the seconds it took."""

    text: str
    fed: int
    written: int
    seconds: float


class Chat:
    """A conversation whose every token is fed once; what the cache evicts is forgotten.

    Parameters
    ----------
    loaded
        A model, and a tokenizer that may have a chat template. Without one, a turn is a line that begins with a name,
        and so is an answer.
    cache
        The cache of the whole conversation; its size in tokens.
    system
        Goes before the first turn.
    max_tokens
        Tokens of an answer at most.
    temperature
        0 takes the likeliest token; above, tokens are drawn with `seed`.
    session
        A file that :meth:`save` has written: the conversation goes on, and of `cache` only how it runs counts.

    Raises
    ------
    CacheError
        The session is of another model, or no session.
    ConfigError
        The template has no place for `system`, or does not show answers as they are.
    """

    def __init__(
        self,
        loaded: Loaded,
        cache: CacheOptions | None = None,
        *,
        system: str | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        session: Path | None = None,
    ) -> None:
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._system = system
        self._max_tokens, self._temperature = max_tokens, temperature
        self._generator = torch.Generator(device="cpu").manual_seed(seed)
        self._ends = decoding.end_tokens(self._model, self._tokenizer)
        self._template = getattr(self._tokenizer, "chat_template", None) is not None
        cache = cache or CacheOptions()
        how = {name: value for name, value in cache.how.items() if name != "positions"}
        self.cache = cache.make(self._model, 1) if session is None else lf.KVCache.load(session, self._model, **how)
        self._stream = decoding.Stream(self._model, self.cache)
        self._turn("hello", first=True)
        self._turn("hello", first=False)

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self._stream = decoding.Stream(self._model, self.cache)

    def save(self, path: Path) -> None:
        """Write the conversation to a file, whole or not at all; one that has not begun is not written."""
        if self.cache.is_initialized:
            self.cache.save(path)
        else:
            notice(f"{path} is not written: nothing was said")

    def say(self, text: str, streamer: Any = None, stopped: Callable[[], bool] = lambda: False) -> Answer:
        """Feed one turn and write the answer.

        Parameters
        ----------
        text
            What the user says.
        streamer
            Gets each token as it is written: a :class:`transformers.TextStreamer`.
        stopped
            Asked after each token; True ends the answer.
        """
        start = time.perf_counter()
        first = not self.cache.is_initialized
        turn = self._turn(text, first=first)
        ids = decoding.encode(self._tokenizer, turn)
        if first and not self._template:
            ids = decoding.prefix(self._tokenizer) + ids
        logits = self._stream.feed_chunks(torch.tensor([ids], device=self._model.device))
        written: list[int] = []
        while True:
            token = decoding.choose(logits[:, -1].float().log_softmax(-1), self._temperature, self._generator)
            if int(token) in self._ends:
                break
            written.append(int(token))
            if streamer is not None:
                streamer.put(token.cpu())
            logits = self._stream.feed(token[:, None], last=True)
            if len(written) == self._max_tokens or stopped() or self._line_ended(written):
                break
        if streamer is not None:
            streamer.end()
        answer = self._tokenizer.decode(written, skip_special_tokens=True).strip()
        return Answer(answer, len(ids), len(written), time.perf_counter() - start)

    def _line_ended(self, written: list[int]) -> bool:
        return not self._template and "\n" in self._tokenizer.decode(written[-1:]) and len(written) > 1

    def _turn(self, text: str, *, first: bool) -> str:
        """Return what is fed for a turn: all that stands between the answer before it and its own answer."""
        if not self._template:
            before = f"{self._system}\n\n" if self._system else ""
            return f"{before if first else chr(10)}User: {text}\nAssistant:"
        messages = [{"role": "user", "content": text}]
        if not first:
            messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _ANSWER}, *messages]
        if self._system:
            messages.insert(0, {"role": "system", "content": self._system})
        try:
            shown: str = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template raises whatever its author chose
            raise ConfigError(f"the model's chat template refuses this conversation: {first_line(error)}") from error
        if first:
            return shown
        _, found, turn = shown.partition(_ANSWER)
        if not found:
            raise ConfigError("the model's chat template changes answers: a turn cannot be fed alone")
        return turn


def check_session(cache: CacheOptions, session: Path | None, system: str | None = None) -> None:
    """Refuse, before any work, a session that is not there, and options that it decides itself.

    Raises
    ------
    ConfigError
        The message names them.
    """
    if session is None:
        return
    if not session.is_file():
        raise ConfigError(f"cannot read {session}: there is no such file")
    own = {name for name in cache.as_dict() if name not in HOW} - {"strategy"}
    own |= {"positions"} & cache.how.keys()
    own |= {"strategy"} if cache.strategy != CacheOptions().strategy else set()
    own |= {"system"} if system is not None else set()
    if own:
        raise ConfigError(
            f"--load goes on with what the file has: it does not go together with {', '.join(sorted(own))}"
        )


def converse(chat: Chat, *, as_json: bool = False, quiet: bool = False) -> None:
    """Talk on the terminal, or line by line with what is piped in, until either ends.

    Ctrl-C ends an answer; between answers it ends the program.

    Parameters
    ----------
    as_json
        Print each turn as one line of JSON.
    quiet
        Print only the answers.
    """
    by_hand = sys.stdin.isatty()
    told = not (quiet or as_json)
    last: Answer | None = None
    if told and by_hand:
        print(f"{COMMANDS}; Ctrl-C ends an answer, Ctrl-D the chat.")
    for line in _typed() if by_hand else sys.stdin:
        text = line.strip()
        if not text:
            continue
        if text.startswith("/"):
            if text == "/quit":
                return
            if text == "/reset":
                chat.reset()
                print("the conversation starts anew", file=sys.stderr)
            else:
                print(_stats(chat, last) if text == "/stats" else f"{text}: {COMMANDS}", file=sys.stderr)
            continue
        if told and not by_hand:
            print(f"> {text}")
        streamer = None if as_json else TextStreamer(chat._tokenizer, skip_special_tokens=True)
        with _interrupted() as stopped:
            last = chat.say(text, streamer, stopped)
        if as_json:
            turn = {"user": text, "assistant": last.text, "tokens": last.fed + last.written, "seconds": last.seconds}
            print(json.dumps(turn | _facts(chat), ensure_ascii=False), flush=True)
    if told and by_hand:
        print()


def _typed() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


@contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C set a flag: a call of the model that it broke off would make the cache unusable."""
    pressed = False

    def note(_: int, __: FrameType | None) -> None:
        nonlocal pressed
        if pressed:  # the model is stuck: give up
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _facts(chat: Chat) -> dict[str, Any]:
    cache = chat.cache
    return {
        "seen": cache.get_seq_length(),
        "budget": cache.spec.budget,
        "cache_bytes": cache.nbytes,
        "evictions": cache.evictions,
        "resident_bytes": machine.resident_memory(cache.model.device),
    }


def _stats(chat: Chat, last: Answer | None) -> str:
    facts = _facts(chat)
    told = (
        f"{number(facts['seen'])} tokens seen, at most {facts['budget'] or 'all'} kept per layer and head, "
        f"{number(facts['evictions'])} evictions; cache {number(facts['cache_bytes'], 'bytes')}, "
        f"memory {number(facts['resident_bytes'], 'bytes')}"
    )
    if last is not None:
        told += f"; last answer {last.written} tokens in {last.seconds:.1f} s"
    return told
