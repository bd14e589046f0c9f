"""What comparing two reply streams finds, whatever the chunks were."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparisons.sidebyside.streams import (
    END,
    KEPT,
    LINE,
    Comparison,
    Difference,
    Ended,
    Normaliser,
    first_difference,
    hexdump,
    judge,
    replace,
)

# few letters, so that lines are often nearly the same
text = st.binary(max_size=40).map(lambda raw: bytes(b"ab01\n\r"[byte % 6] for byte in raw))
NORMALISERS = [Normaliser.parse(each) for each in ("[01]+", "a.=>", "$=>x", "b\\n=>-")]
chosen = st.lists(st.sampled_from(NORMALISERS), max_size=3)
cuts = st.lists(st.integers(0, 40), max_size=8)


def pieces(data: bytes, at: Sequence[int]) -> list[bytes]:
    places = [0, *sorted({place for place in at if place < len(data)}), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


def compared(ours: bytes, theirs: bytes, *normalisers: str, whole: bool = True) -> list[Difference]:
    comparison = Comparison([Normaliser.parse(each) for each in normalisers])
    comparison.answer(ours)
    comparison.reply(theirs)
    comparison.end_answer(whole=whole)
    comparison.end_reply(whole=whole)
    return comparison.differences


def reference(ours: bytes, theirs: bytes, normalisers: Sequence[Normaliser]) -> list[tuple[int, bool]]:
    """What the module's own words say, for streams of short lines: the offset of each line that differs
    and whether one stream was at its end there.
    """
    found = []
    offset = 0
    our_lines, their_lines = lines(ours), lines(theirs)
    for number in range(max(len(our_lines), len(their_lines))):
        mine = our_lines[number] if number < len(our_lines) else b""
        yours = their_lines[number] if number < len(their_lines) else b""
        replaced = [replaced_all(each, normalisers) for each in (mine, yours)]
        if mine != yours and replaced[0] != replaced[1]:
            at = first_difference(*replaced)
            over = any(
                at == len(mended) and not line.endswith(b"\n")
                for mended, line in zip(replaced, (mine, yours), strict=True)
            )
            found.append((offset, over))
            if over:
                break
        offset += len(mine)
    return found


def lines(data: bytes) -> list[bytes]:
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def replaced_all(line: bytes, normalisers: Sequence[Normaliser]) -> bytes:
    origins = list(range(len(line) + 1))
    for normaliser in normalisers:
        line, origins = replace(line, origins, normaliser)
        assert len(origins) == len(line) + 1
        assert origins == sorted(origins)
    return line


@given(text, text, cuts, cuts, st.lists(st.booleans(), max_size=20), chosen, st.booleans(), st.booleans())
def test_chunks_and_their_order_never_change_what_is_found(
    ours: bytes,
    theirs: bytes,
    our_cuts: list[int],
    their_cuts: list[int],
    order: list[bool],
    normalisers: list[Normaliser],
    our_whole: bool,
    their_whole: bool,
) -> None:
    at_once = Comparison(normalisers)
    at_once.answer(ours)
    at_once.reply(theirs)
    at_once.end_answer(whole=our_whole)
    at_once.end_reply(whole=their_whole)
    bit_by_bit = Comparison(normalisers)
    mine, yours = pieces(ours, our_cuts), pieces(theirs, their_cuts)
    for is_mine in [*order, *[True] * (len(mine) + 1), *[False] * (len(yours) + 1)]:
        if is_mine and mine:
            bit_by_bit.answer(mine.pop(0))
        elif is_mine:
            bit_by_bit.end_answer(whole=our_whole)
        elif yours:
            bit_by_bit.reply(yours.pop(0))
        else:
            bit_by_bit.end_reply(whole=their_whole)
    assert bit_by_bit.differences == at_once.differences


@given(text, text, chosen)
def test_lines_differ_where_they_are_not_equal_once_matches_are_replaced(
    ours: bytes, theirs: bytes, normalisers: list[Normaliser]
) -> None:
    comparison = Comparison(normalisers)
    comparison.answer(ours)
    comparison.reply(theirs)
    comparison.end_answer(whole=True)
    comparison.end_reply(whole=True)
    found = [(each.line, each.kind != "bytes") for each in comparison.differences]
    assert found == reference(ours, theirs, normalisers)


@given(st.binary(max_size=3 * LINE), cuts, chosen)
def test_a_stream_does_not_differ_from_itself_and_nothing_of_it_is_kept(
    data: bytes, at: list[int], normalisers: list[Normaliser]
) -> None:
    comparison = Comparison(normalisers)
    for piece in pieces(data, at):
        comparison.answer(piece)
        assert comparison.behind <= len(data)
        comparison.reply(piece)
        # of what both have, less than a line is kept
        assert comparison.behind == comparison.ahead < LINE
    comparison.end_answer(whole=True)
    comparison.end_reply(whole=True)
    assert not comparison.differences


@given(st.binary(min_size=1, max_size=4 * LINE), st.data(), st.integers(1, 255))
def test_one_flipped_byte_is_found_at_its_offset_in_any_stream(
    data: bytes, draw: st.DataObject, mask: int
) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    flipped = bytearray(data)
    flipped[at] ^= mask
    first = compared(data, bytes(flipped))[0]
    assert (first.offset, first.other_offset) == (at, at)
    assert f"[{data[at]:02x}]" in first.expected
    assert f"[{flipped[at]:02x}]" in first.actual


@given(text, text, chosen, st.integers(0, 40))
def test_a_cut_end_makes_no_difference_that_the_whole_stream_would_not_have(
    ours: bytes, theirs: bytes, normalisers: list[Normaliser], kept: int
) -> None:
    whole, cut = Comparison(normalisers), Comparison(normalisers)
    for comparison, data in ((whole, theirs), (cut, theirs[:kept])):
        comparison.answer(ours)
        comparison.reply(data)
        comparison.end_answer(whole=True)
        comparison.end_reply(whole=comparison is whole)
    wanted = [each.line for each in whole.differences]
    assert [each.line for each in cut.differences] == wanted[: len(cut.differences)]


def test_the_lines_after_a_difference_are_compared_again() -> None:
    found = compared(b"one\ntwo\nthree\nfour\n", b"one\nTWO!\nthree\nFour\n")
    assert [(each.kind, each.line, each.offset, each.other_offset) for each in found] == [
        ("bytes", 4, 4, 4),
        ("bytes", 14, 14, 15),
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "kind", "offset"),
    [
        (b"ab", b"abc", "longer", 2),
        (b"abc", b"ab", "shorter", 2),
        (b"ab\n", b"ab\ncd\n", "longer", 3),
        (b"ab\ncd\n", b"", "shorter", 0),
    ],
)
def test_a_stream_that_ends_early_or_goes_on_differs_in_length(
    ours: bytes, theirs: bytes, kind: str, offset: int
) -> None:
    [found] = compared(ours, theirs)
    assert (found.kind, found.offset, found.other_offset) == (kind, offset, offset)
    assert "[end]" in (found.expected if kind == "longer" else found.actual)
    assert compared(ours, theirs, whole=False) == []


def test_a_normaliser_replaces_dates_and_offsets_stay_those_of_the_stream() -> None:
    ours = b"HTTP/1.1 200 OK\r\nDate: Sun, 22 Nov 2026 18:32:08 GMT; id=1\r\n"
    theirs = b"HTTP/1.1 200 OK\r\nDate: Sun, 22 Nov 2026 18:32:19 GMT; id=234\r\n"
    assert compared(ours, theirs, "Date: .* GMT", "id=[0-9]+=>id") == []
    [left] = compared(ours, theirs.replace(b"id=234\r", b"id=234!\r"), "Date: .* GMT", "id=[0-9]+=>id")
    assert left.offset == ours.index(b"\r\n", 20)
    assert left.other_offset == theirs.rindex(b"\r\n")


def test_a_line_of_more_than_8_kib_is_compared_in_pieces() -> None:
    long = b"x" * (3 * LINE)
    comparison = Comparison([Normaliser.parse("[0-9]")])
    comparison.answer(long + b"1")
    comparison.reply(long + b"2")
    # the pieces that are equal are not kept until the line ends
    assert comparison.behind == 1
    comparison.end_answer(whole=True)
    comparison.end_reply(whole=True)
    assert not comparison.differences


def test_a_stream_that_is_out_of_step_stops_being_compared() -> None:
    comparison = Comparison()
    comparison.answer(b"a\n" * 2 * KEPT)
    comparison.reply(b"b\n" * 2 * KEPT)
    assert comparison.over
    assert len(comparison.differences) == KEPT
    assert comparison.horizon == 2 * (KEPT - 1)
    comparison.answer(b"more")
    assert (comparison.behind, comparison.ahead) == (0, 0)


@pytest.mark.parametrize(
    ("bad", "says"), [("", "needed"), ("=>x", "needed"), ("(", "not a regular expression")]
)
def test_a_normaliser_that_means_nothing_is_refused_in_one_line(bad: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Normaliser.parse(bad)
    assert "\n" not in str(caught.value)


def test_a_hexdump_shows_the_byte_among_its_neighbours() -> None:
    data = bytes(range(48, 90))
    assert hexdump(data, 100, 120) == (
        "00000068  34 35 36 37 38 39 3a 3b 3c 3d 3e 3f 40 41 42 43 [44] 45 46 47 48 49 4a 4b 4c 4d 4e 4f 50 51 52 53"
        "  |456789:;<=>?@ABCDEFGHIJKLMNOPQRS|"
    )
    assert hexdump(b"ab\x1b", 0, 3) == "00000000  61 62 1b [end]  |ab.|"


ANSWER = b"HTTP/1.1 200 OK\nDate: 1\nid: 1\n\nbody\n"


def judged(
    theirs: bytes,
    control: bytes,
    ended: Ended = "fin",
    control_ended: Ended = "fin",
    answer_ended: Ended = "fin",
) -> tuple[str, int | None]:
    sides = []
    for stream, how in ((theirs, ended), (control, control_ended)):
        comparison = Comparison()
        comparison.answer(ANSWER)
        comparison.reply(stream)
        comparison.end_answer(whole=answer_ended == "fin")
        comparison.end_reply(whole=how == "fin")
        sides.append((comparison, how))
    found = judge(answer_ended, sides[0], sides[1])
    return found.judgement, found.difference.offset if found.difference else None


def test_a_difference_in_a_line_that_the_control_differs_in_is_noise() -> None:
    other_date = ANSWER.replace(b"Date: 1", b"Date: 23")
    assert judged(other_date, ANSWER) == ("different", ANSWER.index(b"1\nid"))
    assert judged(other_date, ANSWER.replace(b"Date: 1", b"Date! 9")) == ("noise", ANSWER.index(b"1\nid"))
    assert judged(ANSWER, other_date) == ("same", None)


def test_noise_does_not_hide_a_difference_elsewhere() -> None:
    noisy = ANSWER.replace(b"Date: 1", b"Date: 2")
    assert judged(noisy.replace(b"body", b"Body"), noisy) == ("different", ANSWER.index(b"body"))


def test_another_way_of_ending_differs_unless_the_control_ends_so_too() -> None:
    assert judged(ANSWER, ANSWER, ended="rst") == ("different", END)
    assert judged(ANSWER, ANSWER, ended="timeout") == ("different", END)
    assert judged(ANSWER, ANSWER, ended="rst", control_ended="rst") == ("noise", END)
    assert judged(ANSWER, ANSWER, ended="rst", control_ended="rst", answer_ended="rst") == ("same", None)


@pytest.mark.parametrize(
    ("ended", "judgement"),
    [("cut", "cut"), ("behind", "detached"), ("ahead", "detached"), ("refused", "refused")],
)
def test_what_was_not_compared_to_its_end_is_not_called_the_same(ended: Ended, judgement: str) -> None:
    assert judged(ANSWER[:20], ANSWER, ended=ended)[0] == judgement


def test_a_difference_that_was_seen_before_the_cut_stays_one() -> None:
    assert judged(b"HTTP/1.1 500 NO\n", ANSWER, ended="behind")[0] == "different"
    assert judged(b"HTTP/1.1 500 NO\n", ANSWER, ended="cut", answer_ended="cut")[0] == "different"


def test_the_controls_own_differences_are_noise() -> None:
    comparison = Comparison()
    comparison.answer(b"a\n")
    comparison.reply(b"b\n")
    assert judge("fin", (comparison, "fin"), None).judgement == "noise"


def test_beyond_a_control_that_is_out_of_step_everything_is_noise() -> None:
    ours = b"a\n" * 2 * KEPT
    control, other = Comparison(), Comparison()
    for comparison, theirs in ((control, b"b\n" * 2 * KEPT), (other, ours[:-2] + b"c\n")):
        comparison.answer(ours)
        comparison.reply(theirs)
    assert len(other.differences) == 1
    assert judge("fin", (other, "fin"), (control, "fin")).judgement == "noise"
