"""Lengths of time as people write them."""

import re

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
_PARTS = re.compile("".join(rf"(?:({_NUMBER}){unit})?" for unit in _UNITS))


def parse_duration(text: str | float | None) -> float | None:
    """Return a length of time in seconds, or None for what is none or has no length.

    >>> parse_duration("1d12h"), parse_duration("90m"), parse_duration("3600")
    (129600.0, 5400.0, 3600.0)
    >>> parse_duration("two hours") is None
    True
    """
    compact = str(text).replace(" ", "").lower()
    if re.fullmatch(_NUMBER, compact):
        return float(compact) or None
    match = _PARTS.fullmatch(compact)
    if match is None:
        return None
    parts = zip(match.groups(), _UNITS.values(), strict=True)
    return sum(float(number) * unit for number, unit in parts if number) or None
