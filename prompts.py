"""Text templates: from a row's columns to the text that the model reads, keeping apart what is the user's.

A template is a Python format string over column names, such as "Rule: {rule}\\nPost: {body}". A chat is a list of
messages {"role", "content"} that the tokenizer's own chat template renders. A named prompt is a chat over columns; with
a tokenizer it becomes one plain template (`as_text`), and `parse_answer` reads what a model generates for it. Your own:

    from prompts import PROMPTS, Prompt

    PROMPTS["polite"] = Prompt(
        user="Comment:\\n{body}\\n\\nIs this comment polite? Reply with Yes or No.",
        answer="Answer:", words=("No|no", "Yes|yes"), kept=("body",), about="is a comment polite?",
    )
"""

import datetime
import hashlib
import os
import re
import string
from dataclasses import dataclass

QUESTION = {"role": "user", "content": "?"}
DATE = "26 Jul 2024"  # what templates that print today's date are told: scores must not change by the day
DAY = datetime.date(2024, 7, 26)
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
THINK = re.compile(r"(\s*</?think>\s*)")  # where templates take an answer apart


def find(name: str) -> "Prompt":
    """Stand-in: the named prompt."""
    from errors import nearest

    if name not in PROMPTS:
        raise ValueError(f"expected one of {', '.join(PROMPTS)}{nearest(name, PROMPTS)}")
    return PROMPTS[name]


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
    last = ""  # doubled braces part a literal
    for literal, name, _, _ in string.Formatter().parse(template):
        last = last + literal if name is None else ""
    return last


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
        raise ValueError(f"the chat template refuses it ({' '.join(str(e).split())[:100]})") from None


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


# ---- named prompts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A chat over columns. Only `user` is a template; braces in the other parts are what they are."""

    user: str  # the user's turn: a template that begins and ends with words, for chat templates trim their contents
    system: str = ""  # the system turn; "" is a neutral one where the chat template takes any, never its own default
    answer: str = ""  # how the assistant's turn begins: the model goes on from here
    words: tuple[str, ...] = ()  # each class's word, the negative first, aliases apart by "|"
    kept: tuple[str, ...] = ()  # columns that are cut last where a row is too long
    shots: tuple[tuple[str, str], ...] = ()  # solved examples before the user's turn: (user's turn, assistant's answer)
    about: str = ""  # one line for --help


SYSTEM = "You are a helpful assistant."
PROBE = " \n{0} 'a' \"b\" \\frac{{1}}{{2}} {{{{c}}}} <d> & é\t"  # what a field may hold that a template could change


def as_text(prompt: Prompt, tokenizer) -> str:
    """The whole prompt as one plain template over its columns, as the tokenizer's chat template renders it.

    Rendered with a row it is the chat (system turn, shots, user's turn), the opening of the assistant's turn and
    `answer`. A template without system turns gets the system's text at the head of the first user's turn; one that
    opens a <think> block gets it closed, empty, before an `answer`. Without a chat template: the parts, with blank
    lines between. Raises ValueError, in one line, for a user's turn that begins or ends with a field or has none, for
    a format or conversion, and for a chat template that refuses the prompt or changes what fields hold.
    """
    names = _columns(prompt)
    marks = {name: f"\ue000{i}\ue001" for i, name in enumerate(names)}
    text = _spoken(prompt, tokenizer, marks).replace("{", "{{").replace("}", "}}")
    for name, mark in marks.items():
        text = text.replace(mark, "{" + name + "}")
    probe = {name: PROBE.format(name) for name in names}
    if "".join(piece for _, piece in render(text, probe)) != _spoken(prompt, tokenizer, probe):
        raise ValueError("the chat template changes what a user's turn holds, so that no plain template can be made")
    return text


def _columns(prompt: Prompt) -> list[str]:
    """The columns of a prompt's user's turn, in order. Raises ValueError for one that is no good."""
    try:
        names = fields(prompt.user)
    except ValueError as e:
        raise ValueError(" ".join(str(e).split())) from None
    pieces = render(prompt.user, dict.fromkeys(names, ""))
    if not all(not field and text.strip() for field, text in (pieces[0], pieces[-1])):
        start = " ".join(prompt.user[:60].split())
        raise ValueError(f'user\'s turn "{start}": expected words at its begin and end, not a field')
    return names


def _spoken(prompt: Prompt, tokenizer, row: dict[str, str]) -> str:
    """The text of a prompt with a row's fields put in."""
    user = "".join(piece for _, piece in render(prompt.user, row))
    said = [text for shot in prompt.shots for text in shot] + [user]
    if not tokenizer.chat_template:
        return "\n\n".join(part for part in (prompt.system, *said, prompt.answer) if part)
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    if takes_system(tokenizer):
        turns = [{"role": "system", "content": prompt.system or SYSTEM}, *turns]
    elif prompt.system:
        turns[0]["content"] = f"{prompt.system}\n\n{said[0]}"
    text = rendered(tokenizer, turns, None, True)
    if prompt.answer and text.rstrip().endswith("<think>"):
        text = text.rstrip() + "\n\n</think>\n\n"
    return text + prompt.answer


def digest(text: str) -> str:
    """The first 16 hex digits of a text's sha256: names a resolved prompt in a run."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


VERIFY = "Question:\n{question}\n\nProposed solution:\n{solution}\n\nIs the proposed solution correct?"
CHECKER = """You check solutions of mathematics questions.

What counts:
- True: the final result is the right answer to the question as it was asked. Another method, a skipped step or a slip \
of the pen on the way does no harm.
- False: the final result is wrong, is missing, or answers something else, however good the steps look.

Solve the question yourself before you trust the solution."""
SOLVED = (
    ("A shelf holds 6 rows of 4 jars. Five jars are empty. How many jars are full?",
     "There are 6 * 4 = 24 jars. 24 - 5 = 19 of them are full. The result is 19.", "True"),
    ("Lena reads 12 pages a day for a week and then has 30 pages left. How many pages has the book?",
     "In a week she reads 12 * 7 = 84 pages. 84 - 30 = 54. The result is 54.", "False"),
)  # fmt: skip
TRUE_FALSE, NO_YES = ("False|false", "True|true"), ("No|no", "Yes|yes")
RULE = "Subreddit: r/{subreddit}\nRule: {rule}\n\nPost:\n{body}\n\nDoes this post violate the rule?"
MODERATOR = """You moderate communities of a forum.

What counts:
- Yes: the post itself does what the rule forbids, openly or in a thin disguise.
- No: the post keeps to the rule. That it is rude, wrong or off the topic counts only where the rule is about that.

Judge by this one rule alone. Where posts are given that violate it and posts that do not, read the rule by them."""
EXAMPLES = """Subreddit: r/{subreddit}
Rule: {rule}

Posts that violate the rule:
<post>
{positive_example_1}
</post>
<post>
{positive_example_2}
</post>

Posts that do not violate it:
<post>
{negative_example_1}
</post>
<post>
{negative_example_2}
</post>

The post to judge:
<post>
{body}
</post>

"""
JUDGED = """A rule of r/{subreddit}: {rule}

Post: {positive_example_1}
Violates the rule: Yes

Post: {negative_example_1}
Violates the rule: No

Post: {positive_example_2}
Violates the rule: Yes

Post: {negative_example_2}
Violates the rule: No

Post: {body}

Does the last post violate the rule? Reply with Yes or No."""
SPOILERS = {
    "subreddit": "shows", "rule": "No spoilers: keep the plot of new episodes out of comments.",
    "positive_example_1": "Her brother did it, he confesses in the last scene.",
    "positive_example_2": "So the ship sinks with all of them. I cried.",
    "negative_example_1": "Best season yet!", "negative_example_2": "When is it on tonight?",
}  # fmt: skip
PROMPTS: dict[str, Prompt] = {
    "verify_plain": Prompt(
        user=f"{VERIFY} Reply with True or False.",
        answer="Answer:", words=TRUE_FALSE, kept=("question",),
        about="is the solution of a question right? one sentence",
    ),
    "verify_structured": Prompt(
        system=f"{CHECKER}\n\nFormat: one word, True or False, and nothing else.",
        user="# Question\n{question}\n\n# Proposed solution\n{solution}\n\n# Verdict\nTrue or False?",
        answer="Answer:", words=TRUE_FALSE, kept=("question",),
        about="the same with a system turn that says what counts as right",
    ),
    "verify_steps": Prompt(
        system=CHECKER,
        user=f"{VERIFY} Think step by step: solve the question, compare your result with that of the solution, and "
        'then decide. Let your last line be "Answer: True" or "Answer: False", and end there.',
        words=TRUE_FALSE, kept=("question",),
        about="the model reasons first; for generation, read from the last line",
    ),
    "verify_few_shot": Prompt(
        user=f"{VERIFY} Reply with True or False.",
        shots=tuple((f"{VERIFY} Reply with True or False.".format(question=q, solution=s), f"Answer: {word}")
                    for q, s, word in SOLVED),
        answer="Answer:", words=TRUE_FALSE, kept=("question",),
        about="verify_plain after two solved examples, one right and one wrong",
    ),
    "rules_plain": Prompt(
        user=f"{RULE} Reply with Yes or No.",
        answer="Answer:", words=NO_YES, kept=("body", "rule"),
        about="does a post violate a rule? without its examples",
    ),
    "rules_structured": Prompt(
        system=f"{MODERATOR}\n\nFormat: one word, Yes or No, and nothing else.",
        user=f"{EXAMPLES}Does it violate the rule? Yes or No?",
        answer="Answer:", words=NO_YES, kept=("body", "rule"),
        about="a system turn that says what counts, and the rule's four examples",
    ),
    "rules_steps": Prompt(
        system=MODERATOR,
        user=f"{EXAMPLES}Does it violate the rule? Think step by step: say what the rule forbids, what the post does, "
        'and which examples it is most like. Let your last line be "Answer: Yes" or "Answer: No", and end there.',
        words=NO_YES, kept=("body", "rule"),
        about="the model reasons first; for generation, read from the last line",
    ),
    "rules_few_shot": Prompt(
        user=JUDGED,
        shots=((JUDGED.format(**SPOILERS, body="I did not see it coming that the doctor is the thief."), "Answer: Yes"),
               (JUDGED.format(**SPOILERS, body="Does anyone know who wrote the music?"), "Answer: No")),
        answer="Answer:", words=NO_YES, kept=("body", "rule"),
        about="the rule's four examples as solved ones, after two on another rule",
    ),
    "rules_score": Prompt(
        system=MODERATOR,
        user=f"{EXAMPLES}How likely is it that it violates the rule? Reply with a number from 0 (surely not) to 1 "
        "(surely), with two decimals, and nothing else.",
        answer="Score:", words=NO_YES, kept=("body", "rule"),
        about="asks for a number from 0 to 1; for generation",
    ),
}  # fmt: skip
