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
    parts, origins, start = [], [], 0  # origins: the place in the row of each character of the parts
    for is_field, text in pieces:
        own = tokenizer.backend_tokenizer.encode("" if is_field else text, add_special_tokens=False)
        position = 0
        for id, (first, end) in zip(own.ids, own.offsets, strict=True):
            if id in added:
                parts += [text[position:first], stand_ins[id]]
                origins += [np.arange(position, first) + start, np.full(len(stand_ins[id]), first + start)]
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
        spans.append(NOWHERE if is_around else (int(origin[first]), int(origin[end])))
        ids.append(real.get(token.strip(), id))
        if ids[-1] in added and not is_around and token.strip() not in real:
            raise UserError(f"text {token!r} cannot be told from the special token {tokenizer.decode([id])!r}")
    return ids, spans


def around(tokenizer):
    """The ids that the tokenizer itself puts before and after any text."""
    encoding = tokenizer("a").encodings[0]
    mask = encoding.special_tokens_mask
    return encoding.ids[: mask.index(0)], encoding.ids[len(mask) - mask[::-1].index(0) :]


@cache
def bare_backend(tokenizer):
    """(the tokenizer's backend, which knows added tokens by stand-ins alone, {id: its stand-in}); it takes a second."""
    vocabulary, secret = tokenizer.get_added_vocab(), secrets.token_hex(8)
    names = {token: f"\ue000{secret} {id}\ue001" for token, id in vocabulary.items() if id != tokenizer.unk_token_id}
    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    known = [token for token in spec["added_tokens"] if token["content"] in names]
    spec["added_tokens"] = [{**token, "content": names[token["content"]], "normalized": False} for token in known]
    if isinstance(spec["model"].get("vocab"), list):  # a unigram model would find the strings itself
        spec["model"]["vocab"] = [[names.get(token, token), score] for token, score in spec["model"]["vocab"]]
    return type(backend).from_str(json.dumps(spec)), {vocabulary[token]: name for token, name in names.items()}
