"""Text templates: from a row's columns to the text that the model reads, with the user's part marked.

A template is a Python format string over column names, such as "Rule: {rule}\\nPost: {body}". A chat is a list of
messages {"role", "content"} that the tokenizer's own chat template renders. A named prompt is a chat over columns; with
a tokenizer it becomes one plain template (`as_text`), and answer_parser.py reads what a model generates for it.

The named prompts are the files prompts/*.txt beside this one. To write your own, save a text file anywhere and pass
its path: `--prompt polite.txt`. A line that is only a name in brackets begins a section; blank lines at a section's
begin and end do not count. Only [user] is required, and only there do braces name columns ({{ is a plain brace).
A word stands before the first column and after the last one, so that a row's text never touches the chat template:

    [about]
    Is a comment polite?

    [system]
    You moderate a forum.

    [user]
    Comment:
    {body}

    Is this comment polite? Reply with Yes or No.

    [answer]
    Answer:

    [words]
    No|no
    Yes|yes

    [kept]
    body

[answer] begins the model's turn. [words] has a line for each class, the negative one first, spellings separated by |.
[kept] names the columns that are cut last when a row is too long. Solved examples are pairs of [shot user] and
[shot answer] sections.
"""

import datetime
import hashlib
import os
import re
import string
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import template_trial
from answer_parser import parse_answer  # noqa: F401 (importable from here too)
from errors import nearest

FOLDER = Path(__file__).with_suffix("")  # of the named prompts
SECTION = r"(?m)^\[([A-Za-z ]+)\][ \t]*$"
SECTIONS = "about,system,user,answer,words,kept,shot user,shot answer".split(",")
Pieces = list[tuple[bool, str]]  # of a row's text: (is it a field's or a message's?, text)
SYSTEM = "You are a helpful assistant."

DATE = "26 Jul 2024"  # given to templates that print today's date: scores must not change by the day
DAY = datetime.date(2024, 7, 26)
CLOCK = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
THINK = r"(\s*</?think>\s*)"  # where chat templates split an assistant's turn
MARK = re.compile("\ue000([0-9]+)\ue001")  # private-use characters around the number of a content or a column
PROBE = " \n{0} 'a' \"b\" \\frac{{1}}{{2}} {{{{c}}}} <d> & é\t"  # what a field may hold that a template could change


# ---- templates ------------------------------------------------------------------------------------------------------


def fields(template: str) -> list[str]:
    """The column names of a template, in order. Raises ValueError for a malformed or positional one."""
    rename = "rename a column that is called by a number, or with one of { } : !"
    try:
        slots = [slot[1:] for slot in string.Formatter().parse(template) if slot[1] is not None]
    except ValueError as e:
        raise ValueError(f"template {template!r}: {e}; {rename}") from None
    if not slots or any(spec or conversion or not name or name.isdigit() for name, spec, conversion in slots):
        example = "expected named columns such as {Question}, without a format (:) or conversion (!)"
        raise ValueError(f"template {template!r}: {example}; {rename}")
    return list(dict.fromkeys(name for name, _, _ in slots))


def render(template: str, row: dict[str, str]) -> Pieces:
    """A row's text as pieces (is it a field?, text); joined they are the rendered text."""
    pieces = []
    for literal, name, _, _ in string.Formatter().parse(template):
        if literal:
            pieces.append((False, literal))
        if name is not None:
            pieces.append((True, row[name]))
    return pieces


def plain(pieces: Pieces) -> str:
    """The text of pieces."""
    return "".join(text for _, text in pieces)


def tail(template: str) -> str:
    """The template's text after its last column."""
    return plain(render(template, dict.fromkeys(fields(template), "\ue000"))).rpartition("\ue000")[2]


# ---- chats ----------------------------------------------------------------------------------------------------------


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


QUESTION = turn("user", "?")


def rendered(tokenizer, messages: list[dict], tools: list | None = None, answer: bool = False) -> str:
    """A chat's text by the tokenizer's template, on a pinned date. Raises ValueError where the template refuses it."""
    turns = [{**message, "content": message.get("content") or ""} for message in messages]
    options = {"tools": tools, "add_generation_prompt": answer, "date_string": DATE}
    try:
        jinja = re.sub(CLOCK, lambda call: repr(DAY.strftime(call[2])), tokenizer.get_chat_template(tools=tools))
        render = partial(tokenizer.apply_chat_template, chat_template=jinja, tokenize=False, **options)
        unusable = template_trial.problem(jinja, render, turns)
        if unusable:
            raise ValueError(unusable)
        return render(turns)
    except Exception as e:  # a chat template is foreign code and may raise anything
        raise ValueError(f"the chat template refuses it ({' '.join(str(e).split())[:100]})") from None


def chat(tokenizer, messages: list[dict], tools: list | None = None, answer: bool = False) -> Pieces:
    """A chat as pieces (is it a message's?, text), rendered by the tokenizer's template; joined they are its text.

    answer: end with the opening of the assistant's next turn. Raises ValueError for messages that the template refuses
    or changes.
    """
    # Render the chat a second time with numbered marks for contents, to see where the template puts each of them.
    text = rendered(tokenizer, messages, tools, answer)
    own = [message.get("content") or "" for message in messages]
    contents, marked, of_users = [], [], set()
    for message, content in zip(messages, own, strict=True):
        parts = re.split(THINK, content) if message["role"] == "assistant" else [content]
        for i in range(0, len(parts), 2):
            if parts[i]:
                contents.append(parts[i])
                if message["role"] == "user":
                    of_users.add(len(contents) - 1)
                parts[i] = f"\ue000{len(contents) - 1}\ue001"
        marked.append({**message, "content": "".join(parts)})
    parts = MARK.split(rendered(tokenizer, marked, tools, answer))
    left_out = {i for i, text in enumerate(contents) if text.strip()} - set(map(int, parts[1::2]))
    if left_out & of_users:
        raise ValueError("the chat template leaves out a user's message")
    filled = [contents[int(number)] for number in parts[1::2]]
    for clean in (str, str.strip):  # some templates strip contents
        parts[1::2] = map(clean, filled)
        if "".join(parts) == text:
            return [(i % 2 == 1, part) for i, part in enumerate(parts) if part]

    # Contents that cannot be told from the template's own text must not spell its special tokens.
    words = set(map(str.strip, tokenizer.tokenize("\ue000".join(own))))
    tokens = words & special_tokens(tokenizer) - {tokenizer.unk_token}
    if tokens:
        raise ValueError(f"a message spells the special token {min(tokens)}, and the chat template rewrites it")
    return [(False, text)]


def special_tokens(tokenizer) -> set[str]:
    """Its special tokens, including those that it does not name, such as Llama's <|eot_id|>."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return {*tokenizer.all_special_tokens, *added}


def takes_system(tokenizer) -> bool:
    """Whether the chat template has a place for a system turn."""
    try:
        return "\ue000" in rendered(tokenizer, [turn("system", "\ue000"), QUESTION])
    except ValueError:
        return False


# ---- what a language model learns -----------------------------------------------------------------------------------


def conversation(tokenizer, messages: list[dict], tools: list | None = None):
    """A chat to learn from: its pieces, and the character spans (first, end) of the assistant's turns.

    A turn that the template renders otherwise once others follow it (some drop the reasoning of earlier ones) is not
    learned. Raises ValueError for messages that the template refuses, and where the last turn is no answer to learn.
    """
    pieces = chat(tokenizer, messages, tools)
    text = plain(pieces)
    added = spelled(tokenizer.get_added_vocab())
    spans = []
    for i, message in enumerate(messages[1:], 1):
        if message["role"] != "assistant":
            continue
        # The turn is what the chat up to here has in common with the whole text, after the prompt for it.
        opened = rendered(tokenizer, messages[:i], tools, answer=True)
        closed = rendered(tokenizer, messages[: i + 1], tools)
        common = os.path.commonprefix([text, closed])
        answer = (message.get("content") or "").rpartition("</think>")[2].strip()
        if not common.startswith(opened) or answer not in common[len(opened) :]:
            continue
        # Where the chat alone ends with more text, its first letters may equal those of the next turn's first token.
        end = len(common)
        if closed != common:
            for token in added.finditer(text):
                if token.start() < end < token.end():
                    end = token.start()
        spans.append((len(opened), end))
    if messages[-1]["role"] != "assistant" or not spans or spans[-1][1] != len(text):
        answer = (messages[-1].get("content") or "").rpartition("</think>")[2].strip()
        if answer not in text:
            raise ValueError(f"the chat template changes (its blanks?) or leaves out the answer {answer[:60]!r}")
        raise ValueError("expected an assistant's turn at the end, which the chat template renders after its prompt")
    return pieces, spans


def spelled(words) -> re.Pattern:
    """A pattern of some tokens' texts, longest first; of none, one that is nowhere found."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def spell(words: re.Pattern, pieces: Pieces, spans: list) -> Pieces:
    """The pieces with the ordinary added tokens of answers as the template's own text: a model learns to write them.

    Special tokens in an answer stay plain text, as do all in a prompt.
    """
    result, start = [], 0
    for is_content, text in pieces:
        if is_content and any(first <= start < end for first, end in spans):
            result += [(i % 2 == 0, part) for i, part in enumerate(words.split(text)) if part]
        else:
            result.append((is_content, text))
        start += len(text)
    return result


# ---- named prompts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A chat over columns. Only `user` is a template; braces in the other parts are plain text."""

    user: str  # the user's turn: a template that begins and ends with words, for chat templates trim their contents
    system: str = ""  # the system turn; "": a neutral one where the chat template takes any, never its own default
    answer: str = ""  # how the assistant's turn begins: the model continues from here
    words: tuple[str, ...] = ()  # verbalizer of each class, the negative first, aliases separated by "|"
    kept: tuple[str, ...] = ()  # columns that are cut last where a row is too long
    shots: tuple[tuple[str, str], ...] = ()  # solved examples before the user's turn: (user's turn, assistant's answer)
    about: str = ""  # one line for readers


def names() -> list[str]:
    """The named prompts."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def find(name: str) -> Prompt:
    """A prompt by its name or the path of its file.

    Raises ValueError with the names there are, or with what is wrong in the file.
    """
    known = names()
    path = FOLDER / f"{name}.txt" if name in known else Path(name)
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except OSError:
        expected = f"expected one of {', '.join(known)}, or the path of a text file"
        raise ValueError(expected + nearest(name, known)) from None


def parse(text: str) -> Prompt:
    """A prompt from its file's text. Raises ValueError for what is wrong in it."""
    before, *parts = re.split(SECTION, text)
    if before.strip():
        raise ValueError("text before the first section: expected a line such as [user]")
    sections = {title: [] for title in SECTIONS}
    for title, content in zip(parts[::2], parts[1::2], strict=True):
        if title not in sections:
            raise ValueError(f"unknown section [{title}]{nearest(title, SECTIONS)}: expected {', '.join(SECTIONS)}")
        sections[title].append(content.strip())
    questions, answers = sections.pop("shot user"), sections.pop("shot answer")
    if len(questions) != len(answers):
        raise ValueError(f"{len(questions)} sections [shot user], but {len(answers)} [shot answer]")
    for title, contents in sections.items():
        if len(contents) > 1 or title == "user" and not contents:
            raise ValueError(f"{len(contents)} sections [{title}]: expected one")
    once = {title: "".join(contents) for title, contents in sections.items()}
    for title in ("words", "kept"):
        once[title] = tuple(map(str.strip, once[title].splitlines()))
    return Prompt(**once, shots=tuple(zip(questions, answers, strict=True)))


def as_text(prompt: Prompt, tokenizer) -> str:
    """The whole prompt as one plain template over its columns, as the tokenizer's chat template renders it.

    Rendered with a row it is the chat (system turn, shots, user's turn), the opening of the assistant's turn and
    `answer`. A template without system turns gets the system's text at the head of the first user's turn; one that
    opens a <think> block gets it closed, empty, before an `answer`. Without a chat template: the parts, with blank
    lines between. Raises ValueError, in one line, for a user's turn that begins or ends with a field or has none, for
    a format or conversion, and for a chat template that refuses the prompt or changes what fields hold.
    """
    columns = fields(prompt.user)
    marks = {column: f"\ue000{i}\ue001" for i, column in enumerate(columns)}
    user = plain(render(prompt.user, marks)).strip()
    if user[0] == "\ue000" or user[-1] == "\ue001":
        raise ValueError(f"user's turn {prompt.user[:60]!r}: a field needs words before and after it")
    text = _filled(prompt, tokenizer, marks).replace("{", "{{").replace("}", "}}")
    if not all(mark in text for mark in marks.values()):
        raise ValueError("the chat template changes the fields of a user's turn: one is left out")
    text = MARK.sub(lambda mark: "{" + columns[int(mark[1])] + "}", text)
    probe = {column: PROBE.format(column) for column in columns}
    if plain(render(text, probe)) != _filled(prompt, tokenizer, probe):
        raise ValueError("the chat template changes the fields of a user's turn, so no plain template can be made")
    return text


def _filled(prompt, tokenizer, row):
    """The text (str) of a prompt with a row's fields put in."""
    contents = [*sum(prompt.shots, ()), plain(render(prompt.user, row))]
    if not tokenizer.chat_template:
        return "\n\n".join(filter(None, [prompt.system, *contents, prompt.answer]))
    turns = [turn("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    if takes_system(tokenizer):
        turns.insert(0, turn("system", prompt.system or SYSTEM))
    elif prompt.system:
        turns[0]["content"] = prompt.system + "\n\n" + turns[0]["content"]
    text = rendered(tokenizer, turns, answer=True)
    if prompt.answer and text.rstrip().endswith("<think>"):
        text = text.rstrip() + "\n\n</think>\n\n"
    return text + prompt.answer


def digest(text: str) -> str:
    """The first 16 hex digits of a text's sha256: names a resolved prompt in a run."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
