"""Rows to prompts: plain text or chats, with a system turn, solved examples and tools."""

import json
from dataclasses import dataclass
from pathlib import Path

import files
import prompts
from errors import UserError, one_line
from pair_formats import are_objects


@dataclass
class Prompter:
    """How a row becomes a prompt."""

    tokenizer: object
    text: str  # template of a plain prompt, or of a chat's user turn
    chat: bool
    reason: str  # why it is a chat or plain
    whole: bool = False  # a row is a whole chat, in its column messages
    system: str = ""  # of chats that have none
    examples: list[dict[str, str]] = ()  # solved ones: rows with a response
    tools: list[dict] | None = None

    def pieces(self, row: dict[str, str], where: str) -> list[tuple[bool, str]]:
        """The prompt as pieces (is it the user's?, text). where: the row's name in a UserError."""
        if not self.chat:
            return self._plain(row)
        try:
            tools = self.tools
            if tools is None and row.get("tools"):
                tools = json.loads(row["tools"])
            return prompts.chat(self.tokenizer, self._turns(row), tools, answer=True)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: {e}") from None

    def _plain(self, row):
        pieces = []
        for example in self.examples:
            pieces += prompts.render(self.text, example)
            pieces += [(True, example["response"]), (False, "\n\n")]
        return pieces + prompts.render(self.text, row)

    def _turns(self, row):
        """System turn, solved examples, and what the row asks."""
        asked = read_messages(row["messages"]) if self.whole else [self._question(row)]
        system = []
        if asked[0].get("role") == "system":
            system, asked = asked[:1], asked[1:]
        elif self.system:
            system = [prompts.turn("system", self.system)]
        solved = []
        for example in self.examples:
            solved += [self._question(example), prompts.turn("assistant", example["response"])]
        return system + solved + asked

    def _question(self, row):
        return prompts.turn("user", prompts.plain(prompts.render(self.text, row)))


def prompter(cfg, given: set[str], tokenizer, rows: list[dict[str, str]]) -> Prompter:
    """How generate.py's settings make prompts of the rows.

    A row is a whole chat where it has messages and no --text was given. Raises UserError for columns that are missing
    and for flags that the tokenizer's chat template cannot honour.
    """
    columns = files.template_columns(cfg.text)
    whole = bool(rows) and "messages" in rows[0] and "text" not in given
    files.need_texts(rows, [] if whole else columns, cfg.input, "input", ["messages"] * whole)
    examples = []
    if cfg.examples:
        examples = files.read_rows(cfg.examples, "examples")
        files.need_columns(examples, [*columns, "response"], cfg.examples, "examples")
    tools = read_tools(cfg.tools)

    # A plain prompt: on demand, or where the tokenizer knows no chats. What only a chat can hold is refused.
    if cfg.chat == "no" or not tokenizer.chat_template:
        reason = "--chat no was given" if cfg.chat == "no" else "the tokenizer has no chat template"
        chat_only = {
            "--chat yes": cfg.chat == "yes",
            "--tools": tools,
            "--system": "system" in given,
            "messages": whole,
        }
        for name in filter(chat_only.get, chat_only):
            raise UserError(f"{name}: needs a chat, but {reason}")
        return Prompter(tokenizer, cfg.text, False, f"raw ({reason})", examples=examples)

    question = [prompts.QUESTION]
    if tools and prompts.rendered(tokenizer, question, tools) == prompts.rendered(tokenizer, question):
        raise UserError(f"--tools {cfg.tools}: the tokenizer's chat template takes no tools")
    system, note = cfg.system, ""
    if system and not prompts.takes_system(tokenizer):
        system, note = "", ", which takes no system turn"
    reason = f"as chats (the tokenizer has a template{note})"
    return Prompter(tokenizer, cfg.text, True, reason, whole, system, examples, tools)


def read_messages(text: str) -> list[dict]:
    """The turns of a chat that is to be answered. Raises ValueError for anything else."""
    turns = json.loads(text)
    known = turns and are_objects(turns)
    texts = [turn.get(key) or "" for turn in turns for key in ("role", "content")] if known else []
    if not known or not all(isinstance(text, str) for text in texts) or turns[-1].get("role") == "assistant":
        raise ValueError('messages: expected turns such as {"role": "user", "content": "Hi"}, the last one no answer')
    return turns


def read_tools(path: str) -> list[dict] | None:
    """The tool descriptions of a JSON file; None for an empty path. UserError for anything but a list of objects."""
    if not path:
        return None
    try:
        tools = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"--tools {path}: cannot be read as JSON ({one_line(e)})") from None
    if not tools or not are_objects(tools):
        raise UserError(f"--tools {path}: expected a JSON list of tool descriptions (objects)")
    return tools
