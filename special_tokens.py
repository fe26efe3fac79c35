"""Special tokens are the template's alone: no spelling of one in a user's text becomes it."""

import json
import secrets
from functools import cache

import numpy as np

import prompts
from cutting import pieces_of
from errors import UserError

NOWHERE = (-1, 0)  # the place in the text of a token that the tokenizer itself adds


def has_users_tokens(added, pieces, encoding):
    """Whether a special token of a row does not lie in the template's own words. The tokenizer's encoding tells, not
    the text: some tokenizers look for their tokens in the text in lower case, or with wide letters made narrow.
    """
    text = prompts.plain(pieces)
    places = [encoding.token_to_chars(t) for t, id in enumerate(encoding.ids) if id in added]
    words = []
    for first, end in filter(None, places):  # without those that the tokenizer puts around any text
        word = text[first:end]  # perhaps with the blanks beside it
        words.append((end - len(word.lstrip()), first + len(word.rstrip())))
    return any(i < 0 or pieces[i][0] for i in pieces_of(words, pieces))


def guarded_ids(tokenizer, added, pieces):
    """(ids of a row, characters (first, end) of each token), where only the template's own words become special tokens.

    A tokenizer turns the string <|im_end|> into the special token wherever it finds it. In a user's text that would
    end the user's turn, and let a post open a system turn of its own that says how it is to be judged. So the row is
    encoded by a tokenizer without these strings; in the template's words stand-ins, which no text can spell, take their
    place.
    """
    bare, stand_ins = bare_backend(tokenizer)
    parts = []
    origins = []  # the place in the row of each character of the parts
    start = 0
    for is_field, text in pieces:
        own = tokenizer.backend_tokenizer.encode("" if is_field else text, add_special_tokens=False)
        position = 0
        for id, (first, end) in zip(own.ids, own.offsets, strict=True):
            if id in added:
                stand_in = stand_ins[id]
                parts += [text[position:first], stand_in]
                origins.append(np.arange(position, first) + start)
                origins.append(np.full(len(stand_in), first + start))
                position = end
        parts.append(text[position:])
        origins.append(np.arange(position, len(text)) + start)
        start += len(text)
    origin = np.concatenate([*origins, [start]])

    encoding = bare.encode("".join(parts))
    real = {stand_in: id for id, stand_in in stand_ins.items()}
    ids, spans = [], []
    marks = zip(encoding.ids, encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True)
    for id, token, (first, end), is_around in marks:
        if is_around:
            ids.append(id)
            spans.append(NOWHERE)
            continue
        name = token.strip()
        if id in added and name not in real:
            raise UserError(f"text {token!r} cannot be told from the special token {tokenizer.decode([id])!r}")
        ids.append(real.get(name, id))
        spans.append((int(origin[first]), int(origin[end])))
    return ids, spans


def around(tokenizer):
    """The ids that the tokenizer itself puts before and after any text."""
    encoding = tokenizer("a").encodings[0]
    mask = encoding.special_tokens_mask
    return encoding.ids[: mask.index(0)], encoding.ids[len(mask) - mask[::-1].index(0) :]


@cache
def bare_backend(tokenizer):
    """(the tokenizer's backend, which knows added tokens by stand-ins alone, {id: its stand-in}); it takes a second."""
    vocabulary = tokenizer.get_added_vocab()
    secret = secrets.token_hex(8)
    stand_ins = {id: f"\ue000{secret} {id}\ue001" for id in vocabulary.values() if id != tokenizer.unk_token_id}
    names = {token: stand_ins[id] for token, id in vocabulary.items() if id in stand_ins}

    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [
        {**token, "content": names[token["content"]], "normalized": False}
        for token in spec["added_tokens"]
        if token["content"] in names
    ]

    # A unigram model would find the strings itself.
    words = spec["model"].get("vocab")
    if isinstance(words, list):
        spec["model"]["vocab"] = [[names.get(word, word), score] for word, score in words]
    bare = type(backend).from_str(json.dumps(spec))
    return bare, stand_ins
