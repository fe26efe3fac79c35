"""Text templates: from a row's columns to the text that the model reads, keeping apart what is the user's.

A template is a Python format string over column names, such as "Rule: {rule}\\nPost: {body}". A chat is a list of
messages {"role", "content"} that the tokenizer's own chat template renders.
"""

import datetime
import os
import re
import string

QUESTION = {"role": "user", "content": "?"}
DATE = "26 Jul 2024"  # what templates that print today's date are told: scores must not change by the day
DAY = datetime.date(2024, 7, 26)
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
THINK = re.compile(r"(\s*</?think>\s*)")  # where templates take an answer apart


def fields(template: str) -> list[str]:
    """The column names of a template, in order. Raises ValueError for a malformed or positional one."""
    try:
        slots = [slot for slot in string.Formatter().parse(template) if slot[1] is not None]
    except ValueError as e:
        raise ValueError(f'template "{template}": {e}') from None
    names = [name for _, name, _, _ in slots]
    if not names or any(n == "" or n.isdigit() for n in names):
        raise ValueError(f'template "{template}": expected named columns such as {{Question}}')
    formatted = [name for _, name, spec, conversion in slots if spec or conversion]
    if formatted:
        raise ValueError(f'template "{template}": a text is put in as it is, without a format (:) or conversion (!)')
    return list(dict.fromkeys(names))


def render(template: str, row: dict[str, str]) -> list[tuple[bool, str]]:
    """A row's text as pieces (is it the user's?, text); joined they are the rendered text."""
    pieces = []
    for literal, name, _, _ in string.Formatter().parse(template):
        if literal:
            pieces.append((False, literal))
        if name is not None:
            pieces.append((True, row[name]))
    return pieces


def tail(template: str) -> str:
    """What a template says after its last column."""
    *_, (literal, name, _, _) = string.Formatter().parse(template)
    return literal if name is None else ""


def chat(tokenizer, messages: list[dict], tools: list | None = None, answer: bool = False) -> list[tuple[bool, str]]:
    """A chat as pieces (is it a message's?, text), rendered by the tokenizer's template; joined they are its text.

    answer: end with the opening of the assistant's next turn. Raises ValueError for messages that the template refuses,
    or that it does not put in as they are.
    """
    text, fields, marked = rendered(tokenizer, messages, tools, answer), [], []
    contents = [m.get("content") or "" for m in messages]
    for message, content in zip(messages, contents, strict=True):
        own = THINK.split(content) if message["role"] == "assistant" else [content]
        mark = "".join(p if i % 2 or not p else f"\ue000{len(fields) + i}\ue001" for i, p in enumerate(own))
        marked.append({**message, "content": mark})
        fields += own
    parts = re.split("\ue000([0-9]+)\ue001", rendered(tokenizer, marked, tools, answer))
    for strip in (False, True):  # some templates strip what they are given
        fill = [f.strip() if strip else f for f in fields]
        pieces = [(i % 2 == 1, fill[int(part)] if i % 2 else part) for i, part in enumerate(parts)]
        if "".join(part for _, part in pieces) == text:
            return [piece for piece in pieces if piece[1]]
    spelled = [t for t in sorted(special_tokens(tokenizer)) if any(t in c for c in contents)]
    if spelled:
        raise ValueError(f"a message spells the special token {spelled[0]}, and the chat template rewrites it")
    return [(False, text)]


def rendered(tokenizer, messages: list[dict], tools: list | None, answer: bool) -> str:
    """A chat's text by the tokenizer's template, on a pinned date. Raises ValueError where the template refuses it."""
    turns = [{**m, "content": m.get("content") or ""} for m in messages]
    options = {"tools": tools, "add_generation_prompt": answer, "date_string": DATE}
    try:
        jinja = CLOCK.sub(lambda m: repr(DAY.strftime(m[2])), tokenizer.get_chat_template(tools=tools))
        return tokenizer.apply_chat_template(turns, chat_template=jinja, tokenize=False, **options)
    except Exception as e:  # whatever a foreign template can make of it
        raise ValueError(f"the chat template refuses it ({str(e).strip()[:100]})") from None


def special_tokens(tokenizer) -> set[str]:
    """Its special tokens, also those that it does not name: Llama's <|eot_id|>."""
    own = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    return {*tokenizer.all_special_tokens, *own}


def takes_system(tokenizer) -> bool:
    """Whether the chat template has a place for a system turn."""
    try:
        return any("\ue000" in text for _, text in chat(tokenizer, [{"role": "system", "content": "\ue000"}, QUESTION]))
    except ValueError:
        return False


def conversation(tokenizer, messages: list[dict], tools: list | None = None):
    """A chat to learn from: its pieces, and the character spans (first, end) of the assistant's turns.

    A turn that the template renders otherwise once others follow it (some drop the reasoning of earlier ones) is not
    learned. Raises ValueError for messages that the template refuses, and where the last turn is no answer to learn.
    """
    pieces, spans = chat(tokenizer, messages, tools), []
    text = "".join(part for _, part in pieces)
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > 0:
            opened = rendered(tokenizer, messages[:i], tools, True)
            closed = rendered(tokenizer, messages[: i + 1], tools, False) if i + 1 < len(messages) else text
            end = len(os.path.commonprefix([text, closed]))
            said = (message.get("content") or "").rpartition("</think>")[2].strip()
            if text.startswith(opened) and end >= len(opened) and said in text[len(opened) : end]:
                if end < len(closed):  # the template ends a text with more, whose first letters may be the next turn's
                    words = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
                    found = re.finditer("|".join(map(re.escape, words)), text) if words else ()
                    end = next((m.start() for m in found if m.start() < end < m.end()), end)
                spans.append((len(opened), end))
    if messages[-1]["role"] != "assistant" or not spans or spans[-1][1] != len(text):
        raise ValueError("expected an assistant's turn at the end, which the chat template renders after its prompt")
    return pieces, spans


def completion(template: str, row: dict[str, str], response: str, end: str):
    """A plain prompt and its response to learn from: pieces, and the characters (first, end) of the response.

    end: the text of the token that ends it.
    """
    prompt = render(template, row)
    start = sum(len(text) for _, text in prompt)
    return [*prompt, (True, response), (False, end)], [(start, start + len(response) + len(end))]


def ordinary_words(tokenizer) -> re.Pattern | None:
    """The added tokens that are not special (<think>, <tool_call>), for `spell`; None where there are none."""
    words = sorted(set(tokenizer.get_added_vocab()) - special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, words)) + ")") if words else None


def spell(words: re.Pattern | None, pieces: list[tuple[bool, str]], spans: list) -> list[tuple[bool, str]]:
    """The pieces with the ordinary added tokens of answers as the template's own words: a model learns to write them.

    Special tokens in an answer stay plain text, as do all in a prompt.
    """
    found, at = [], 0
    for user, text in pieces:
        if user and words and any(first <= at < end for first, end in spans):
            parts = words.split(text)
            found += [(i % 2 == 0, part) for i, part in enumerate(parts) if part]
        else:
            found.append((user, text))
        at += len(text)
    return found
