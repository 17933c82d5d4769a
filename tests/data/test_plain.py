import json
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pytest

from lora_cli.data.plain import json_value


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ("é", "é"),
        (True, True),
        (3, 3),
        (1.5, 1.5),
        (float("nan"), None),
        (float("-inf"), None),
        (date(2024, 1, 31), "2024-01-31"),
        (datetime(2024, 1, 31, 12, 30), "2024-01-31T12:30:00"),
        (time(12, 30), "12:30:00"),
        (timedelta(hours=1), "1:00:00"),
        (Decimal("1.50"), "1.50"),
        (b"\x01\x02", "AQI="),
        ([float("nan"), (1, None)], [None, [1, None]]),
        ({1: {"a": Decimal(2)}}, {"1": {"a": "2"}}),
    ],
)
def test_every_value_has_one_in_json(value: Any, plain: Any) -> None:
    found = json_value(value)
    assert found == plain
    assert type(found) is type(plain)
    assert json.loads(json.dumps(found, allow_nan=False)) == plain
