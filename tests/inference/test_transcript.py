from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tursi.inference.transcript import Transcript


def from_bytes(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode("utf-8", "replace")


def pieces(data: bytes, stops: Sequence[str] = ()) -> tuple[list[str], Transcript]:
    transcript = Transcript(from_bytes, stops)
    found = []
    for byte in data:
        found.append(transcript.push(byte))
        if transcript.stopped:
            break
    found.append(transcript.finish())
    return found, transcript


@given(st.text(max_size=60))
def test_characters_are_never_split(text: str) -> None:
    found, transcript = pieces(text.encode())
    assert "".join(found) == text
    assert "".join(found).count("\ufffd") == text.count("\ufffd")
    assert transcript.shown == transcript.length == len(text)


@given(st.binary(max_size=80))
def test_garbage_is_shown_for_what_it_is(data: bytes) -> None:
    found, _ = pieces(data)
    assert "".join(found).count("\ufffd") >= from_bytes(data).count("\ufffd") - 3
    assert len(found[-1]) <= 17


def test_what_is_held_for_a_character_comes_at_the_end() -> None:
    found, _ = pieces("é".encode()[:1])
    assert found == ["", "\ufffd"]


@given(
    st.text(alphabet="abé", max_size=40),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    found, transcript = pieces(text.encode(), stops)
    shown = "".join(found)
    assert not any(stop in shown for stop in stops)
    # The stop string whose last character comes first wins; of those that end
    # there, the one that begins first.
    ends = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    if ends:
        end = min(ends)[0]
        assert shown == text[: min(place for stop_end, place in ends if stop_end == end)]
        assert transcript.stopped
    else:
        assert shown == text
        assert not transcript.stopped


def test_no_part_of_a_stop_string_leaks() -> None:
    found, _ = pieces(b"yes and no.", ["and so"])
    assert found[:5] == ["y", "e", "s", " ", ""]
    assert found[7] == ""
    assert "".join(found) == "yes and no."


def test_stop_strings_do_not_count_before_their_time() -> None:
    transcript = Transcript(from_bytes, ["b"])
    assert transcript.push(ord("b"), stops=False) == "b"
    assert transcript.push(ord("b")) == ""
    assert transcript.stopped


def test_the_first_word_is_decoded_after_the_prompt() -> None:
    def words(ids: Sequence[int]) -> str:
        # Like SentencePiece: each token is a word, the first space is dropped.
        return "".join(f" w{id_}" for id_ in ids).lstrip()

    transcript = Transcript(words, context=(1, 2))
    assert [transcript.push(3), transcript.push(4)] == [" w3", " w4"]
    afresh = Transcript(words)
    assert [afresh.push(3), afresh.push(4)] == ["w3", " w4"]


def test_tokens_without_text_take_no_room() -> None:
    transcript = Transcript(lambda ids: "".join("" if id_ == 0 else "x" for id_ in ids))
    for _ in range(1000):
        assert transcript.push(0) == ""
    assert transcript.push(1) == "x"
    assert len(transcript._window) <= 40
