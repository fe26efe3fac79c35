"""Pairs as people keep them, under one set of names: prompt and response, or messages of role and content.

Nothing is guessed: a row is a pair where it has one column for the prompt and one for the response.
"""

import json

from latex_syntax import table

PROMPTS = "prompt instruction question query problem input".split()  # columns of the prompt, the first one counts
BESIDE = "input context".split()  # a second part of the prompt, after a blank line
RESPONSES = "response completion output answer solution".split()
SYSTEMS = "system system_prompt system_message".split()
CHATS = "messages conversations conversation dialogue dialog".split()
# What roles are called, by our names.
ROLES = table("""
    system: system developer user: user human assistant: assistant gpt chatgpt model bot
    tool: tool function observation function_response ipython""")
TEXT_PARTS = ("text", "input_text", "output_text")
UNLEARNED = "weight train trainable training learn loss loss_mask".split()  # keys of a turn: false ones say so
THOUGHTS = "reasoning_content reasoning thinking".split()  # keys of a turn that some templates leave out
GRADES = "label is_correct correct is_accepted accepted passed".split()  # columns of a pair: false ones are bad
FALSE = (0, "0", "false", "False")  # 0 is False
FULL = (None, 1, "1")  # weights of a turn that is learned; None: it has none
NO_CELLS = ("", "null", "[]", "{}")


def renamed(row: dict[str, str], template_columns: list[str]) -> tuple[dict[str, str], str]:
    """A row with the names prompt, response, system and messages where it is a pair, and the columns that these were.

    template_columns: those of --text, which are no responses. With the default, a row that has a text is a document.
    """
    columns = {name.lower(): name for name in row}
    default = template_columns == ["text"]
    systems = [columns[name] for name in SYSTEMS if name in columns and columns[name] not in template_columns]
    if default and "text" in row:
        return row, ""
    others = {name for name, column in columns.items() if column not in template_columns}
    chats = [columns[name] for name in CHATS if name in others]
    if chats:
        chat = {**row, "messages": row[chats[0]]}
        if systems:
            chat["system"] = row[systems[0]]
        return chat, chats[0]
    asked = [name for name in PROMPTS if name in columns and (default or name not in others)]
    answers = [name for name in RESPONSES if name in others]
    if "response" in answers:
        answers = ["response"]
    if len(answers) != 1 or (default and not asked):
        return row, ""

    response, used = row[columns[answers[0]]], [columns[name] for name in asked[:1]]
    pair = {**row, "response": response}
    if default:
        beside = [columns[name] for name in BESIDE if name in columns and name != asked[0] != "prompt"]
        used += beside
        parts = [row[used[0]], *(row[name] for name in beside if row[name].strip())]
        pair["prompt"] = "\n\n".join(parts) if len(parts) > 1 else parts[0]
    if systems:
        pair["system"] = row[systems[0]]
    used = used or template_columns
    if default and _turns(response):  # TRL's prompts and completions may be turns
        asked_turns = _turns(row[used[0]]) or [{"role": "user", "content": row[used[0]]}]
        earlier = [{**turn, "weight": 0} if turn.get("role") == "assistant" else turn for turn in asked_turns]
        pair = {**row, "messages": json.dumps(earlier + _turns(response))}
    return pair, ", ".join([*used, columns[answers[0]]])


def _turns(cell):
    """The turns that a cell holds as JSON, or an empty list."""
    if not cell.startswith("["):
        return []
    try:
        turns = json.loads(cell)
    except (ValueError, RecursionError):
        return []
    return turns if are_objects(turns) and all("role" in turn for turn in turns) else []


def are_objects(values) -> bool:
    """Whether a value of JSON is a list of objects."""
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


def problem(row: dict[str, str], used: list[str] = ()) -> str:
    """Why a row is no pair although it seems to be one, or an empty text. used: the columns of the prompt."""
    answers = [name for name in row if name.lower() in RESPONSES]
    if "response" not in row and len(answers) > 1:
        return f"columns {' and '.join(answers)}: name the one to learn response"
    if {"chosen", "rejected"} <= row.keys():
        return "chosen and rejected are preferences: name the one to learn response"
    for name in GRADES:
        bad = ("false",) if name == "label" else ("false", "0", "0.0")
        if row.get(name, "").lower() in bad and name not in used:
            return f"{name} {row[name].lower()} marks a response as a bad one: leave such rows out"
    for name in ("history", "images", "image"):
        if row.get(name, "") not in NO_CELLS:
            return f"column {name} is not read: only text in prompt and response, or in messages, can be learned"
    return ""


def read_turns(cell: str) -> list[dict]:
    """The turns of a chat, with role and content. Raises ValueError that says what is not known."""
    turns = json.loads(cell)
    if not are_objects(turns):
        raise ValueError("messages is no list of objects with role and content")
    return [_turn(turn) for turn in turns]


def _turn(turn):
    """One turn with our names of its keys and its role."""
    rest = dict(turn)
    role = rest.pop("from", None) if "role" not in rest else rest.pop("role")
    content = rest.pop("value", None) if "content" not in rest else rest.pop("content")
    if not isinstance(role, str) or role.lower() not in ROLES:
        known = ", ".join(ROLES)
        raise ValueError(f"a turn has the role {role!r} (keys {', '.join(turn)}); known are {known}")
    unlearned = [
        key for key in UNLEARNED if rest.get(key, 1) in FALSE or (key == "weight" and rest.get(key) not in FULL)
    ]
    if unlearned and ROLES[role.lower()] == "assistant":
        reason = f"an assistant's turn is not to be learned ({unlearned[0]} {rest[unlearned[0]]}, or in the prompt)"
        raise ValueError(f"{reason}; only all can be")
    if rest.get("function_call"):
        raise ValueError("a turn has a function_call, which chat templates do not render: give tool_calls")
    if rest.get("tool_calls"):
        rest["tool_calls"] = _calls(rest["tool_calls"])
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    return {"role": ROLES[role.lower()], "content": content, **rest}


def _calls(calls):
    """Tool calls with their arguments as objects: a template would write a JSON string as a string."""
    calls = json.loads(calls) if isinstance(calls, str) else calls
    if not are_objects(calls):
        raise ValueError("tool_calls is no list of objects")
    read = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments", {}) if isinstance(function, dict) else None
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of a tool call are no object: {str(arguments)[:60]!r}")
        function = {**function, "arguments": arguments}
        read.append({**call, "function": function} if "function" in call else function)
    return read


def _part(part):
    """The text of one part of a content."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise ValueError(f"a content has a part of type {kind!r}: only text can be learned")
    return part["text"]
