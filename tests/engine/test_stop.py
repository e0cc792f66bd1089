"""Stop strings: the same cut however the text comes in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from multitensor.engine.stop import StopMatcher


def run(stops: list[str], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include)
    shown = "".join(matcher.push(piece) for piece in pieces)
    return shown + ("" if matcher.matched else matcher.flush()), matcher.matched


def oracle(stops: list[str], text: str, include: bool) -> tuple[str, str | None]:
    """The first prefix of the text that ends in a stop string; the longest such string."""
    for end in range(1, len(text) + 1):
        found = max((stop for stop in stops if text[:end].endswith(stop)), key=len, default=None)
        if found is not None:
            return (text[:end] if include else text[: end - len(found)]), found
    return text, None


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    include=st.booleans(),
)
def test_pieces_do_not_matter(stops: list[str], pieces: list[str], include: bool) -> None:
    assert run(stops, pieces, include) == oracle(stops, "".join(pieces), include)


def test_text_is_held_back_only_while_a_stop_could_complete() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Hello\n") == "Hello"
    assert matcher.push("\nUs") == ""
    assert matcher.push("ual") == "\n\nUsual"
    assert matcher.push("\n\nUser: more") == ""
    assert matcher.matched == "\n\nUser:"
    assert matcher.push("more") == "" and matcher.flush() == ""


def test_skipped_text_is_shown_and_not_searched() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.skip("ab") == "ab"
    assert matcher.skip("a") == "a"
    assert matcher.push("b") == "b"
    assert matcher.matched is None
