"""Stop strings in a stream, against str.find in the whole text."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stopping import StopStrings


def run(stops, pieces):
    """(what was shown, whether a stop string was found, the longest that was held back)"""
    stream, shown, held = StopStrings(tuple(stops)), "", 0
    for i, piece in enumerate(pieces):
        shown += stream.put(piece)
        held = max(held, len("".join(pieces[: i + 1])) - len(shown)) if not stream.found else held
    return shown + stream.finish(), stream.found, held


def expected(stops, text):
    """Up to the string that is complete first, which is the first whose end str.find finds."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


@given(
    stops=st.lists(st.text("ab\n🙂", min_size=1, max_size=4), max_size=4),
    pieces=st.lists(st.text("ab\n🙂", max_size=5), max_size=8),
)
@example(stops=["aab"], pieces=["a", "a", "a", "b", "x"])
@example(stops=["abab", "ba"], pieces=["aab", "ab"])
@example(stops=["bab", "ab"], pieces=["b", "ab"])
def test_same_as_in_the_whole_text(stops, pieces):
    text = "".join(pieces)
    shown, found, held = run(stops, pieces)
    assert shown == expected(stops, text)
    assert found == any(stop in text for stop in stops)
    assert run(stops, list(text))[:2] == (shown, found) == run(stops, [text])[:2]
    assert held < max(map(len, stops), default=1)  # no more than what may still become one


@given(stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), text=st.text("ab", max_size=9))
def test_shown_as_soon_as_it_is_certain(stops, text):
    """What is held back is the beginning of a stop string, and there is no longer one at the end of the text."""
    stream = StopStrings(tuple(stops))
    shown = stream.put(text)
    if not stream.found:
        held = text[len(shown) :]
        begins = [text[i:] for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in stops)]
        assert held == max(begins, key=len, default="")
        assert stream.finish() == held and stream.finish() == ""


@pytest.mark.parametrize(
    "stops, text, shown",
    [
        (["aab"], "aaab", "a"),
        (["b", "abc"], "xabc", "xa"),  # complete first
        (["bc", "abc"], "xabc", "x"),  # both at once: nothing of either is shown
        (["\n\n"], "a\nb\n\nc", "a\nb"),
        (["a"], "abc", ""),
        ([], "abc", "abc"),
    ],
)
def test_which_one_ends_the_text(stops, text, shown):
    assert run(stops, list(text))[0] == run(stops, [text])[0] == shown


def test_nothing_after_the_end():
    stream = StopStrings(("END",))
    assert [stream.put(piece) for piece in ("one E", "ND two", "three", "")] == ["one ", "", "", ""]
    assert stream.found and stream.finish() == ""
