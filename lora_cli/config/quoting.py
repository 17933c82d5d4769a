"""Texts written so that Hydra and OmegaConf give them back unchanged."""

import re


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
