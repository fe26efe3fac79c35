r"""What a LaTeX source hides: behind \if0 or a flag, in an excluded environment, in a macro that prints nothing.

Only what the source itself proves is decided: numbers, and the flags of \newif and its kin where they are set outside
of macros. All else stays whole: \ifx, \ifpdf, a flag of a style file that is absent. The source is read once, in
TeX's order. The texts here have blanks for comments and verbatim parts, so that positions are those of the source.
"""

import re
from itertools import accumulate, chain

from latex_syntax import (
    DEFINEE,
    DEFINING,
    END,
    GAP,
    OPTIONAL_ARGUMENTS,
    PARAMETERS,
    arguments_end,
    definition_end,
    definitions,
    ends_of,
    table,
    without,
)
from latex_values import Macro, Meanings, outcome, truth

# ---- names ----------------------------------------------------------------------------------------------------------

# Commands that set something for the names in their argument: what is set, and its value. "if": a flag as \newif makes
# it; "toggle:": one of etoolbox; "{": whether an environment is hidden. The values: True, False, that of a second
# argument, or False for what is new.
SETTERS = table("""
    if=False: newboolean newbool boolfalse if=True: booltrue if=given: setboolean setbool
    if=new: provideboolean providebool toggle:=new: providetoggle
    toggle:=False: newtoggle togglefalse toggle:=True: toggletrue toggle:=given: settoggle
    {=True: excludecomment excludeversion {=False: includecomment includeversion specialcomment generalcomment""")
# Commands whose name begins with if, and which take two branches in braces: of them some can be decided.
BRACED = set("""ifthenelse iff ifdef ifcsdef ifundef ifcsundef ifdefmacro ifdefempty ifdefvoid ifdefstring ifstrequal
    ifstrempty ifblank ifnumcomp ifnumequal ifnumodd ifnumgreater ifnumless ifdimcomp ifboolexpr iftoggle ifbool
    ifinlist iflanguage ifstar ifnextchar ifpackageloaded ifclassloaded ifundefined""".split())  # fmt: skip
NAMED_FLAGS = {"iftoggle": ("toggle:", 0), "nottoggle": ("toggle:", 1), "ifbool": ("if", 0), "notbool": ("if", 1)}
SILENT = r"\\(?:relax|ignorespaces|unskip|@empty|empty|@bsphack|@esphack|leavevmode|null)(?![a-zA-Z@])|[\s{}]|%\n"


# ---- patterns -------------------------------------------------------------------------------------------------------

# Commands whose operands are not executed: \ifx\ifpdf\undefined opens one conditional, not two.
COMMAND = r"\\(?:[a-zA-Z@]+|.)"
QUOTED = rf"(?:string|noexpand|meaning|show|newif|ifdefined)\s*{COMMAND}|ifx\s*(?:{COMMAND}|.)\s*(?:{COMMAND}|.)"
BRANCH = re.compile(rf"(?s)\\(?:(?P<quoted>{QUOTED})|(?P<name>if[a-zA-Z@]*|else|or|fi|repeat){END}|.)")
NEW_CONDITIONAL = r"\\(?:newif|let|def|newcommand\*?\{?)\s*\\(if[a-zA-Z@]+)"
FLAG = rf"\\([a-zA-Z@]+(?:true|false)){END}"
WORDS = {*"else or fi unless global begingroup bgroup endgroup egroup NewEnviron RenewEnviron".split()}
WORDS |= {"texorpdfstring", *DEFINING, *SETTERS, *NAMED_FLAGS}
STEP = re.compile(  # all that may matter to the reading
    rf"(?s)\\(?:(?P<tag>begin|end)[ \t]*\{{(?P<environment>[^{{}}\n]*)\}}|(?P<quoted>{QUOTED})"
    r"|(?P<word>[a-zA-Z@]+)|[\\{}])|[{}]"
)
# A source without the first of these, and without the second beside definitions, hides nothing.
WORTH = re.compile(
    r"\\(?:if(?:false|true|num|odd|case|thenelse)?(?![a-z])|(?:ex|in)clude(?:comment|version)"
    r"|let\s*\\\w+\s*=?\s*\\(?:comment|@gobble)|comment\b|(?:re)?newenviron\b|(?:not|new)(?:bool|toggle)"
    r"|def[^{}\n]{0,60}\{\s*\}|texorpdfstring)|\bdisable\b|\{(?:changes|beamer)\}",
    re.IGNORECASE,
)
PERHAPS = re.compile(r"\\if(?!f\b)[a-z]|[\]#}\d]\s*\{(?:\s|%[^\n]*\n|\\(?:relax|ignorespaces)\b)*\}", re.IGNORECASE)
DEFINES = re.compile(r"\\(?:[gex]?def|let|(?:re)?new|provide|declare|set|bool|toggle)", re.IGNORECASE)
DEEPER = {"{": 1, "}": -1, "": 0}  # how braces change the depth of groups
DEEP = 50  # groups within groups: more are no text of a person
# Commands of packages and classes that print nothing: where that is so.
SWITCHED_OFF = {
    "todo": r"\\usepackage\s*\[[^]]{0,200}\bdisable\b[^]]{0,200}\]\s*\{todonotes\}",
    "deleted": r"\\usepackage\s*\[[^]]{0,200}\bfinal\b[^]]{0,200}\]\s*\{changes\}",
    "note": r"\\documentclass\s*(?:\[[^]]{0,400}\])?\s*\{beamer\}(?!(?s:.*)show (?:only )?notes)",
}
EMPTY = re.compile(rf"[\]#}}\d\w]\s*\{{(?:{SILENT})*\}}$")
NAME = re.compile(r"\s*\{\s*([\w@*, \-]+?)\s*\}")
BODY = re.compile(r"(?s)\s*(?:\[(\d)\])?\s*(\[[^]]*\])?\s*\{(.*)\}")
# Before a group: it may be the argument of a command.
ARGUMENT_BEFORE = re.compile(r"(?:[}\]*]|\\(?!(?:if[a-zA-Z@]*|else|or|fi)\b)[a-zA-Z@]+)\s*$")

# ---- reading in TeX's order -----------------------------------------------------------------------------------------


def may_hide(text: str) -> bool:
    """Whether a source and its styles may hide anything at all: to find out takes time."""
    return bool(WORTH.search(text) or (DEFINES.search(text) and PERHAPS.search(text)))


def hidden_parts(text: str, meanings: Meanings) -> dict[int, int]:
    """{start: end} of the parts of a text that are not printed, in order. meanings: before the text, then after it."""
    for name, where in SWITCHED_OFF.items():
        if re.search(where, text):
            meanings.learn(name, Macro("1", "", True))
    ends = ends_of(text)
    bodies = list(definitions(text, ends))
    branches = _branches(text, bodies)
    decisions = []  # lists of spans: what each decision hides
    jumps = {}  # the same spans: there the reading goes on after them
    undecided = 0  # where the last conditional that is not decided ends
    before = ""
    names = _names(text, bodies, meanings)
    position = 0
    while step := STEP.search(text, position):
        position, word = step.end(), step["word"]
        if word and word not in names and not word.startswith("if"):
            continue
        start = step.start()
        spans = []
        learned = []  # (name, its meaning from here on)
        if start in jumps:
            position = jumps[start]
        elif step[0] == "{" or word in ("begingroup", "bgroup"):
            meanings.groups.append((start if step[0] == "{" else -1, {}))
        elif step[0] == "}" or word in ("endgroup", "egroup"):
            meanings.leave()
        elif step["tag"]:
            spans = _environment(text, step, meanings)
        elif word in DEFINING or (word or "").endswith("Environ"):
            end, learned = _definition(text, step, ends, meanings)
            position = end or position
        elif step["quoted"] or word:
            word = word or re.match("[a-z]+", step["quoted"])[0]
            branch, test_end = outcome(text, word, position, meanings)
            spans = _chosen(text, start, branch, test_end, branches.get(start), before)
            if not spans and start in branches:
                undecided = max(undecided, branches[start][-1][2])
            spans = spans or _braced(text, step, ends, meanings) or _gobbled(text, step, ends, meanings)
            if not spans:
                learned = _flags(text, step, meanings)
        everywhere = word in ("gdef", "xdef") or before == r"\global"
        for key, meaning in learned:
            _learn(text, meanings, key, meaning, start < undecided, everywhere)
        if spans:
            decisions.append(spans)
            jumps |= dict(spans)
            position = spans[0][1]
        before = step[0]
    return _balanced(text, decisions)


def _names(text, bodies, meanings):
    """The commands of a text that may hide something: those that set flags, macros that may be silent, and WORDS."""
    names = {key for key, meaning in meanings.known.items() if getattr(meaning, "silent", False) is not False}
    names |= set(re.findall(FLAG, text))
    for start, end in bodies:
        body = text[start : min(end, start + 600)]
        _, name, *called = [*re.findall(r"\\([a-zA-Z@]+)", body), "", ""]
        if name and (EMPTY.search(body) or r"\if" in body or names & set(called)):
            names.add(name)
    return WORDS | names


def _balanced(text, decisions):
    """The spans of all decisions, if the text without them has its braces in pairs; else of those that hold pairs."""
    spans = sorted(chain.from_iterable(decisions))
    depths = _depths(without(text, spans))
    if depths[-1] or min(depths):
        whole = [decision for decision in decisions if not sum(_depths(text[i:j])[-1] for i, j in decision)]
        spans = sorted(chain.from_iterable(whole))
    return dict(spans)


def _depths(text):
    """How many groups are open before a text's first brace and after each: fewer than none where it closes others."""
    braces = re.findall(r"(?s)\\.|([{}])", text)
    return list(accumulate((DEEPER[brace] for brace in braces), initial=0))


def within_conditional(text: str, position: int, hidden: dict[int, int]) -> bool:
    """Whether a place lies in a group, or in a conditional that is not decided."""
    branches = _branches(text, definitions(text))
    return bool(_depths(text[:position])[-1]) or any(
        start < position < marks[-1][2] for start, marks in branches.items() if start not in hidden
    )


# ---- conditionals ---------------------------------------------------------------------------------------------------


def _branches(text, bodies):
    """{start of a conditional: (word, start, end) of each of its \\or and \\else, and of its \\fi}."""
    own = set(re.findall(NEW_CONDITIONAL, text))
    branches, opened, position = {}, [], 0
    bodies = iter([*bodies, (len(text), len(text))])
    body = next(bodies)
    for m in BRANCH.finditer(text):
        while body[1] <= m.start():
            body = next(bodies)
        if body[0] <= m.start() or m.start() < position:  # within a definition nothing is executed
            continue
        name = m["name"] or (m["quoted"] or "")[:2]
        if name in ("else", "or") and opened:
            opened[-1][1].append((name, m.start(), m.end()))
        elif name in ("fi", "repeat") and opened:
            start, marks = opened.pop()
            branches[start] = [*marks, ("fi", m.start(), m.end())]
        elif name.startswith("if") and (m["quoted"] or name in own or _opens(text, name, m.end())):
            opened.append((m.start(), []))
    return branches


def _opens(text, name, position):
    """Whether a name that begins with if opens a conditional: not where two groups follow it."""
    return name not in BRACED and not re.compile(r"\s*\{[^{}]*\}\s*\{").match(text, position)


def _chosen(text, start, branch, test_end, marks, before):
    """The spans that a decided conditional hides: all but the branch that is taken."""
    if branch is None or not marks:
        return []
    if before == r"\unless":
        branch = -1 - branch
        start = text.rfind("\\", 0, start)
    ors = [mark for mark in marks if mark[0] == "or"]
    others = [mark for mark in marks if mark[0] != "or"]
    if 0 <= branch <= len(ors):
        first = ors[branch - 1][2] if branch else test_end
        last = [*ors, others[0]][branch][1]
    elif len(others) == 2:
        first, last = others[0][2], others[1][1]
    else:
        return [(start, marks[-1][2])]
    return [(start, first), (last, marks[-1][2])]


def _braced(text, step, ends, meanings):
    """The spans that \\ifthenelse and its kin hide, which have their branches in braces."""
    word, position, value = step["word"], step.end(), None
    if word in NAMED_FLAGS:
        kind, negated = NAMED_FLAGS[word]
        m = NAME.match(text, position)
        value = m and meanings.known.get(kind + m[1])
    elif word == "texorpdfstring":  # the second text is for bookmarks
        m, negated, value = re.compile("").match(text, position), 0, True
    elif word == "ifthenelse":
        test = GAP.match(text, position).end()
        m = re.compile(r"(?s)\{(.*)\}").fullmatch(text, test, ends.get(test, test))
        negated, value = truth(m[1], meanings) if m else (0, None)
    if not isinstance(value, bool):
        return []
    first = GAP.match(text, m.end()).end()
    second = ends.get(first) and GAP.match(text, ends[first]).end()
    if text[first : first + 1] != "{" or second not in ends or text[second] != "{":
        return []
    if value != bool(negated):
        return [(step.start(), first + 1), (ends[first] - 1, ends[second])]
    return [(step.start(), second + 1), (ends[second] - 1, ends[second])]


# ---- flags, macros, environments ------------------------------------------------------------------------------------


def _learn(text, meanings, key, meaning, undecided, everywhere):
    """Give a name its meaning, or none where this is not surely executed here and now."""
    braces = [brace for brace, _ in meanings.groups[:DEEP] if brace >= 0]
    if len(meanings.groups) > DEEP or any(ARGUMENT_BEFORE.search(text, max(0, brace - 60), brace) for brace in braces):
        meanings.doubt(key)
    elif undecided:
        meanings.learn(key, None, everywhere=True)
    else:
        meanings.learn(key, meaning, everywhere)


def _flags(text, step, meanings):
    """(key, meaning) of each flag, toggle or environment that a command declares or sets."""
    word = step["word"] or ""
    flag = re.fullmatch("(.+)(true|false)", word)
    new = re.fullmatch(r"newif\s*\\(if.+)", step["quoted"] or "")
    if word in SETTERS:
        kind, value = SETTERS[word].split("=")
        m = NAME.match(text, step.end())
        given = m and NAME.match(text, m.end())
        if value == "given":
            value = given[1].capitalize() if given else ""
        keys = [kind + name.strip() for name in m[1].split(",")] if m else []
        meaning = {"True": True, "False": False, "new": False}.get(value)
        return [(key, meaning) for key in keys if value != "new" or key not in meanings.known]
    if flag and word not in ("iftrue", "iffalse"):
        return [("if" + flag[1], flag[2] == "true")]
    return [(new[1], False)] if new else []


def _definition(text, step, ends, meanings):
    """(where a definition ends or None, a list of the name that it defines: (key, meaning))."""
    word, position = step["word"], step.end()
    if word.endswith("Environ"):
        end = arguments_end(text, position, "2", ends)
    else:
        end = definition_end(text, word, position, ends)
    definee = DEFINEE.match(text, position)
    name = definee and re.search(r"[a-zA-Z@]+", definee[0])
    if not end or not name:
        return end, []
    rest, name = text[definee.end() : end], name[0]
    for flag in re.findall(FLAG, rest):
        if not flag.startswith("if"):
            meanings.doubt("if" + re.sub("(true|false)$", "", flag))  # who knows when the macro is used
    key, meaning = _meaning(word, name, rest, meanings)
    if isinstance(meaning, Macro) and meaning.arguments not in ("", "?"):
        meaning.silent = None if r"\if" in meaning.body else _silent(meaning, meanings)
    if word != "providecommand":
        return end, [(key, meaning)]
    return end, [] if name in meanings.known else [(key, None)]  # it may be known from elsewhere


def _meaning(word, name, rest, meanings):
    """(key, meaning) that a definition gives to a name. rest: the definition after the name."""
    if word.endswith(("theorem", "Environment")):
        return "{" + name, False
    if word.endswith("nvironment"):
        return "{" + name, bool(re.match(r"\s*\{\s*\\comment\s*\}\s*\{\s*\\endcomment\s*\}", rest))
    if word.endswith("Environ"):
        return "{" + name, not re.sub(SILENT, "", OPTIONAL_ARGUMENTS.sub("", rest))
    if word == "let":
        other = re.search(r"([a-zA-Z@]+)$", rest)
        other = other and other[1]
        if other == "comment" and other not in meanings.known and meanings.known.get("{comment", True):
            return "{" + name, True
        return name, {"iftrue": True, "iffalse": False}.get(other, meanings.known.get(other))
    if word in ("def", "gdef", "edef", "xdef"):
        parameters = PARAMETERS.match(rest)[0].strip()
        macro = Macro(_arguments(parameters), rest[rest.index("{") + 1 : -1])
    elif word.endswith("DocumentCommand"):
        m = re.fullmatch(r"(?s)\s*\{(?:[+so\s]|O\s*\{[^{}]*\})*([+m\s]*)\}\s*\{(.*)\}", rest)
        macro = Macro(str(m[1].count("m") or ""), m[2]) if m else None
    else:
        m = word in ("newcommand", "renewcommand", "providecommand", "DeclareRobustCommand") and BODY.fullmatch(rest)
        macro = Macro(str(int(m[1] or 0) - bool(m[2]) or ""), m[3]) if m else None
    alias = macro and not macro.arguments and re.fullmatch(r"\s*\\if(true|false)\s*", macro.body)
    return name, alias[1] == "true" if alias else macro


def _arguments(parameters):
    """How the arguments of a \\def end: their number, or the word that ends the only one; "?" for another form."""
    delimited = re.fullmatch(r"#1\s*(\\[a-zA-Z@]+)", parameters)
    if delimited:
        return delimited[1]
    plain = re.fullmatch(r"(?:#\d\s*)*", parameters)
    return str(parameters.count("#") or "") if plain else "?"


def _gobbled(text, step, ends, meanings):
    """The span of a macro with its arguments, if it prints nothing."""
    macro = meanings.known.get(step["word"])
    if not isinstance(macro, Macro) or macro.silent is False or not (macro.silent or _silent(macro, meanings)):
        return []
    if macro.arguments.startswith("\\"):
        close = re.compile(re.escape(macro.arguments) + END).search(text, step.end())
        end = close and close.end()
    else:
        end = arguments_end(text, step.end(), macro.arguments, ends)
    return [(step.start(), end)] if end else []


def _silent(macro, meanings):
    """Whether a macro with arguments prints nothing, by what is known now."""
    body = macro.body
    if "\\" in body and len(body) < 500:
        sure = {key: value for key, value in meanings.known.items() if getattr(value, "silent", 0) is not None}
        body = without(body, hidden_parts(body, Meanings(sure)).items())
    return not re.sub(SILENT, "", body)


def _environment(text, step, meanings):
    """The span of an environment that is hidden; the group of any other is entered or left."""
    name = step["environment"].strip()
    if name == "document":
        return []
    if step["tag"] == "end":
        meanings.leave()
        return []
    if meanings.known.get("{" + name):
        close = re.compile(rf"\\end[ \t]*\{{{re.escape(name)}\}}[^\n]*").search(text, step.end())
        if close:
            return [(step.start(), close.end())]
        meanings.known["{" + name] = False  # no later one has an end either
    meanings.groups.append((-1, {}))
    return []
