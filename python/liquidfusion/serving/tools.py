"""Tool calls in a model's text: found where the chat template shows which form the model was taught."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from liquidfusion.run.stopping import overlap


@dataclass(frozen=True)
class Call:
    """One call: an id, the function's name, its arguments as JSON text."""

    id: str
    name: str
    arguments: str

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Form:
    """How calls are written: what a call begins with, and how to read the text from there on.

    `read` gives the calls, and the text that is none of them; ValueError where the text is not in this form.
    `whole`: a call can only be the whole answer.
    """

    name: str
    opening: str
    read: Callable[[str], tuple[list[Call], str]]
    whole: bool = False


def form_of(template: str | None) -> Form | None:
    """The form that a chat template teaches, None for one that is not known here."""
    if template is None:
        return None
    # Qwen3-Coder and its kin write parameters as tags inside the same pair of tags.
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return _HERMES
    if "[TOOL_CALLS]" in template:
        return _MISTRAL
    if "<|python_tag|>" in template or '"parameters": dictionary' in template:
        return _LLAMA
    return None


def _call(found: Any, arguments: str = "arguments") -> Call:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ValueError("no name")
    given = found.get(arguments, {})
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return Call(f"call_{uuid.uuid4().hex[:24]}", found["name"], text)


def _hermes(text: str) -> tuple[list[Call], str]:
    calls, rest = [], ""
    while (at := text.find(_HERMES.opening)) >= 0:
        rest += text[:at]
        # Some models end without the closing tag.
        inside, _, text = text[at + len(_HERMES.opening) :].partition("</tool_call>")
        calls.append(_call(json.loads(inside)))
    return calls, (rest + text).strip()


def _mistral(text: str) -> tuple[list[Call], str]:
    before, _, inside = text.partition(_MISTRAL.opening)
    found, end = json.JSONDecoder().raw_decode(inside.lstrip())
    calls = [_call(one) for one in (found if isinstance(found, list) else [found])]
    return calls, (before + inside.lstrip()[end:]).strip()


def _llama(text: str) -> tuple[list[Call], str]:
    text = text.removeprefix("<|python_tag|>")
    calls, at, decoder = [], 0, json.JSONDecoder()
    while at < len(text):
        found, at = decoder.raw_decode(text, at)
        calls.append(_call(found, "parameters"))
        while at < len(text) and text[at] in "; \n":
            at += 1
    return calls, ""


_HERMES = Form("hermes", "<tool_call>", _hermes)
_MISTRAL = Form("mistral", "[TOOL_CALLS]", _mistral)
_LLAMA = Form("llama", "{", _llama, whole=True)
_TAG = "<|python_tag|>"


class Caller:
    """Splits an answer that grows into text and, at its end, calls.

    Parameters
    ----------
    form : Form
        How calls are written.
    several : bool
        Whether more than one call may be given.
    """

    def __init__(self, form: Form, *, several: bool = True) -> None:
        self._form, self._several = form, several
        self._held = ""
        self._told = False

    def push(self, text: str) -> str:
        """Take more text; what is certain not to be a call."""
        self._held += text
        openings = (self._form.opening, _TAG) if self._form.whole else (self._form.opening,)
        at = [self._held.find(opening) for opening in openings if opening in self._held]
        if at:
            keep = min(at)
            if self._form.whole and (self._told or self._held[:keep].strip()):
                keep = len(self._held)
        else:
            keep = len(self._held) - max(overlap(self._held, opening) for opening in openings)
        ready, self._held = self._held[:keep], self._held[keep:]
        self._told = self._told or bool(ready.strip())
        return ready

    def rest(self) -> tuple[list[Call], str]:
        """The calls, and text beside them; everything as text where it cannot be read as calls."""
        held, self._held = self._held, ""
        if not held:
            return [], ""
        try:
            calls, text = self._form.read(held.strip())
        except ValueError:
            return [], held
        return (calls if self._several else calls[:1]), text
