"""Text from tokens as they come, and stop strings across their borders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquidfusion.run.stopping import LONGEST_WAIT, Detokenizer, StopStrings


class Bytes:
    """A tokenizer of single bytes; 256 is a special token."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        text = ""
        run = bytearray()
        for token in [*token_ids, 256]:
            if token < 256:
                run.append(token)
                continue
            text += run.decode("utf-8", errors="replace")
            run.clear()
            text += "" if skip_special_tokens else "<end>"
        return text if skip_special_tokens else text.removesuffix("<end>")


class Words:
    """A tokenizer whose words have a space before them unless they come first, as sentencepiece's."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:  # noqa: ARG002
        return " ".join(f"w{token}" for token in token_ids)


def cut(data: st.DataObject, tokens: list[int]) -> list[list[int]]:
    pieces, start = [], 0
    while start < len(tokens):
        end = start + data.draw(st.integers(1, 3))
        pieces.append(tokens[start:end])
        start = end
    return pieces


WHOLE = st.characters(exclude_categories=("Cs",), exclude_characters="\N{REPLACEMENT CHARACTER}")
"""Characters that cannot be taken for unfinished ones."""


@given(st.text(WHOLE, max_size=60), st.data())
def test_pieces_of_text_make_the_whole(text: str, data: st.DataObject) -> None:
    tokens = list(text.encode())
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.push(*piece) for piece in cut(data, tokens)]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""


def test_pieces_that_all_end_within_a_character_give_it_whole() -> None:
    """More bytes than a character may wait for, and never a piece that ends where a character does."""
    text = "🦜" * 40
    tokens = list(text.encode())
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.push(*tokens[:2]), *(detokenizer.push(*tokens[i : i + 4]) for i in range(2, len(tokens), 4))]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""
    assert max(map(len, pieces)) == 1
    assert len(detokenizer._window) <= 2 * LONGEST_WAIT + 4


@given(st.lists(st.integers(0, 255), max_size=LONGEST_WAIT), st.data())
def test_any_bytes_come_out_as_decoded_at_once(tokens: list[int], data: st.DataObject) -> None:
    detokenizer = Detokenizer(Bytes())
    text = "".join(detokenizer.push(*piece) for piece in cut(data, tokens)) + detokenizer.flush()
    assert text == Bytes().decode(tokens, skip_special_tokens=True)


@given(st.lists(st.integers(0, 9), max_size=20), st.data())
def test_spaces_between_words_stay(tokens: list[int], data: st.DataObject) -> None:
    detokenizer = Detokenizer(Words())
    text = "".join(detokenizer.push(*piece) for piece in cut(data, tokens)) + detokenizer.flush()
    assert text == Words().decode(tokens, skip_special_tokens=True)


def test_a_character_waits_for_its_last_byte_but_not_for_ever() -> None:
    detokenizer = Detokenizer(Bytes())
    first, *middle, last = "😀".encode()
    assert detokenizer.push(ord("a"), first) == "a"
    assert [detokenizer.push(byte) for byte in middle] == ["", ""]
    assert detokenizer.push(last) == "😀"
    assert "".join(detokenizer.push(0xFF) for _ in range(3 * LONGEST_WAIT)) != ""


def test_special_tokens_are_left_out_or_not() -> None:
    assert Detokenizer(Bytes()).push(ord("a"), 256, ord("b")) == "ab"
    assert Detokenizer(Bytes(), skip_special=False).push(ord("a"), 256, ord("b")) == "a<end>b"


@given(
    st.text(alphabet="ab", max_size=20),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
def test_the_first_stop_string_ends_the_text(text: str, stop: list[str], data: st.DataObject) -> None:
    strings = StopStrings(stop)
    given_out, start = "", 0
    while start < len(text):
        end = start + data.draw(st.integers(1, 3))
        given_out += strings.push(text[start:end])
        expected = min((text[:end].find(s) for s in stop if s in text[:end]), default=None)
        assert (strings.found is None) == (expected is None)
        if expected is not None:
            # A later, longer look may find one that begins earlier; what is out is never taken back.
            assert given_out == text[:expected]
            assert strings.flush() == ""
            return
        assert text[:end].startswith(given_out)
        start = end
    assert given_out + strings.flush() == text


@pytest.mark.parametrize(
    ("stop", "pieces", "out"),
    [
        (("\nUser",), ["Hi", "\n", "Us", "er:"], "Hi"),
        (("\nUser",), ["Hi", "\n", "Us", "ing"], "Hi\nUsing"),
        (("ab", "b"), ["xa", "b"], "x"),
        (("aab",), ["aa", "ab"], "a"),
    ],
)
def test_stop_strings_across_pieces(stop: tuple[str, ...], pieces: list[str], out: str) -> None:
    strings = StopStrings(stop)
    assert "".join(map(strings.push, pieces)) + strings.flush() == out
