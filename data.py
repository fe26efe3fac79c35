"""From text to tokens to the batch plan.

`tokenize` renders a row's template and encodes it; `truncate` in cutting.py decides what a row that is too long loses.

A step's rows are a pure function of (seed, epoch, lengths, batch_size, max_tokens, micro_batches), never of the number
of ranks: micro-batch j of a step runs on rank j mod W. Nothing is padded, duplicated or dropped: a micro-batch is one
row of concatenated sequences.
"""

import hashlib
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np

import files
import prompts
from cutting import bounds, cutting_rules, ends_of_kept, moved, shortened, truncate
from errors import UserError, few
from special_tokens import NOWHERE, around, bare_backend, guarded_ids, has_users_tokens

UNKNOWN = 0.2  # a larger share of tokens that are unknown is a warning
BULK, BULK_TEXT = 1000, 2**22  # rows, and characters, that are encoded at once: many, for speed; not all, for memory
LONG = 2**17  # characters of a row that may be encoded in part: shorter ones never are
PER_TOKEN, LEAST, MOST = 16, 2**12, 2**20  # characters of its fields that are tried: at first so many, at most so many
STRETCH = 2**22  # tokens that are looked at together
PIECE, WINDOW, TRIES = 2**16, 64, 32  # characters of a long document's pieces, and around a cut; places to try
CUT = re.compile(r"[^\W\d_](?=[ -&(-/:-@\[-^`{-~\n\t])")  # words end between a letter and ASCII that is none
BREAK = re.compile(r"[^\W_]\s")  # between these two every tokenizer's words end, whatever follows


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

    def keys(self) -> np.ndarray:
        """(N,) numbers, equal for rows of equal tokens; they hold within this process only."""
        return np.array([hash(self.row(i).tobytes()) for i in range(len(self.starts))])

    def take(self, rows: np.ndarray) -> "Tokens":
        """Some rows, in the given order."""
        return Tokens(self.ids, self.starts[rows], self.stops[rows], self.learned)

    def digest(self, *more: np.ndarray) -> str:
        """sha256 over the tokens of all rows and more arrays: a resumed run must see the same."""
        digest = hashlib.sha256()
        for array in (self.ids, self.starts, self.stops, self.learned, *more):
            for part in [] if array is None else pages(array):
                digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()


def pages(array: np.ndarray) -> Iterator[np.ndarray]:
    """Stretches of an array, one after the other; of one in a file the memory of each is given back."""
    for i in range(0, len(array), STRETCH):
        yield array[i : i + STRETCH]
        if isinstance(array, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
            array._mmap.madvise(mmap.MADV_DONTNEED)


def join_tokens(rows: list) -> Tokens:
    """Tokens from one id sequence a row."""
    lengths = list(map(len, rows))
    stops = np.cumsum(lengths, dtype=np.int64)
    return Tokens(np.concatenate(rows).astype(np.int32), stops - lengths, stops)


@dataclass
class TokenReport:
    """What happened on the way from text to tokens."""

    tokens: int = 0
    longest: int = 0
    cut_rows: int = 0  # rows that were truncated
    cut_tokens: int = 0
    guarded: int = 0  # rows whose fields hold the string of an added token
    empty: int = 0
    unknown: int = 0  # tokens that stand for what the tokenizer does not know
    partly: int = 0  # rows so long that the middle of their fields was not encoded: their lengths are at least these
    unsure: int = 0  # those of them without white space where it would prove that the tokens are the same
    lengths: list[int] = field(default_factory=list)  # tokens of each row before it was cut
    keys: np.ndarray | None = None  # where scores are compared: `Tokens.keys`

    def add(self, other: "TokenReport") -> None:
        """Add what happened to the rows that follow."""
        for name in ("tokens", "cut_rows", "cut_tokens", "guarded", "empty", "unknown", "partly", "unsure", "lengths"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        if other.keys is not None:
            self.keys = other.keys if self.keys is None else np.concatenate([self.keys, other.keys])

    def __str__(self):
        text = f"{len(self.lengths):,} rows, {self.tokens:,} tokens, longest {self.longest}"
        if self.cut_rows:
            text += f"; {self.cut_rows} rows cut to the limit, {self.cut_tokens:,} tokens lost"
        if self.partly:
            text += (
                f"; {self.partly} very long rows were encoded as far as they are kept: their lengths are at least these"
            )
        if self.unsure:
            text += f" ({self.unsure} have long stretches without white space: encoded whole, their tokens may differ)"
        if self.guarded:
            text += f"; {self.guarded} rows name special tokens in their text: encoded as plain text"
        if self.unknown:
            text += f"; {self.unknown:,} tokens ({self.unknown / self.tokens:.0%}) are unknown to the tokenizer"
        if self.unknown > UNKNOWN * self.tokens:
            text += ": that much of the text is not read; choose a base that knows its letters"
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


def encode(
    tokenizer,
    rows: list[prompts.Pieces],
    max_length: int,
    answers: list = (),
    names: list = (),
    rules: list = (),
) -> tuple[Tokens, TokenReport]:
    """Encode rows of pieces (is it the user's?, text) exactly as the tokenizer itself does their text, in bulk.

    A row whose user's text spells an added token (<|im_end|>, <think>, ...) is encoded so that it stays text. A row of
    more than max_length tokens is truncated, see cutting.py. BOS comes at most once. A row without text becomes the
    single end-of-text token. answers: the character spans (first, end) of each row that a language model learns. Of a
    field that was cut, what follows in its span is not learned: an answer cut short has no end. names: of rows, for
    errors. rules: of the pieces of each row, (most tokens or 0, is it cut last?). Raises UserError when a template
    alone is too long, when a row holds a lone surrogate, and when none of a row's answers is left.
    """
    texts = [prompts.plain(row) for row in rows]
    broken = [str(i) for i, text in enumerate(texts, 1) if files.LONE.search(text)]
    if broken:
        raise UserError(f"{len(broken)} rows hold a lone surrogate, which is no text (rows {few(broken)})")
    report = TokenReport()
    # White space is never special: models have tokens of their own for runs of it.
    vocabulary = tokenizer.get_added_vocab()
    added = {id for token, id in vocabulary.items() if token.replace("\u2581", " ").strip()}
    added.discard(tokenizer.unk_token_id)
    encode_row = partial(_encode_row, tokenizer, added, max_length, rules, bool(answers))
    size = PER_TOKEN * max_length + LEAST
    is_long = [len(text) > max(LONG, 4 * size) for text in texts]
    is_document = [not answers and LONG < len(text) < max_length // 8 for text in texts]  # which is never truncated
    encodings = _encodings(
        tokenizer, ["" if any(long) else text for *long, text in zip(is_long, is_document, texts, strict=True)]
    )
    encoded, learned, lost = [], [], []
    for i, encoding in enumerate(encodings):
        row, places = rows[i], answers[i] if answers else []
        if is_document[i]:
            ids, guarded = _encode_document(tokenizer, encode_row, row)
            report.guarded += guarded
            report.lengths.append(len(ids))
            encoded.append(ids)
            continue
        if is_long[i]:
            whole = row
            row, result, is_sure = _encode_long(tokenizer, encode_row, whole, size)
            places = [[moved(place, whole, row) for place in span] for span in places]
            report.partly += row != whole
            report.unsure += not is_sure
        else:
            result = encode_row(row, encoding)
        ids, spans, kept, guarded = result
        report.guarded += guarded
        report.lengths.append(len(ids))
        report.cut_rows += len(kept) < len(ids)
        report.cut_tokens += len(ids) - len(kept)
        if len(kept) > 1 and ids[kept[0]] == ids[kept[1]] == tokenizer.bos_token_id:  # the template's own and another
            kept = kept[1:]
        if answers and len(kept) > 1 and ids[kept[-1]] == ids[kept[-2]] == tokenizer.eos_token_id:  # likewise
            kept = kept[:-1]
        report.empty += not kept
        is_whole = len(kept) == len(ids) > 0
        encoded.append(ids if is_whole else [ids[t] for t in kept] or [end_of_text(tokenizer)])
        if answers:
            learned.append(_learned(spans, kept, places)[kept] if kept else [False])
            if not any(learned[i][1:]):
                lost.append(names[i])

    if lost:
        raise UserError(f"{len(lost)} rows have no token of an answer left (rows {few(lost)}): raise --max_length")
    tokens = join_tokens(encoded)
    if answers:
        tokens.learned = np.concatenate(learned)
    report.tokens, report.longest = len(tokens.ids), int(tokens.lengths.max())
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        report.unknown = np.count_nonzero(tokens.ids == tokenizer.unk_token_id)
    return tokens, report


def _encodings(tokenizer, texts):
    """The tokenizer's encodings of texts, made in bulk."""
    batch, size = [], 0
    for text in texts:
        if batch and (len(batch) == BULK or size + len(text) > BULK_TEXT):
            yield from tokenizer(batch).encodings
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield from tokenizer(batch).encodings


def _encode_row(tokenizer, added, max_length, rules, need_spans, row, encoding):
    """(ids of a row, their places in its text or None, the tokens that are kept, did the user's text become an added
    token?). added: the ids of these; encoding: the tokenizer's, of the row's text.
    """
    ids, spans = encoding.ids, None
    guarded = not added.isdisjoint(ids) and has_users_tokens(added, row, encoding)
    if guarded:
        ids, spans = guarded_ids(tokenizer, added, row)
    too_long = len(ids) > max_length or any(most for most, _ in rules)
    if spans is None and (need_spans or too_long):  # places in the text take time: only where they are needed
        marks = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        spans = [NOWHERE if is_special else span for span, is_special in marks]
    kept = truncate(spans, row, max_length, rules) if too_long else list(range(len(ids)))
    return ids, spans, kept, guarded


# ---- very long rows -------------------------------------------------------------------------------------------------


def _encode_long(tokenizer, encode_row, row, size):
    """(a row without the middle of its longest fields, encode_row of it, are its tokens surely those of the whole?).

    The tokens that are kept come from the first `size` characters of each field, and end before a place where a word
    ends whatever follows. They are compared with those of twice as many characters, and of more until both are equal.
    """
    before = None
    while True:
        short = [(is_field, shortened(text, size) if is_field else text) for is_field, text in row]
        result = encode_row(short, tokenizer(prompts.plain(short)).encodings[0])
        ids, spans, kept, _ = result
        if short == row:
            return row, result, True
        tokens = [ids[t] for t in kept]
        ends = ends_of_kept(spans, kept, short) if spans else [size] * len(row)
        parts = [(i, text) for i, (_, text) in enumerate(short) if short[i] != row[i]]
        same = tokens == before and all(ends[i] < size for i, _ in parts)
        if same or size >= MOST:
            begins = all(BREAK.search(text, ends[i], size) for i, text in parts)
            tails = all(BREAK.search(text, size) for i, text in parts if i < len(row) - 1)
            return short, result, same and begins and tails
        before, size = tokens, 2 * size


def _encode_document(tokenizer, encode_row, row):
    """(ids of a row that is never truncated, does its text spell an added token?), encoded in pieces."""
    before, after = around(tokenizer)
    ids, is_guarded = [], False
    for part in _document_parts(tokenizer, row):
        part_ids, _, _, guarded = encode_row(part, tokenizer(prompts.plain(part)).encodings[0])
        ids.append(np.array(part_ids[len(before) : len(part_ids) - len(after)], np.int32))
        is_guarded |= guarded
    ids = np.concatenate([before, *ids, after]).astype(np.int32)
    is_doubled = ids[0] == ids[1] == tokenizer.bos_token_id
    return ids[int(is_doubled) :], is_guarded


def _document_parts(tokenizer, row):
    """A row cut in its fields, at places where the tokenizer splits the text anyway."""
    part = []
    for is_field, text in row:
        start = 0
        while is_field and len(text) - start > PIECE:
            places = (m.end() for m in islice(CUT.finditer(text, start + PIECE), TRIES))
            end = next((place for place in places if _splits(tokenizer, text, place)), None)
            if not end:  # encoded whole, which takes more time and memory
                break
            yield [*part, (True, text[start:end])]
            part, start = [], end
        part.append((is_field, text[start:]))
    yield part


def _splits(tokenizer, text, place):
    """Whether the tokens around a place are those of the text before it and those of the text after it."""
    left, right = text[max(0, place - WINDOW) : place], text[place : place + WINDOW]
    bare, _ = bare_backend(tokenizer)
    whole, first, second = (bare.encode(part, add_special_tokens=False).ids for part in (left + right, left, right))
    return whole == first + second


def _learned(spans, kept, answers):
    """(T,) bool: which tokens hold something of an answer (first, end), up to where anything of it is dropped.

    A token that reaches from the prompt into the answer is the answer's: nothing else would write its first letters.
    """
    start, stop = bounds(spans)
    dropped = np.delete(start, kept)
    learned = np.zeros(len(spans), bool)
    for first, end in answers:
        cut = min(dropped[(dropped >= first) & (dropped < end)], default=end)
        learned |= (stop > first) & (start < cut)
    return learned


# ---- special tokens -------------------------------------------------------------------------------------------------


def end_of_text(tokenizer, padding: bool = False, need: bool = False) -> int:
    """The id that ends a document: EOS, or else pad, or else id 0; padding: the id that pads one, pad before EOS.

    need: raise UserError rather than take id 0, which is a letter of many vocabularies.
    """
    ids = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    if padding:
        ids.reverse()
    if need and ids == [None, None]:
        advice = "name its eos_token in tokenizer_config.json"
        raise UserError(f"the base's tokenizer has no EOS and no padding token: {advice}")
    return next((t for t in ids if t is not None), 0)


def label_word_ids(tokenizer, template: str, words: tuple[str, ...]) -> tuple[tuple, ...]:
    """The first tokens of each class's verbalizer as it would follow the rendered template; aliases separated by "|".

    A word follows the template's end after a space, or directly where the end is a space or a new line. Raises
    UserError where a token would join both, where two classes begin with the same token, and where the tokenizer ends
    a text with a token of its own, after which no word can follow.
    """
    context = prompts.tail(template) or "a"  # where the template ends with a field any letter will do
    before = tokenizer.encode(context, add_special_tokens=False)
    stem = context if context[-1].isspace() else context + " "
    last = tokenizer.encode("a")[-1]
    owner, problems = {}, []  # owner: the class of each first token
    if last in tokenizer.all_special_ids:
        problems.append(f"its tokenizer ends a text with {tokenizer.decode([last])!r}: no word can follow")
    for c, word in enumerate(words):
        for alias in map(str.strip, word.split("|")):
            after = tokenizer.encode(stem + alias, add_special_tokens=False)
            token = after[len(before) : len(before) + 1]  # as a list: there may be none
            if not alias:
                problems.append(f"{word!r} has an empty alias: give a word on each side of |")
            elif not token or after[: len(before)] != before:
                problem = f"a token joins the template's end {context[-20:]!r} and the word {alias!r}: change the end"
                problems.append(problem)
            elif owner.setdefault(token[0], c) != c:
                other, same = words[owner[token[0]]], tokenizer.decode(token)
                problems.append(f"{other!r} and {word!r} begin with the same token {same!r}: give other words")
    if problems:
        raise UserError("--head label_words: " + "; ".join(problems[:4]))
    return tuple(tuple(token for token in owner if owner[token] == c) for c in range(len(words)))


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
    longest_first = rows[np.argsort(-lengths[rows], kind="stable")]
    for count in [*range(micro_batches * multiples, len(rows), micro_batches), len(rows)]:
        bins = [[] for _ in range(count)]
        loads = [0] * count
        for row in longest_first:
            least = loads.index(min(loads))
            bins[least].append(row)
            loads[least] += lengths[row]
        if max(loads) <= max_tokens:
            break
    return list(map(np.array, bins))


def fullest(lengths: np.ndarray, count: int, max_tokens: int) -> np.ndarray:
    """At most `count` rows, long ones first, that fill max_tokens as a micro-batch of a step may; one row at least."""
    rows, load = [], 0
    for row in np.argsort(-lengths, kind="stable"):
        if not rows or load + lengths[row] <= max_tokens:
            rows.append(row)
            load += lengths[row]
        if len(rows) == count or load >= max_tokens:
            break
    return np.array(rows)


def pack_by_length(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Micro-batches for scoring: rows in order of length, as many as fit max_tokens, each row once."""
    batches, load = [], 0
    for row in np.argsort(-lengths, kind="stable"):
        if not batches or load + lengths[row] > max_tokens:
            batches.append([])
            load = 0
        batches[-1].append(row)
        load += lengths[row]
    return list(map(np.array, batches))
