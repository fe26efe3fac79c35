"""From text to tokens to the batch plan.

`tokenize` renders a row's template and encodes it; `truncate` decides what a row that is too long loses.

A step's rows are a pure function of (seed, epoch, lengths, batch_size, max_tokens, micro_batches), never of the number
of ranks: micro-batch j of a step runs on rank j mod W. Nothing is padded, duplicated or dropped: a micro-batch is one
row of concatenated sequences.
"""

import bisect
import hashlib
import json
import re
from dataclasses import dataclass, field

import numpy as np

import files
import prompts
from errors import UserError, few

BULK = 1000  # rows that are encoded at once: many, for speed; not all, for memory


# ---- tokens ---------------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """The token ids of all rows, perhaps in a file: row i is ids[starts[i] : stops[i]]."""

    ids: np.ndarray  # (T,) int32
    starts: np.ndarray  # (N,) int64
    stops: np.ndarray  # (N,) int64
    learned: np.ndarray | None = None  # (T,) bool: what a language model learns to predict; None: everything
    bytes: int = 0  # UTF-8 bytes of the text that its predicted tokens stand for

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each row."""
        return self.stops - self.starts

    @property
    def targets(self) -> np.ndarray:
        """(N,) tokens of each row that a language model predicts: those learned, without the row's first token."""
        if self.learned is None:
            return self.lengths - 1
        learned_before = np.concatenate([[0], np.cumsum(self.learned)])
        return learned_before[self.stops] - learned_before[self.starts + 1]

    def row(self, i: int) -> np.ndarray:
        return self.ids[self.starts[i] : self.stops[i]]

    def take(self, rows: np.ndarray) -> "Tokens":
        """Some rows, in the given order."""
        return Tokens(self.ids, self.starts[rows], self.stops[rows], self.learned)

    def digest(self, *more: np.ndarray) -> str:
        """sha256 over the tokens of all rows and more arrays: a resumed run must see the same."""
        digest = hashlib.sha256()
        for array in (self.ids, self.starts, self.stops, self.learned, *more):
            if array is not None:
                digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def join_tokens(rows: list, learned: list | None = None) -> Tokens:
    """Tokens from one id sequence a row and, where not everything is learned, one of booleans a row."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    stops = np.cumsum(lengths)
    ids = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
    if learned is not None:
        learned = np.concatenate(learned).astype(bool)
    return Tokens(ids, stops - lengths, stops, learned)


@dataclass
class TokenReport:
    """What happened on the way from text to tokens."""

    rows: int = 0
    tokens: int = 0
    longest: int = 0
    cut_rows: int = 0  # rows that were truncated
    cut_tokens: int = 0
    guarded: int = 0  # rows whose fields hold the string of an added token
    empty: int = 0
    lengths: list[int] = field(default_factory=list)  # tokens of each row before it was cut

    def __str__(self):
        text = f"{self.rows:,} rows, {self.tokens:,} tokens, longest {self.longest}"
        if self.cut_rows:
            text += f"; {self.cut_rows} rows cut to the limit, {self.cut_tokens:,} tokens lost"
        if self.guarded:
            text += f"; {self.guarded} rows name special tokens in their text: encoded as plain text"
        if self.empty:
            text += f"; {self.empty} rows are empty"
        return text


# ---- encoding -------------------------------------------------------------------------------------------------------


def tokenize(
    tokenizer, template: str, rows: list[dict[str, str]], max_length: int, kept: tuple = (), budgets: tuple = ()
) -> tuple[Tokens, TokenReport]:
    """Encode every row's rendered template; see `encode`. kept: fields that are cut only when nothing is left of the
    others; budgets: "field=tokens", the most tokens of a field.
    """
    rules = cutting_rules(template, kept, budgets)
    return encode(tokenizer, [prompts.render(template, row) for row in rows], max_length, rules=rules)


def cutting_rules(template: str, kept: tuple, budgets: tuple) -> list[tuple]:
    """(most tokens or 0, is it cut last?) of each piece of a rendered template. UserError for unknown fields."""
    budget_of = dict(budget.split("=") for budget in budgets)
    names = files.template_columns(template)
    for flag, given in (("kept", kept), ("budgets", budget_of)):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise UserError(f"--{flag} {','.join(unknown)}: no field of the text, which has {', '.join(names)}")
    pieces = prompts.render(template, {name: name for name in names})
    return [(int(budget_of.get(text, 0)), text in kept) if field else (0, False) for field, text in pieces]


def encode(
    tokenizer,
    rows: list[list[tuple[bool, str]]],
    max_length: int,
    answers: list | None = None,
    names: list[str] | None = None,
    rules: list[tuple] = (),
) -> tuple[Tokens, TokenReport]:
    """Encode rows of pieces (is it the user's?, text) exactly as the tokenizer itself does their text, in bulk.

    A row whose user's text spells an added token (<|im_end|>, <think>, ...) is encoded so that it stays text. A row of
    more than max_length tokens is truncated, see `truncate`. BOS comes at most once. A row without text becomes the
    single end-of-text token. answers: the character spans (first, end) of each row that a language model learns. Of a
    field that was cut, what follows in its span is not learned: an answer cut short has no end. names: of rows, for
    errors. rules: of the pieces of each row, (most tokens or 0, is it cut last?). Raises UserError when a template
    alone is too long, when a row holds a lone surrogate, and when none of a row's answers is left.
    """
    texts = ["".join(text for _, text in row) for row in rows]
    broken = [str(i + 1) for i, text in enumerate(texts) if files.LONE.search(text)]
    if broken:
        raise UserError(f"{len(broken)} rows hold a lone surrogate, which is no text (rows {few(broken)})")
    report = TokenReport(rows=len(rows))
    guard = Guard(tokenizer)
    has_budget = any(most for most, _ in rules)
    encoded, learned = [], []
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if i % BULK == 0:
            bulk = tokenizer(texts[i : i + BULK]).encodings
        ids, spans = bulk[i % BULK].ids, None
        special, foreign = guard.spelled(row, text)
        if foreign:
            report.guarded += 1
            ids, spans = guard.encode(text, special)
        too_long = has_budget or len(ids) > max_length
        if spans is None and (answers or too_long):  # places in the text take time: only where they are needed
            marks = zip(bulk[i % BULK].offsets, bulk[i % BULK].special_tokens_mask, strict=True)
            spans = [None if special else span for span, special in marks]
        report.lengths.append(len(ids))

        dropped = truncate(spans, row, max_length, rules) if too_long else set()
        if dropped:
            report.cut_rows += 1
            report.cut_tokens += len(dropped)
        kept = [t for t in range(len(ids)) if t not in dropped]
        if len(kept) > 1 and ids[kept[0]] == ids[kept[1]] == tokenizer.bos_token_id:  # the template's own and another
            kept = kept[1:]
        if not kept:
            report.empty += 1
        encoded.append([ids[t] for t in kept] if kept else [end_of_text(tokenizer)])
        if answers:
            learned.append(_learned(spans, dropped, answers[i])[kept] if kept else [False])

    lost = [i for i, row in enumerate(learned) if not any(row[1:])]
    if lost:
        where = few([names[i] if names else str(i + 1) for i in lost])
        raise UserError(f"{len(lost)} rows have no token of an answer left (rows {where}): raise --max_length")
    tokens = join_tokens(encoded, learned if answers else None)
    report.tokens, report.longest = len(tokens.ids), int(tokens.lengths.max())
    return tokens, report


def _bounds(spans: list) -> np.ndarray:
    """(2, T) first characters and ends of spans; -1 and 0 where there is none."""
    bounds = [(-1, 0) if span is None else span for span in spans]
    return np.array(bounds, dtype=np.int64).reshape(-1, 2).T


def _learned(spans: list, dropped: set[int], answers: list[tuple[int, int]]) -> np.ndarray:
    """(T,) bool: which tokens hold something of an answer, up to where anything of it is dropped.

    A token that reaches from the prompt into the answer is the answer's: nothing else would write its first letters.
    """
    start, stop = _bounds(spans)
    learned = np.zeros(len(spans), bool)
    for first, end in answers:
        cut = min((start[t] for t in dropped if first <= start[t] < end), default=end)
        learned |= (stop > first) & (start < cut)
    return learned


# ---- truncation -----------------------------------------------------------------------------------------------------


def truncate(spans: list, pieces: list[tuple[bool, str]], max_length: int, rules: list[tuple] = ()) -> set[int]:
    """Which of a row's tokens are dropped, so that at most max_length are left. spans: their places in the text.

    First what a field has over its budget; then the ends of the longest fields, of those that are cut last only when
    the others are gone. The template's own words stay, for a prompt without its end asks nothing: a token that reaches
    across a border of the template is the template's. Raises UserError where the template alone is too long.
    """
    start, end = _bounds(spans)  # (T,) characters
    borders = np.cumsum([len(text) for _, text in pieces])
    first = np.searchsorted(borders, start, side="right")  # (T,) the piece that a token begins in
    last = np.searchsorted(borders, np.maximum(start, end - 1), side="right")
    piece_of = np.where((start >= 0) & (first == last), first, -1)
    tokens_of = {i: np.flatnonzero(piece_of == i).tolist() for i, (user, _) in enumerate(pieces) if user}
    template_tokens = len(spans) - _count(tokens_of.values())
    room = max_length - template_tokens
    if room < 1:
        raise UserError(
            f"the template alone has {template_tokens} tokens: --max_length {max_length} leaves no room for the text"
        )

    dropped = set()
    cut_first, cut_last = [], []
    for i, tokens in tokens_of.items():
        most, is_last = rules[i] if rules else (0, False)
        if most:
            dropped |= set(tokens[most:])
            tokens = tokens[:most]
        (cut_last if is_last else cut_first).append(tokens)
    room_first = max(0, room - _count(cut_last))
    room_last = room - min(room_first, _count(cut_first))
    return dropped | _ends(cut_first, room_first) | _ends(cut_last, room_last)


def _count(fields) -> int:
    return sum(len(tokens) for tokens in fields)


def _ends(fields: list[list[int]], room: int) -> set[int]:
    """The tokens at the ends of the longest fields that do not fit into room."""

    def used(cap: int) -> int:
        return sum(min(len(tokens), cap) for tokens in fields)

    longest = max(map(len, fields), default=0)
    cap = bisect.bisect_right(range(longest + 1), room, key=used) - 1  # the largest with which all fields fit
    spare = room - used(cap)  # less than one token a field: the first ones get it
    dropped = set()
    for tokens in fields:
        keep = cap
        if spare and len(tokens) > cap:
            keep += 1
            spare -= 1
        dropped |= set(tokens[keep:])
    return dropped


# ---- special tokens -------------------------------------------------------------------------------------------------


def end_of_text(tokenizer, padding: bool = False) -> int:
    """The id that ends a document: EOS, or else pad, or else id 0; padding: the id that pads one, pad before EOS."""
    ids = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    if padding:
        ids.reverse()
    return next((t for t in ids if t is not None), 0)


class Guard:
    """Encodes text that spells added tokens: those of the template stay special, those of the user stay text.

    A tokenizer turns the string <|im_end|> into the special token wherever it finds it. In a user's text that would
    end the user's turn, and let a post open a system turn of its own that says how it is to be judged.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.get_added_vocab()
        added = sorted((t for t in self.vocabulary if t.strip()), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, added))) if added else None

    def spelled(self, pieces: list[tuple[bool, str]], text: str) -> tuple[list, list]:
        """Where added tokens are spelled, as (first character, end): within the template's own words, and elsewhere."""
        places = [m.span() for m in self.pattern.finditer(text)] if self.pattern else []
        if not places:
            return [], []
        literals, position = [], 0
        for user, piece in pieces:
            end = position + len(piece)
            if not user:
                literals.append((position, end))
            position = end
        own = [(a, b) for a, b in places if any(first <= a and b <= end for first, end in literals)]
        return own, sorted(set(places) - set(own))

    def encode(self, text: str, special: list[tuple[int, int]]) -> tuple[list[int], list]:
        """Token ids of a text with special tokens at these places only, and the characters (first, end) of each token,
        or None for those that the tokenizer itself adds.
        """
        added = set(self.vocabulary.values()) - {self.tokenizer.unk_token_id}
        bare = _bare_backend(self.tokenizer)
        ids, spans, position = [], [], 0
        for start, end in [*special, (len(text), len(text))]:
            chunk = bare.encode(text[position:start], add_special_tokens=False)
            leaked = added & set(chunk.ids)
            if leaked:
                raise UserError(f"text {text[position:start][:60]!r} cannot be told from the special tokens {leaked}")
            ids += chunk.ids
            spans += [(position + first, position + last) for first, last in chunk.offsets]
            if end > start:
                ids.append(self.vocabulary[text[start:end]])
                spans.append((start, end))
            position = end
        around = self.tokenizer("a").encodings[0]  # what the tokenizer itself puts before and after any text
        mask = around.special_tokens_mask
        before, after = mask.index(0), mask[::-1].index(0)
        ids = around.ids[:before] + ids + around.ids[len(mask) - after :]
        return ids, [None] * before + spans + [None] * after


def _bare_backend(tokenizer):
    """The tokenizer's backend with no added tokens at all; it takes a second to make, so the tokenizer keeps it."""
    if not hasattr(tokenizer, "bare_backend"):
        backend = tokenizer.backend_tokenizer
        spec = json.loads(backend.to_str()) | {"added_tokens": []}
        tokenizer.bare_backend = type(backend).from_str(json.dumps(spec))
    return tokenizer.bare_backend


def label_word_ids(tokenizer, template: str, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The first tokens of each class's verbalizer as it would follow the rendered template; aliases separated by "|".

    A word follows the template's end after a space, or directly where the end is a space or a new line. Raises
    UserError where a token would join both, where two classes begin with the same token, and where the tokenizer ends
    a text with a token of its own, after which no word can follow.
    """
    tail = prompts.tail(template)
    context = tail or "a"  # the template ends with a field: any letter will do
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    space = "" if context[-1].isspace() else " "
    last = tokenizer("a")["input_ids"][-1]
    first_tokens, owner, problems = [], {}, []
    if last in tokenizer.all_special_ids:
        problems.append(f"its tokenizer ends a text with {tokenizer.decode([last])!r}: no word can follow")
    for c, word in enumerate(words):
        ids = []
        for alias in dict.fromkeys(a.strip() for a in word.split("|")):
            after = tokenizer(context + space + alias, add_special_tokens=False)["input_ids"]
            if not alias:
                problems.append(f"{word!r} has an empty alias: give a word on each side of |")
                continue
            if after[: len(before)] != before or len(after) == len(before):
                problems.append(
                    f"a token joins the template's end {tail[-20:]!r} and the word {alias!r}: change the end"
                )
                continue
            token = after[len(before)]
            if owner.setdefault(token, c) != c:
                other, same = words[owner[token]], tokenizer.decode([token])
                problems.append(f"{other!r} and {word!r} begin with the same token {same!r}: give other words")
            elif token not in ids:
                ids.append(token)
        first_tokens.append(tuple(ids))
    if problems:
        raise UserError("--head label_words: " + "; ".join(problems[:4]))
    return tuple(first_tokens)


# ---- the batch plan -------------------------------------------------------------------------------------------------


def plan_epoch(
    lengths: np.ndarray, batch_size: int, max_tokens: int, micro_batches: int, seed: int, epoch: int
) -> list[list[np.ndarray]]:
    """The steps of an epoch: each a list of micro-batches, each an array of row indices.

    Rows are shuffled by (seed, epoch) and cut into steps of batch_size, the last one smaller; see cut_step.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    steps = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [cut_step(rows, lengths, max_tokens, micro_batches) for rows in steps]


def cut_step(rows: np.ndarray, lengths: np.ndarray, max_tokens: int, micro_batches: int) -> list[np.ndarray]:
    """Cut a step's rows into micro-batches of at most max_tokens tokens and nearly equal work.

    Their number is the least multiple of micro_batches that fits (or one a row, if there are fewer rows). Longest rows
    go first, each to the micro-batch with the fewest tokens (LPT, Graham 1969). A row longer than max_tokens stays
    alone.
    """
    micro_batches = min(micro_batches, len(rows))
    multiples = -(-int(lengths[rows].sum()) // (max_tokens * micro_batches))  # rounded up
    count = micro_batches * max(1, multiples)
    longest_first = rows[np.argsort(-lengths[rows], kind="stable")]
    while True:
        count = min(count, len(rows))
        bins = [[] for _ in range(count)]
        loads = np.zeros(count, dtype=np.int64)
        for row in longest_first:
            least = int(loads.argmin())
            bins[least].append(row)
            loads[least] += lengths[row]
        if count == len(rows) or loads.max() <= max_tokens:
            return [np.array(b) for b in bins]
        count += micro_batches


def pack_by_length(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Micro-batches for scoring: rows in order of length, as many as fit max_tokens, each row once."""
    batches, load = [], 0
    for row in np.argsort(-lengths, kind="stable"):
        if not batches or load + lengths[row] > max_tokens:
            batches.append([])
            load = 0
        batches[-1].append(row)
        load += lengths[row]
    return [np.array(batch) for batch in batches]
