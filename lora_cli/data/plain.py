"""Values of columns as JSON has them: Parquet and Arrow files hold others too."""

import base64
import math
from collections.abc import Mapping
from typing import Any


def json_value(value: Any) -> Any:
    """Return a value made of what JSON has, for one of any column.

    What is no number (NaN, infinity) becomes null, bytes their base64, and dates, times, decimals
    and all else a text.

    >>> from datetime import date
    >>> json_value({"day": date(2024, 1, 31), "price": float("nan"), "parts": (1, b"ab")})
    {'day': '2024-01-31', 'price': None, 'parts': [1, 'YWI=']}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(name): json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
