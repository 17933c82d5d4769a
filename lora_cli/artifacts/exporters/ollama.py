"""A folder for `ollama create`: the model as a GGUF file, and a Modelfile that names it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.artifacts.exporters.contract import ExportInputs, Reading
from lora_cli.artifacts.exporters.gguf import export_gguf, read_gguf
from lora_cli.models.integrity import write_manifest

GGUF_FILE = "model.gguf"
_ROLES = ("system", "user", "assistant")
# Conversations on which the pieces of a template are tried; contents are told apart.
_TALKS = (
    ("user",),
    ("user", "assistant"),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user", "assistant"),
)
# What ends a string of a Modelfile, or begins code of its templates.
_UNSAFE = ('"""', "{{", "}}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """A chat template that puts fixed texts around what each role says.

    Attributes:
        opening: Text before everything where nobody speaks for the system.
        around: Texts before and after what a role says.
        prompt: Text before the answer that is asked for.
    """

    opening: str
    around: Mapping[str, tuple[str, str]]
    prompt: str

    def render(self, roles: Sequence[str], contents: Sequence[str], *, ask: bool) -> str:
        """Return the whole conversation as text."""
        parts = [] if "system" in roles else [self.opening]
        for role, content in zip(roles, contents, strict=True):
            before, after = self.around[role]
            parts.append(before + content + after)
        return "".join([*parts, self.prompt * ask])


def export_ollama(inputs: ExportInputs) -> None:
    """Write folder, GGUF file, Modelfile and a list of the files with their hashes.

    The Modelfile holds the chat template in Ollama's own language where the model's puts the same
    texts around what a role says wherever it says it; this is tried on several conversations.
    Others have no form there that could be proven, and a comment says so.
    """
    inputs.output.mkdir()
    export_gguf(dataclasses.replace(inputs, output=inputs.output / GGUF_FILE))
    text = modelfile(inputs.processor)
    (inputs.output / "Modelfile").write_text(text, encoding="utf-8")
    write_manifest(inputs.output)


def read_ollama(path: Path, reading: Reading) -> Any:
    """Load the GGUF file of a folder."""
    return read_gguf(path / GGUF_FILE, reading)


def modelfile(tokenizer: Any) -> str:
    """Return the text of the Modelfile for a model with this tokenizer."""
    lines = [f"FROM ./{GGUF_FILE}"]
    pieces = find_pieces(tokenizer)
    if pieces is not None:
        lines.append(f'TEMPLATE """{_template(pieces)}"""')
        end = pieces.around["assistant"][1].strip()
        if end and not set(end) & {'"', "\n"}:
            lines.append(f'PARAMETER stop "{end}"')
    elif getattr(tokenizer, "chat_template", None):
        lines.append(
            "# The chat template of the model is in the GGUF file. It does more than put texts "
            "around\n# what each role says, so it was not translated: write TEMPLATE yourself."
        )
    else:
        lines.append("# The model has no chat template: a prompt is continued as it is.")
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    return "\n".join(lines) + "\n"


def find_pieces(tokenizer: Any) -> Pieces | None:
    """Return the pieces of a chat template, or None where it is not made of such."""
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return None
    try:
        pieces = _cut(tokenizer)
        for roles in _TALKS:
            contents = [f"§{role}-{number}§" for number, role in enumerate(roles)]
            for ask in (False, True):
                if _render(tokenizer, roles, contents, ask=ask) != pieces.render(
                    roles, contents, ask=ask
                ):
                    return None
    # A template is a program, and may refuse a conversation in any way.
    except Exception:  # noqa: BLE001
        return None
    texts = (pieces.opening, pieces.prompt, *(x for pair in pieces.around.values() for x in pair))
    return None if any(mark in text for mark in _UNSAFE for text in texts) else pieces


def _render(tokenizer: Any, roles: Sequence[str], contents: Sequence[str], *, ask: bool) -> str:
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    # llama.cpp puts the token that begins a text there itself.
    first = tokenizer.bos_token
    if first and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(first)
    return text


def _cut(tokenizer: Any) -> Pieces:
    """Cut one conversation of all roles, told apart by what they say, into pieces.

    Raises:
        ValueError: If a role's words are not in it.
    """
    marks = {role: f"§{role}§" for role in _ROLES}

    def around(*roles: str) -> list[str]:
        text = _render(tokenizer, roles, [marks[role] for role in roles], ask=False)
        parts = []
        for role in roles:
            before, mark, text = text.partition(marks[role])
            if not mark:
                raise ValueError(role)
            parts.append(before)
        return [*parts, text]

    alone = around("user")
    pair = around("user", "assistant")
    triple = around("user", "assistant", "user")
    # What ends one role and begins the next stand together; the end of a text tells them apart.
    user_after, assistant_after = alone[1], pair[2]
    assistant_before = pair[1].removeprefix(user_after)
    user_before = triple[2].removeprefix(assistant_after)
    system = around("system", "user")
    asked = _render(tokenizer, ("user",), (marks["user"],), ask=True)
    plain = _render(tokenizer, ("user",), (marks["user"],), ask=False)
    return Pieces(
        opening=alone[0].removesuffix(user_before),
        around={
            "system": (system[0], system[1].removesuffix(user_before)),
            "user": (user_before, user_after),
            "assistant": (assistant_before, assistant_after),
        },
        prompt=asked.removeprefix(plain),
    )


def _template(pieces: Pieces) -> str:
    """Return the pieces in the language of Ollama's templates, Go's text/template.

    The last message is the one to answer: what an answer is asked for with comes at the end.
    """
    parts = []
    if pieces.opening:
        parts.append("{{ if not .System }}" + pieces.opening + "{{ end }}")
    parts.append("{{ range .Messages }}")
    for number, role in enumerate(_ROLES):
        before, after = pieces.around[role]
        test = "if" if number == 0 else "else if"
        parts.append(f'{{{{ {test} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
    parts.append("{{ end }}{{ end }}" + pieces.prompt)
    return "".join(parts)
