r"""From the bytes of a document to its text: the encoding that it declares, UTF-8, or one that can be told surely.

A wrong byte in UTF-8 harms itself alone. Nothing is guessed in silence: `note` says what was read how, and where.
"""

import codecs
import re

import formats
from latex_syntax import table

# Python's names, and those of inputenc, CJK, the editors of TeX and TCX files.
NAMES = table("""latin-1: latin1 isolatin il1 il1t1 iso8859-2: latin2 isolatin2 il2 il2t1 iso8859-3: latin3
    iso8859-4: latin4 iso8859-9: latin5 isolatin5 iso8859-10: latin6 iso8859-15: latin9 isolatin9 iso8859-16: latin10
    cp1252: ansinew windowslatin1 mac_roman: applemac macosroman macroman mac_cyrillic: maccyr mac_latin2: macce
    cp1250: cp1250cs cp1250pl windowslatin2 cp1251: windowscyrillic cp866: dosrussian doscyrillic
    koi8-r: koi8r koi8-u: koi8ru koi8u gb18030: gbk gb gb2312 gbt gbk2 big5hkscs: bg5 big5 bg5+
    cp932: sjis shiftjis sjisx0213 dosjapanese macjapanese euc_jp: jis jis2 eucjp euc cp949: ks euckr hangul
    utf-8: utf8 utf8x utf8unicode unicode utf-16: standardunicode utf16""")
# Where a source declares its encoding: a line of its own, none that is a comment for the packages.
LINE = rb"(?m)^[^%\n]*?"
DECLARED = [  # (words of which it holds one, in small letters: they are found faster; the pattern)
    (b"inputenc", LINE + rb"\\usepackage[ \t]*\[([\w, \-]{1,80})\][ \t]*\{inputenc[x]?\}"),
    (b"inputencoding", LINE + rb"\\inputencoding[ \t]*\{([\w\-]{1,20})\}"),
    (b"cjk", LINE + rb"\\begin[ \t]*\{CJK\*?\}[ \t]*(?:\[[^]\n]*\])?[ \t]*\{([\w+\-]{1,20})\}"),
    (b"cjk ctex", LINE + rb"\\(?:usepackage|documentclass)[ \t]*\[([\w, \-=]{1,80})\][ \t]*\{(?:ctex\w*|CJK\w*)\}"),
    (b"!tex", rb"(?im)^[ \t]*%[ \t]*!TEX[ \t]+encoding[ \t]*=[ \t]*([\w \-]+)"),
    (b"%&", rb"(?im)^%&.*?(?:translate-file[ \t]*=?|encoding[ \t]*=|-tcx=)[ \t]*([\w\-]+)"),
    (b"coding fenc", rb"(?im)^.*?(?:coding|fileencoding|fenc)[ \t]*[:=][ \t]*([\w\-]+)"),
]
# The commonest letters of encodings that may be told from each other by them; of Western ones all that text has.
LETTERS = {
    "gb18030": "的一是不了在有人我他这中大来上国和们到说时要就出会可也你对生能而子那得于着下自之年过为所",
    "big5hkscs": "的一是不了在有人我他這中大來上國和們到說時要就出會可也你對生能而子那得於著下自之年過為所",
    "euc_jp cp932": "のにはをたがでてとしれさあいるっなりもらこかすまんうくきけせよそ",
    "cp949": "이다는의에가을를은로고하지도한자리기나사아어인대정서시일수그",
    "cp1251 koi8-r cp866 mac_cyrillic": "оеаинтсрвлкмдпуя",
    "cp1252 mac_roman": "éèàçùâêîôûëïüöäßñóáíúãõøåæœÉÈÀÇÖÄÜÓÁÍÚÑØÅ¿¡“”‘’–—…«»§°",
    "cp850": "éèàçùâêîôûëïüöäßñóáíúãõøåæÉÈÀÇÖÄÜÓÁÍÚÑØÅ¿¡«»§°",
    "cp1250": "ąćęłńóśźżáčďéěíňřšťúůýžőűöüäßĄĆĘŁŃÓŚŹŻÁČĎÉĚÍŇŘŠŤÚŮÝŽÖÜ“”‘’–—…",
    "iso8859-2": "ąćęłńóśźżáčďéěíňřšťúůýžőűöüäßĄĆĘŁŃÓŚŹŻÁČĎÉĚÍŇŘŠŤÚŮÝŽÖÜ",
}
COMMON = {codec: letters for codecs, letters in LETTERS.items() for codec in codecs.split()}
USUAL = ("cp1252", "cp1251")  # where two fit equally, this one
EASTERN = ("gb18030", "big5hkscs", "euc_jp", "cp932", "cp949")
# Their letters stand between ASCII ones, those of others in rows.
WESTERN = ("cp1252", "mac_roman", "cp850", "cp1250", "iso8859-2")
MARKS = (b"\xff\xfe", b"\xfe\xff")  # byte order marks of UTF-16


def known(name: str) -> str | None:
    """Python's name of an encoding that a source calls by some name, or None."""
    name = NAMES.get(re.sub(r"[\s_\-]", "", name.lower()), name.strip().lower())
    try:
        "".encode(name)
        return name
    except (LookupError, ValueError):
        return None


def declared(raw: bytes) -> str | None:
    """Python's name of the encoding that a source declares, if it does and is known."""
    small_letters = raw.lower()
    for words, pattern in DECLARED:
        if not any(word in small_letters for word in words.split()):
            continue
        for m in re.finditer(pattern, raw):
            if b"fenc" in words and not _editor_line(raw, m):
                continue
            names = [known(name) for name in re.split("[,=]", m[1].decode("ascii", "ignore"))]
            names = [name for name in names if name]
            if names:
                return names[-1]
    return None


def _editor_line(raw, m):
    """Whether a match lies in one of an editor's lines, at the begin or the end of a file."""
    inside = m.start() < 1000 or m.start() > len(raw) - 3000
    return inside and re.search(rb"-\*-|vim?:|^[%#;<! \t]*-*[ \t]*coding[ \t]*:", m[0]) is not None


def decode(raw: bytes, otherwise: str | None = None, guess: bool = True) -> tuple[str, str] | None:
    """Text with \\n line ends and its encoding; None where it is binary, or the encoding cannot be told.

    otherwise: what the rest of the project declares. guess: tell by the letters where nothing is declared.
    """
    codec = _wide(raw)
    if not codec:
        if b"\0" in raw or len(re.findall(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]", raw)) > 2 + len(raw) // 50:
            return None
        codec = _narrow(raw, otherwise, guess)
    try:
        text = raw.decode(codec, "odd" if codec.startswith("utf-8") else "strict") if codec else "\0"
    except UnicodeDecodeError:
        return None
    text = re.sub("\r\n?", "\n", text)
    return None if "\0" in text else (text, codec.removesuffix("-sig"))


def _wide(raw):
    """The encoding of text in 16 bits, with a mark or with every other byte zero, or None."""
    if raw.startswith(MARKS):
        return "utf-16"
    low, high = raw[::2], raw[1::2]
    for codec, zeros, letters in (("utf-16-be", low, high), ("utf-16-le", high, low)):
        if len(raw) >= 8 and len(raw) % 2 == 0 and zeros.count(0) > len(zeros) // 2 and not letters.count(0):
            return codec
    return None


def _narrow(raw, otherwise, guess):
    """The encoding of text in bytes, or None where it cannot be told."""
    if re.search(rb"\x1b\$[@B]", raw) and _decodes(raw, "iso2022_jp"):
        return "iso2022_jp"
    if _decodes(raw, "utf-8-sig"):
        return "utf-8-sig"
    asked = declared(raw) or otherwise
    wrong, right = odd_bytes(raw)
    if right >= max(1, len(wrong)) and (asked in (None, "utf-8") or not _decodes(raw, asked) or right > 9 * len(wrong)):
        return "utf-8-sig"
    for codec in (asked, guess and _by_letters(raw)):
        if codec and codec != "utf-8" and _decodes(raw, codec):
            return codec
    return None


def _decodes(raw, codec):
    try:
        raw.decode(codec)
        return True
    except UnicodeDecodeError:
        return False


def _by_letters(raw):
    """The encoding in which bytes make the commonest letters of a language, if no other does nearly as well."""
    runs = re.findall(rb"[\x80-\xff]+", raw)
    total = sum(map(len, runs))
    in_rows = sum(len(run) for run in runs if len(run) > 2) * 2 > total
    scores = {}
    for codec, common in COMMON.items():
        if in_rows == (codec in WESTERN) or not _decodes(raw, codec):
            continue
        text = raw.decode(codec)
        if re.search(r"[\x80-\x9f]", text):  # controls: no text of that encoding has them
            continue
        fitting = re.sub(r"(?<=[a-zA-Z])[“”‘–—…«»§°](?=[a-zA-Z])", "", text)
        scores[codec] = sum(map(fitting.count, common)) / len(re.findall(r"[^\x00-\x7f]", text))
    ranked = sorted(scores, key=lambda codec: (scores[codec], codec in USUAL), reverse=True)
    best = max(scores.values(), default=0)
    second = max((scores[codec] for codec in scores if raw.decode(codec) != raw.decode(ranked[0])), default=0)
    margin = 0.3 * second if in_rows else 0.05
    least = 0.2 if ranked and ranked[0] in EASTERN else 0.72  # thousands of letters, or few
    if best >= least and (ranked[0] in USUAL or best > second + margin):
        return ranked[0]
    if best >= least and not in_rows and scores.get("cp1252", 0) < best - margin:
        return None
    controls = len(re.findall(rb"[\x80-\x9f]", raw))
    if in_rows or 2 * controls > total:
        return None
    return "cp1252" if _decodes(raw, "cp1252") else "latin-1"


# ---- wrong bytes ----------------------------------------------------------------------------------------------------


def odd_bytes(raw: bytes) -> tuple[list[int], int]:
    """Where bytes are no UTF-8, and how many letters beyond ASCII are."""
    places = []

    def note_place(error):
        places.append(error.start)
        return "", error.start + 1

    codecs.register_error("places", note_place)
    text = raw.decode("utf-8", "places")
    return places, len(re.findall(r"[^\x00-\x7f]", text))


def _as_western(error):
    """A byte that is no UTF-8 as cp1252 has it; one that begins a letter which is cut off as U+FFFD."""
    byte = error.object[error.start : error.start + 1]
    cut = error.end == len(error.object) and byte >= b"\xc2"
    return "\ufffd" if cut else byte.decode("cp1252", "replace"), len(error.object) if cut else error.start + 1


codecs.register_error("odd", _as_western)


def refusal(raw: bytes) -> str:
    """Why bytes cannot be read as a text whose encoding is told by its letters, or an empty text."""
    what = "" if raw.startswith(MARKS) and raw[2:4] != b"\0\0" else formats.binary(raw)
    if what or b"\0" in raw:
        return what or "binary"
    return note(raw, "") or "binary"


def note(raw: bytes, encoding: str, otherwise: str | None = None) -> str:
    """What a reader should know about how bytes were read, in a line, or an empty text."""
    if not encoding:
        places = [m.start() for m in re.finditer(rb"\0", raw)]
        if places:
            return _count(raw, places, "NUL")
        places = odd_bytes(raw)[0]
        return f"{_count(raw, places, 'no UTF-8')}, and no encoding is declared: save it as UTF-8" if places else ""
    if encoding.startswith("utf-16"):
        return "" if raw.startswith(MARKS) else f"read as {encoding}, without a byte order mark"
    places = odd_bytes(raw)[0]
    if encoding == "utf-8":
        return f"{_count(raw, places, 'no UTF-8')}: each is read as cp1252 has it, or marked U+FFFD" if places else ""
    if encoding in (declared(raw), otherwise, "iso2022_jp"):
        return ""
    return f"{_count(raw, places, 'no UTF-8')}, and no encoding is declared: read as {encoding}, a guess"


def _count(raw, places, what):
    """Bytes counted, with the line of the first."""
    line = raw.count(b"\n", 0, places[0]) + 1
    return f"{len(places):,} {'byte is' if len(places) == 1 else 'bytes are'} {what}, the first in line {line}"
