"""Text templates: from a row's columns to the text that the model reads, keeping apart what is the user's.

A template is a Python format string over column names, such as "Rule: {rule}\\nPost: {body}".
"""

import string


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
