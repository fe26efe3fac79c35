"""Rows, labels, splits, tokens, and the batch plan.

A step's rows are a pure function of (seed, epoch, lengths, batch_size, max_tokens, micro_batches), never of the number
of ranks: micro-batch j of a step runs on rank j mod W. Nothing is padded, duplicated or dropped: a micro-batch is one
row of concatenated sequences.
"""

import csv
import hashlib
import json
import re
import sys
from dataclasses import dataclass, field

import numpy as np

import files
import prompts
from errors import UserError, few

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


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
        """(N,) tokens of each row that a language model predicts: of those learned all but the row's first."""
        if self.learned is None:
            return self.lengths - 1
        before = np.concatenate([[0], np.cumsum(self.learned)])
        return before[self.stops] - before[self.starts + 1]

    def row(self, i: int) -> np.ndarray:
        return self.ids[self.starts[i] : self.stops[i]]

    def take(self, rows: np.ndarray) -> "Tokens":
        """Some rows, in the given order."""
        return Tokens(self.ids, self.starts[rows], self.stops[rows], self.learned)

    def digest(self, *more: np.ndarray) -> str:
        """sha256 over the tokens of all rows and more arrays: a resumed run must see the same."""
        parts = [self.ids, self.starts, self.stops, *(a for a in (self.learned, *more) if a is not None)]
        found = hashlib.sha256()
        for part in parts:
            found.update(np.ascontiguousarray(part))
        return found.hexdigest()


def join_tokens(rows: list, learned: list | None = None) -> Tokens:
    """Tokens from one id sequence a row and, where not everything is learned, one of booleans a row."""
    ends = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    ids = np.concatenate([np.asarray(r, dtype=np.int32) for r in rows])
    return Tokens(ids, ends[:-1], ends[1:], None if learned is None else np.concatenate(learned).astype(bool))


@dataclass
class TokenReport:
    """What happened on the way from text to tokens."""

    rows: int = 0
    tokens: int = 0
    longest: int = 0
    cut_rows: int = 0  # rows over max_length
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
        return text + (f"; {self.empty} rows are empty" if self.empty else "")


def tokenize(
    tokenizer, template: str, rows: list[dict[str, str]], max_length: int, kept: tuple = (), budgets: tuple = ()
) -> tuple[Tokens, TokenReport]:
    """Encode every row's rendered template; see `encode`. kept: fields that are cut only when nothing is left of the
    others; budgets: "field=tokens", the most tokens of a field.
    """
    rules = cutting_rules(template, kept, budgets)
    return encode(tokenizer, [prompts.render(template, row) for row in rows], max_length, rules=rules)


def cutting_rules(template: str, kept: tuple, budgets: tuple) -> list[tuple]:
    """(most tokens or None, is it cut last?) of each piece of a rendered template. UserError for unknown fields."""
    most = {name: int(count) for name, _, count in (part.partition("=") for part in budgets)}
    names = files.template_columns(template)
    for flag, given in (("kept", kept), ("budgets", tuple(most))):
        if unknown := [name for name in given if name not in names]:
            raise UserError(f"--{flag} {','.join(unknown)}: no field of the text, which has {', '.join(names)}")
    slots = prompts.render(template, {name: name for name in names})
    return [(most.get(text), text in kept) if field else (None, False) for field, text in slots]


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
    more than max_length tokens loses the end of its longest field, never the template around it. BOS comes at most
    once. A row without text becomes the single end-of-text token. answers: the character spans (first, end) of each
    row that a language model learns. Of a field that was cut, what follows in its span is not learned: an answer cut
    short has no end. names: of rows, for errors. rules: of the pieces of each row, (most tokens or None, is it cut
    last?). Raises UserError when a template alone is too long, when a row holds a lone surrogate, and when none of a
    row's answers is left.
    """
    texts = ["".join(text for _, text in row) for row in rows]
    lone = [str(i + 1) for i, t in enumerate(texts) if files.LONE.search(t)]
    if lone:
        raise UserError(f"{len(lone)} rows hold a lone surrogate, which is no text (rows {few(lone)})")
    report, guard = TokenReport(rows=len(rows)), Guard(tokenizer)
    encoded, learned, capped = [], [] if answers else None, any(most for most, _ in rules)
    for i, row in enumerate(rows):
        if i % 1000 == 0:  # in bulk, but never all at once
            bulk = (
                tokenizer(texts[i : i + 1000])["input_ids"] if not answers else _located(tokenizer, texts[i : i + 1000])
            )
        ids, offsets = bulk[i % 1000] if answers else (bulk[i % 1000], None)
        if guard.needed(row, texts[i]):
            report.guarded += 1
            ids, offsets = guard.encode(row)
        elif offsets is None and (len(ids) > max_length or capped):
            ids, offsets = _located(tokenizer, [texts[i]])[0]
        report.lengths.append(len(ids))
        dropped = _too_long(ids, offsets, row, max_length, report, rules) if offsets else set()
        kept = [t for t in range(len(ids)) if t not in dropped]
        if len(kept) > 1 and ids[kept[0]] == ids[kept[1]] == tokenizer.bos_token_id:
            kept = kept[1:]
        if len(kept) == 0:
            report.empty += 1
        encoded.append([ids[t] for t in kept] if kept else [end_of_text(tokenizer)])
        if answers:
            learned.append(_learned(offsets, dropped, answers[i])[kept] if kept else [False])
    without = [names[i] if names else str(i + 1) for i, row in enumerate(learned or []) if not any(row[1:])]
    if without:
        raise UserError(
            f"{len(without)} rows have no token of an answer left (rows {few(without)}): raise --max_length"
        )
    tokens = join_tokens(encoded, learned)
    report.tokens, report.longest = len(tokens.ids), int(tokens.lengths.max())
    return tokens, report


def _learned(offsets: list, dropped: set[int], spans: list[tuple[int, int]]) -> np.ndarray:
    """(T,) bool: which tokens hold something of an answer, up to where anything of it is dropped.

    A token that reaches from the prompt into the answer is the answer's: nothing else would write its first letters.
    """
    start, stop = np.array([(-1, 0) if span is None else span for span in offsets]).T
    found = np.zeros(len(offsets), bool)
    for first, end in spans:
        cut = min((start[t] for t in dropped if first <= start[t] < end), default=end)
        found |= (stop > first) & (start < cut)
    return found


def end_of_text(tokenizer, padding: bool = False) -> int:
    """The id that ends a document: EOS, or else pad, or else id 0; padding: the id that pads one, pad before EOS."""
    ids = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((t for t in (ids[::-1] if padding else ids) if t is not None), 0)


def label_word_ids(tokenizer, template: str, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The first tokens of each class's word as it would follow the rendered template; aliases stand apart by "|".

    A word follows the template's end after a space, or directly where the end is a space or a new line. Raises
    UserError where a token would join both, where two classes begin with the same token, and where the tokenizer ends
    a text with a token of its own, after which no word can follow.
    """
    tail = prompts.tail(template)
    context = tail or "a"  # a field's text stands there: any letter will do
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    space = "" if context[-1].isspace() else " "
    last, found, owner, problems = tokenizer("a")["input_ids"][-1], [], {}, []
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
                both = f"{words[owner[token]]!r} and {word!r}"
                problems.append(f"{both} begin with the same token {tokenizer.decode([token])!r}: give other words")
            elif token not in ids:
                ids.append(token)
        found.append(tuple(ids))
    if problems:
        raise UserError("--head label_words: " + "; ".join(problems[:4]))
    return tuple(found)


class Guard:
    """Encodes text that spells added tokens: those of the template stay special, those of the user stay text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        added = sorted((t for t in tokenizer.get_added_vocab() if t.strip()), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, added))) if added else None

    def needed(self, pieces: list[tuple[bool, str]], text: str) -> bool:
        """Whether an added token's string lies outside the template's own words."""
        return bool(self.added and self.added.search(text)) and len(self._spans(pieces, text)[1]) > 0

    def _spans(self, pieces, text) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Character spans of added tokens: (inside the template's literal pieces, elsewhere)."""
        literal, start = [], 0
        for user, piece in pieces:
            if not user:
                literal.append((start, start + len(piece)))
            start += len(piece)
        spans = [m.span() for m in self.added.finditer(text)]
        inside = [s for s in spans if any(a <= s[0] and s[1] <= b for a, b in literal)]
        return inside, [s for s in spans if s not in inside]

    @property
    def bare(self):
        """The tokenizer's backend with no added tokens at all; it takes a second to make, so the tokenizer keeps it."""
        if not hasattr(self.tokenizer, "bare_backend"):
            backend = self.tokenizer.backend_tokenizer
            spec = json.loads(backend.to_str())
            spec["added_tokens"] = []
            self.tokenizer.bare_backend = type(backend).from_str(json.dumps(spec))
        return self.tokenizer.bare_backend

    def encode(self, pieces: list[tuple[bool, str]]) -> tuple[list[int], list]:
        """Token ids of one row, and the characters (first, end) of each, or None for the tokenizer's own."""
        text = "".join(piece for _, piece in pieces)
        special, _ = self._spans(pieces, text)
        vocabulary = self.tokenizer.get_added_vocab()
        plain = self.tokenizer("a", return_special_tokens_mask=True)
        around, mask = plain["input_ids"], plain["special_tokens_mask"]
        first, last = mask.index(0), len(mask) - mask[::-1].index(0)
        ids, offsets = list(around[:first]), [None] * first
        at = 0
        for start, end in [*special, (len(text), len(text))]:
            chunk = self.bare.encode(text[at:start], add_special_tokens=False)
            leaked = (set(chunk.ids) & set(vocabulary.values())) - {self.tokenizer.unk_token_id}
            if leaked:
                raise UserError(f"text {text[at:start][:60]!r} cannot be told from the special token ids {leaked}")
            ids += chunk.ids
            offsets += [(at + a, at + b) for a, b in chunk.offsets]
            if end > start:
                ids.append(vocabulary[text[start:end]])
                offsets.append((start, end))
            at = end
        return ids + around[last:], offsets + [None] * (len(around) - last)


def _located(tokenizer, texts: list[str]) -> list[tuple[list[int], list]]:
    """Token ids of texts, and the characters (first, end) of each, or None for the tokenizer's own."""
    full = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True)
    columns = zip(full["input_ids"], full["offset_mapping"], full["special_tokens_mask"], strict=True)
    return [(ids, [None if m else s for s, m in zip(at, mask, strict=True)]) for ids, at, mask in columns]


def _too_long(ids: list[int], offsets: list, pieces, max_length: int, report: TokenReport, rules=()) -> set[int]:
    """Which tokens to drop: those over a field's budget, then from the ends of the longest fields so that max_length
    are left, of fields that are cut last only when the others are gone.

    A token that reaches across a border of the template is the template's and stays.
    """
    if len(ids) <= max_length and not any(most for most, _ in rules):
        return set()
    ends = np.cumsum([len(text) for _, text in pieces])
    start, end = np.array([(-1, 0) if span is None else span for span in offsets]).T
    first, last = (np.searchsorted(ends, at, side="right") for at in (start, np.maximum(start, end - 1)))
    owner = np.where((start >= 0) & (first == last), first, -1).tolist()
    tokens_of = {i: [t for t, o in enumerate(owner) if o == i] for i, (user, _) in enumerate(pieces) if user}
    room, dropped = max_length - (len(ids) - sum(map(len, tokens_of.values()))), set()
    if room < 1:
        fixed = max_length - room
        raise UserError(f"the template alone has {fixed} tokens: --max_length {max_length} leaves no room for the text")
    for i, (most, _) in enumerate(rules):
        if most and i in tokens_of:
            dropped |= set(tokens_of[i][most:])
            tokens_of[i] = tokens_of[i][:most]
    last = [tokens for i, tokens in tokens_of.items() if rules and rules[i][1]]
    others = [tokens for i, tokens in tokens_of.items() if not (rules and rules[i][1])]
    left = max(0, room - sum(map(len, last)))
    dropped |= _over(others, left) | _over(last, room - min(left, sum(map(len, others))))
    if dropped:
        report.cut_rows += 1
        report.cut_tokens += len(dropped)
    return dropped


def _over(fields: list[list[int]], room: int) -> set[int]:
    """The tokens at the ends of the longest fields that do not fit into room."""
    low, high = 0, max(map(len, fields), default=0)  # the largest cap with which all fields fit
    while low < high:
        cap = (low + high + 1) // 2
        low, high = (cap, high) if sum(min(len(t), cap) for t in fields) <= room else (low, cap - 1)
    spare, dropped = room - sum(min(len(t), low) for t in fields), set()
    for tokens in fields:
        keep = low + (spare > 0 and len(tokens) > low)
        spare -= keep - low
        dropped |= set(tokens[keep:])
    return dropped


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
    count = micro_batches * max(1, -(-int(lengths[rows].sum()) // (max_tokens * micro_batches)))
    longest_first = rows[np.argsort(-lengths[rows], kind="stable")]
    while True:
        count = min(count, len(rows))
        bins, loads = [[] for _ in range(count)], np.zeros(count, dtype=np.int64)
        for row in longest_first:
            least = int(loads.argmin())
            bins[least].append(row)
            loads[least] += lengths[row]
        if count == len(rows) or loads.max() <= max_tokens:
            return [np.array(b) for b in bins]
        count += micro_batches


def pack_by_length(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Micro-batches for scoring: rows in order of length, as many as fit max_tokens, each row once."""
    batches, now, load = [], [], 0
    for row in np.argsort(-lengths, kind="stable"):
        if now and load + lengths[row] > max_tokens:
            batches.append(np.array(now))
            now, load = [], 0
        now.append(row)
        load += lengths[row]
    return batches + [np.array(now)] if now else batches
