"""Secrets are hidden wherever they are, and nothing else is."""

import json

import pytest

from lora_cli.config.redaction import HIDDEN, redact, redact_idle

SECRETS = [
    "hf_abcdefghijklmnopqrst",
    "sk-proj-abcdefghijklmnop",
    "ghp_0123456789abcdefghij",
    "github_pat_0123456789abcdef",
    "glpat-0123456789abcdef",
    "xoxb-123456789012-abcdef",
    "AKIAABCDEFGHIJKLMNOP",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_hidden_anywhere(secret: str) -> None:
    value = {"a": [{"b": f"x {secret} y"}, secret], secret: 1, "c": (secret,)}
    text = json.dumps(redact(value))
    assert secret not in text
    assert f"x {HIDDEN} y" in text


def test_passwords_in_addresses_are_hidden() -> None:
    assert redact("https://me:word@host/x?y=a@b") == f"https://{HIDDEN}@host/x?y=a@b"
    assert redact("postgres://me@host") == f"postgres://{HIDDEN}@host"


@pytest.mark.parametrize(
    "value",
    [
        "bert-base-uncased",
        "runs/sk-learn",
        "hf_hub",
        "https://host/path@v2",
        "me@example.org",
        "0123456789abcdef0123456789abcdef01234567",
        3,
        0.5,
        True,
        None,
    ],
)
def test_the_rest_stays(value: object) -> None:
    assert redact({"x": value}) == {"x": value}


def test_what_a_run_is_read_back_from_stays() -> None:
    plain = {
        "task": {"data": {"path": "sk-learn-reviews.csv"}},
        "tracking": {"project": f"x {SECRETS[0]}", "name": None},
    }
    hidden = {"project": f"x {HIDDEN}", "name": None}
    assert redact_idle(plain) == {**plain, "tracking": hidden}
