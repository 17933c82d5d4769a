"""Texts written so that Hydra and OmegaConf give them back unchanged."""

import re
from collections.abc import Iterator

_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
_ITEM = re.compile(rf"\s*(?:({_QUOTED})|((?!['\"])[^,\[\]]*))\s*(?:,|\Z)")
_KEY = re.compile(rf"(?<=[{{,])\s*(?:({_QUOTED})|((?:\\.|[^\\,:{{}}'\"])+?))\s*:")
# What Hydra's grammar asks to be escaped in the key of a mapping.
_SPECIAL = re.compile(r"[\\()\[\]{}:=, \t]")


def escape_references(text: str) -> str:
    r"""Guard every ``${`` of a text, which OmegaConf would otherwise look up.

    >>> escape_references("costs ${x}")
    'costs \\${x}'
    """
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def quote_text(text: str) -> str:
    r"""Quote a text for Hydra's override grammar, so that no character of it has a meaning.

    >>> quote_text("it's a, b")
    "'it\\'s a, b'"
    """

    def guard(match: re.Match[str]) -> str:
        return match[1] * 2 + (r"\'" if match[2] else "")

    return "'" + re.sub(r"(\\*)('|\Z)", guard, escape_references(text)) + "'"


def quote_list(text: str) -> str:
    """Quote every item of a list, or the one item that there is, as `quote_text` does.

    An item with a comma or a bracket has to be in quotes already. What is no list at all, such as
    the lists of a sweep, stays as it is.

    >>> quote_list("[runs/a=b, 'c, d']")
    "['runs/a=b','c, d']"
    """
    if not text.startswith("["):
        return quote_text(text)
    items: list[str] = []
    inner, at = text[1:-1].strip(), 0
    while at < len(inner):
        match = _ITEM.match(inner, at)
        if not text.endswith("]") or match is None or match.end() == at:
            return text
        items.append(match[1] or quote_text(match[2].strip()))
        at = match.end()
    return f"[{','.join(items)}]"


def _read_keys(text: str) -> Iterator[tuple[re.Match[str], str]]:
    for match in _KEY.finditer(text):
        quoted = match[1]
        name = quoted[1:-1] if quoted else match[2].strip()
        yield match, re.sub(r"\\(.)", r"\1", name)


def quote_keys(text: str) -> str:
    r"""Write the keys of a mapping as Hydra's grammar has them: with escapes, not in quotes.

    >>> quote_keys('{query: 4, "*.layer.[01].*": 16}')
    '{query: 4, *.layer.\\[01\\].*: 16}'
    """
    parts, at = [], 0
    for match, name in _read_keys(text):
        escaped = _SPECIAL.sub(lambda found: "\\" + found[0], name)
        parts += [text[at : match.start(1 if match[1] else 2)], escaped, ":"]
        at = match.end()
    return "".join(parts) + text[at:]


def repeated_key(text: str) -> str | None:
    """Return a key that a mapping has twice, if there is one; the last would win without a word.

    >>> repeated_key("{a: 1, 'a': 2}")
    'a'
    """
    for part in text.split("}"):
        seen: set[str] = set()
        for _, name in _read_keys(part):
            if name in seen:
                return name
            seen.add(name)
    return None
