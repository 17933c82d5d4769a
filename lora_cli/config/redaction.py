"""Keeping what looks like a secret out of what is written down and what others are told.

No setting is there for a secret, and none is read from an address with a password. What is free
text, or decides nothing, is written without what looks like one; names of files, columns and labels
are kept as they are, since a run is read back from them, and a file may well be called sk-learn-1.
"""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"

# Tokens of Hugging Face, OpenAI and the like, GitHub, GitLab, Slack, AWS; passwords in addresses.
_SECRETS = re.compile(
    r"\b(?:hf_\w{8,}|sk-[\w-]{8,}|gh[oprsu]_\w{8,}|github_pat_\w{8,}|glpat-[\w-]{8,}"
    r"|xox[abprs]-[\w-]{8,}|AKIA[0-9A-Z]{16})"
)
_IDLE = frozenset({"tracking"})
_USERINFO = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def redact(value: Any) -> Any:
    """Return plain values with every secret in their texts replaced; names of settings stay.

    >>> redact({"run.name": "hf_abcdefghijkl", "task.data.path": "https://me:pass@host/rows"})
    {'run.name': '[redacted]', 'task.data.path': 'https://[redacted]@host/rows'}
    """
    if isinstance(value, str):
        return _USERINFO.sub(HIDDEN, _SECRETS.sub(HIDDEN, value))
    if isinstance(value, Mapping):
        return {redact(name): redact(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return value


def redact_idle(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the sections redacted that decide nothing about a run.

    >>> redact_idle({"seed": 1, "tracking": {"project": "hf_abcdefghijkl"}})
    {'seed': 1, 'tracking': {'project': '[redacted]'}}
    """
    return {name: redact(value) if name in _IDLE else value for name, value in plain.items()}
