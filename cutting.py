"""What a row that is too long loses: the ends of its longest fields, first what is over a field's budget."""

from itertools import chain, zip_longest

import numpy as np

import files
import prompts
from errors import UserError

EDGE = 512  # characters of a shortened field's end


def cutting_rules(template: str, kept: tuple, budgets: tuple) -> list[tuple]:
    """(most tokens or 0, is it cut last?) of each piece of a rendered template. UserError for unknown fields."""
    budget_of = dict(budget.split("=") for budget in budgets)
    names = files.template_columns(template)
    for flag, given in (("kept", kept), ("budgets", budget_of)):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise UserError(f"--{flag} {','.join(unknown)}: no field of the text, which has {', '.join(names)}")
    pieces = prompts.render(template, {name: name for name in names})
    return [(int(budget_of.get(text, 0)), text in kept) for _, text in pieces]


def bounds(spans: list) -> np.ndarray:
    """(2, T) int64: first characters and ends of spans."""
    return np.array(spans, dtype=np.int64).reshape(-1, 2).T


def pieces_of(spans: list, pieces: prompts.Pieces) -> np.ndarray:
    """(T,) int64: the piece that each span lies in, or -1: it reaches across a border, or is in none."""
    start, end = bounds(spans)
    last_letter = np.maximum(start, end - 1)
    borders = np.cumsum([len(text) for _, text in pieces])
    first = np.searchsorted(borders, start, side="right")
    last = np.searchsorted(borders, last_letter, side="right")
    is_inside = (start >= 0) & (first == last)
    return np.where(is_inside, first, -1)


# ---- truncation -----------------------------------------------------------------------------------------------------


def truncate(spans: list, pieces: prompts.Pieces, max_length: int, rules: list[tuple]) -> list[int]:
    """Which of a row's tokens are kept, at most max_length. spans: their places in the text.

    First goes what a field has over its budget; then the ends of the longest fields, of those that are cut last only
    when the others are gone. The template's own words stay, for a prompt without its end asks nothing: a token that
    reaches across a border of the template is the template's. Raises UserError where the template alone is too long.
    """
    piece_of = pieces_of(spans, pieces)
    is_field = np.array([*(user for user, _ in pieces), False])  # the last one is for what lies in no piece
    is_template = ~is_field[piece_of]
    kept = np.flatnonzero(is_template).tolist()
    if len(kept) >= max_length:
        raise UserError(f"the template alone has {len(kept)} tokens: --max_length {max_length} leaves no room for text")

    cut_first, cut_last = [], []
    for i in np.flatnonzero(is_field):
        most, is_last = rules[i] if rules else (0, False)
        tokens = np.flatnonzero(piece_of == i).tolist()
        fields = cut_last if is_last else cut_first
        fields.append(tokens[: most or None])

    # The room goes first to the fields that are cut last, a token to each in turn: so the longest lose their ends.
    for fields in (cut_last, cut_first):
        in_turn = chain.from_iterable(zip_longest(*fields))
        tokens = [token for token in in_turn if token is not None]
        kept += tokens[: max_length - len(kept)]
    return sorted(kept)


# ---- very long rows ---------------------------------------------------------------------------------------------


def shortened(text: str, size: int) -> str:
    """A text's first `size` characters and its last EDGE ones."""
    if len(text) <= size + EDGE:
        return text
    return text[:size] + text[-EDGE:]


def moved(place: int, row: prompts.Pieces, short: prompts.Pieces) -> int:
    """A place in a row's text as one in that of its shortened pieces."""
    start = left_out = 0
    for (_, whole), (_, part) in zip(row, short, strict=True):
        gap = len(whole) - len(part)
        gap_start = start + len(part) - EDGE
        if gap and place > gap_start:
            left_out += min(place - gap_start, gap)
        start += len(whole)
    return place - left_out


def ends_of_kept(spans: list, kept: list[int], pieces: prompts.Pieces) -> list[int]:
    """The place in each piece after the last token in it that is kept."""
    piece_of = pieces_of(spans, pieces)[kept]
    _, stops = bounds(spans)
    stops = stops[kept]
    start, ends = 0, []
    for i, (_, text) in enumerate(pieces):
        end = stops[piece_of == i].max(initial=start)
        ends.append(int(end) - start)
        start += len(text)
    return ends
