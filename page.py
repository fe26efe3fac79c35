"""Markup of a page that holds its pictures, makes no request, and shows every foreign string as text."""

import base64
import html
import io
import json
import string
import warnings
from pathlib import Path

import checkpoint

TEMPLATE = Path(__file__).parent / "report_template.html"
LONG, LONGEST = 600, 20_000  # characters of a text that are shown at once, and at all


class Html(str):
    """Markup. Every other string is text, and is escaped where it enters markup."""


def tag(name: str, /, *inside, **attributes) -> Html:
    """An element; its class is `class_`. Text among `inside` is escaped, and so are attributes."""
    start = name
    for key, value in attributes.items():
        start += f' {key.rstrip("_")}="{html.escape(str(value))}"'
    if name == "img":
        return Html(f"<{start}>")
    body = "".join(part if isinstance(part, Html) else html.escape(str(part)) for part in inside)
    return Html(f"<{start}>{body}</{name}>")


# ---- text and tables ------------------------------------------------------------------------------------------------


def shown(cell) -> str:
    """A cell of a table as text: numbers with four decimals, [low, high] as a range, a dash for None."""
    if cell is None:
        return "–"
    if isinstance(cell, list):
        return span(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    if not isinstance(cell, float):
        return cell
    if abs(cell) >= 100:
        return f"{cell:,.1f}"
    if cell == 0 or abs(cell) >= 5e-5:
        return f"{cell:.4f}"
    return f"{cell:.1e}"


def span(interval: list | None, sign: str = "") -> str:
    """An interval [low, high] as text, empty where there is none. sign: "+" shows the sign of positive numbers too."""
    if not interval or None in interval:
        return ""
    low, high = interval
    return f"{low:{sign}.4f} to {high:{sign}.4f}"


def table(head: list[str], rows: list[list]) -> Html:
    """A table; columns that hold numbers are aligned to the right."""
    sides = []
    for column in zip(*rows, strict=True):
        numbers = any(isinstance(cell, int | float) for cell in column)
        sides.append({"class_": "n"} if numbers else {})
    top = [tag("th", name, **side) for name, side in zip(head, sides, strict=True)]
    body = []
    for row in rows:
        cells = [tag("td", shown(cell), **side) for cell, side in zip(row, sides, strict=True)]
        body.append(tag("tr", *cells))
    whole = tag("table", tag("thead", tag("tr", *top)), tag("tbody", *body))
    return tag("div", whole, class_="scroll")


def text_table(head: list[str], rows: list[list]) -> str:
    """The same table for a terminal."""
    cells = [[shown(cell) for cell in row] for row in [head, *rows]]
    first, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *values in cells:
        columns = [name.ljust(first), *map(str.rjust, values, widths)]
        lines.append("  ".join(columns).rstrip())
    return "\n".join(lines)


def details(summary: str, *inside) -> Html:
    """Something that is shown after a click on its summary."""
    return tag("details", tag("summary", summary), *inside)


def prose(text: str) -> Html:
    """A row's text with its white space; a long one is shown in full after a click, up to LONGEST characters."""
    whole = tag("div", text[:LONGEST], class_="text", dir="auto")
    if len(text) <= LONG:
        return whole
    start = tag("div", text[: LONG // 2] + " …", class_="text", dir="auto")
    size = f"all {len(text):,} characters"
    if len(text) > LONGEST:
        size = f"{LONGEST:,} of {len(text):,} characters"
    return details(Html(start + size), whole)


def card(fields: dict[str, str], text: str | None) -> Html:
    """A row of the data: its fields and, where it is known, its text."""
    known = [tag("span", f"{name} ", tag("b", value, dir="auto")) for name, value in fields.items()]
    top = tag("p", *known, class_="facts")
    return tag("article", top) if text is None else tag("article", top, prose(text))


# ---- the page -------------------------------------------------------------------------------------------------------


class Page:
    """A page in the making: its sections, and its pictures by file name."""

    def __init__(self, title: str, name: str = "index"):
        self.title = title
        self.name = name
        self.sections = []
        self.pictures = {}

    def section(self, title: str, parts: list) -> None:
        """Add markup and sentences under a title; empty parts are left out."""
        blocks = []
        for part in parts:
            if part:
                blocks.append(part if isinstance(part, Html) else tag("p", part, class_="soft"))
        self.sections.append((title, blocks))

    def picture(self, name: str, figure, caption: str) -> Html:
        """Keep a matplotlib figure as NAME.png (of a comparison compare_B_NAME.png) and show it on a white card."""
        name = f"{name}.png" if self.name == "index" else f"{self.name}_{name}.png"
        out = io.BytesIO()
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", "Glyph")
            figure.savefig(out, format="png", metadata={"Software": None})
        if caught:
            caption += " Boxes are characters that no font on this machine has."
        self.pictures[name] = out.getvalue()

        inches = figure.get_figwidth()
        image = tag(
            "img",
            src="data:image/png;base64," + base64.b64encode(out.getvalue()).decode(),
            alt=caption,
            style=f"min-width:{4.7 * inches:.0f}rem;max-width:{6.5 * inches:.0f}rem",
        )
        look = {"class_": "card"}
        if inches > 7:  # wider than the page's column
            look = {"class_": "card wide", "style": f"width:min(92vw,{6.5 * inches + 1:.0f}rem)"}
        return tag("figure", tag("div", image, **look), tag("figcaption", caption))

    def html(self) -> str:
        """The whole page; the first section stands above the links to the others."""
        (_, top), *rest = self.sections
        links, blocks = [], []
        for i, (title, parts) in enumerate(rest):
            links.append(tag("a", title, href=f"#s{i}"))
            blocks.append(tag("section", tag("h2", title, id=f"s{i}"), *parts))
        body = "\n".join([tag("nav", *links), *top, *blocks])
        template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
        return template.substitute(title=html.escape(self.title), body=body)

    def write(self, folder: Path, facts: dict) -> dict:
        """Write the pictures, the facts as strict JSON, then the page: each of them whole or not at all."""
        facts_name = "report.json" if self.name == "index" else f"{self.name}.json"
        page = folder / f"{self.name}.html"
        page_text = self.html()
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in self.pictures.items():
            checkpoint.write_atomic(folder / name, png)
        checkpoint.write_atomic(folder / facts_name, json.dumps(facts, indent=1, allow_nan=False) + "\n")
        checkpoint.write_atomic(page, page_text)
        return {"page": str(page), "pictures": list(self.pictures)}
