"""Sizes of files as people write them."""

import re

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"(\d{1,9})(KB|MB|GB)")


def parse_size(text: str) -> int | None:
    """Return a size in bytes, or None for what is none.

    >>> parse_size("5GB"), parse_size("200mb")
    (5000000000, 200000000)
    >>> parse_size("large") is None
    True
    """
    found = _SIZE.fullmatch(text.replace(" ", "").upper())
    return None if found is None else int(found[1]) * _UNITS[found[2]] or None
