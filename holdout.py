"""Which documents or pairs cpt.py trains on, and which are held out to judge it."""

import numpy as np

import data
from corpus import Corpus, text_bytes_of
from errors import UserError

FEW = 10  # documents: of fewer than these the ends are held out


def hold_out(corpus: Corpus, val_size: float, seed: int, tokenizer) -> tuple[Corpus, Corpus, str]:
    """What to train on, what is held out, and how in words. A share of documents is one of their tokens.

    Of few documents the ends are held out, since one of them may be most of the text.
    """
    count = len(corpus.sizes)
    lengths = None
    copies = [i for group in corpus.near for i in group]
    if len(copies) == count:
        raise UserError(f"all {count} documents are nearly equal to others: leave versions out, or give --val_data")
    if val_size < 1 and not corpus.pairs:
        if count < FEW:
            return *_hold_out_ends(corpus, val_size, tokenizer, copies), f"the ends of {count} documents, which are few"
        lengths = corpus.tokens.lengths
    rest, held_out = split(count, val_size, seed, lengths, copies)
    kind = "pairs" if corpus.pairs else "documents"
    return corpus.take(rest), corpus.take(held_out), f"{len(held_out):,} of {count:,} {kind}"


def split(
    count: int,
    val_size: float,
    seed: int,
    lengths: np.ndarray | None = None,
    copies: list = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of documents to train on and of those held out. Raises UserError where one side would be empty.

    lengths: of the documents in tokens. Then val_size is a share of those, and no document that has a tenth of them or
    more is held out. copies: documents that are nearly equal to others, of which none is held out.
    """
    order = np.random.default_rng([seed, 0x5B11]).permutation(count)
    order = order[~np.isin(order, copies)]
    if lengths is None:
        size = int(val_size) if val_size >= 1 else max(1, round(count * val_size))
        held_out = order[:size]
    else:
        small = order[lengths[order] * 10 <= lengths.sum()]
        size = np.searchsorted(np.cumsum(lengths[small]), round(val_size * lengths.sum())) + 1
        held_out = small[:size]
    if not 0 < size < count or not len(held_out) or size > len(order):
        raise UserError(f"--val_size {val_size:g} of {count} documents leaves none to train on or to hold out")
    return np.setdiff1d(order, held_out), np.sort(held_out)


def _hold_out_ends(corpus, share, tokenizer, copies):
    """Two corpora: the documents without their ends, and the ends."""
    tokens = corpus.tokens
    sizes = (tokens.lengths * share).astype(int)
    cuts = np.maximum(tokens.stops - sizes, tokens.starts + 2)  # a segment needs two tokens
    for i, cut in enumerate(cuts):
        while cut > tokens.starts[i] + 2 and "\ufffd" in tokenizer.decode(tokens.ids[cut : cut + 1]):
            cut -= 1  # not within a letter
        cuts[i] = cut
    cuts[copies] = tokens.stops[copies]
    long = np.flatnonzero(tokens.stops - cuts >= 2)
    if not len(long):
        raise UserError(f"--val_size {share:g}: the documents have {tokens.lengths.sum():,} tokens, too few for that")
    kept = tokens.stops.copy()
    kept[long] = cuts[long]
    ends = data.Tokens(tokens.ids, cuts[long], tokens.stops[long])
    end_sizes = np.array([text_bytes_of(tokenizer, ends.row(i)) for i in range(len(long))])
    rest_sizes = corpus.sizes.copy()
    rest_sizes[long] -= end_sizes
    beginnings = data.Tokens(tokens.ids, tokens.starts, kept)
    rest = Corpus(beginnings, rest_sizes, False, corpus.files)
    held_out = Corpus(ends, end_sizes, False, corpus.files)
    return rest, held_out


def repeated(train: Corpus, val: Corpus) -> list[str]:
    """The names of the held-out documents or pairs that are trained on too, token by token."""
    trained = np.isin(val.tokens.keys(), train.tokens.keys())
    return [val.names[i] for i in np.flatnonzero(trained)]
