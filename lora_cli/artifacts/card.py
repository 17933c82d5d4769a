"""The model card: README.md of an adapter folder, Markdown with the front matter that hubs read."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForImageTextToText": "image-text-to-text",
}
# By what turns rows into inputs: its class, and how it is called with one row.
_PROCESSORS = {
    "tokenizer": ("AutoTokenizer", 'tokenizer("...", return_tensors="pt")'),
    "image processor": ("AutoImageProcessor", 'processor(images=image, return_tensors="pt")'),
    "feature extractor": (
        "AutoFeatureExtractor",
        'processor(wave, sampling_rate=processor.sampling_rate, return_tensors="pt")',
    ),
    "image chat processor": (
        "AutoProcessor",
        'processor(text=text, images=[image], return_tensors="pt")',
    ),
    "image and text processor": (
        "AutoProcessor",
        'processor(images=image, text=["..."], padding=True, return_tensors="pt")',
    ),
    "speech processor": (
        "AutoProcessor",
        'processor(wave, sampling_rate=RATE, return_tensors="pt")',
    ),
}
# What to give to `predict`.
_INPUTS = {
    "tokenizer": 'text="..."',
    "image and text processor": "input=FOLDER zero_shot.labels=[cat,dog]",
}
_MOST_LABELS = 50
_BAR = "\\|"
_NOT_WITH_PEFT = (
    "Not with peft: it passes over a prefix where the files name none of its kinds of task, and it "
    "has none that fits this task. It would load the folder without an error, and the model would "
    "answer as if there were no prefix."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CardData:
    """What a model card says, as plain values.

    Attributes:
        name: Title, such as the run's name.
        base: Hub name of the base model, or the last part of its path; paths are cut to that.
        base_sha256: sha256 of the base weights.
        task_type: PEFT's name for the kind of task, or None.
        auto_class: Name of the transformers class that loads the base with the head of the task.
        labels: Label names in order; empty for a task without any.
        num_labels: Outputs of the head, where that has a number of its own.
        has_one_label: Whether a row has one label, so that the largest output tells it.
        processor: What turns rows into inputs, such as "tokenizer".
        split: Split that the metrics are of.
        rows: Number of its rows.
        before: Metrics of the base model by name.
        after: Metrics with the adapter by name.
        lora: LoRA settings by name, such as r, alpha and targets.
        training: Training settings by name, such as the learning rate.
        versions: Package name to version.
        kind: What the folder holds, as the start of a sentence.
        loads_in_peft: Whether peft can load it.
        ignored_by_peft: Whether peft would load it without an error, and leave it out.
        parts: The adapters that this one was combined from, each with name, weight and sha256 of
            its tensors; empty for one that was trained.
    """

    name: str
    base: str
    base_sha256: str
    task_type: str | None
    auto_class: str
    labels: Sequence[str]
    num_labels: int | None
    has_one_label: bool
    processor: str
    split: str
    rows: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    lora: Mapping[str, str]
    training: Mapping[str, str]
    versions: Mapping[str, str]
    kind: str = "A LoRA adapter"
    loads_in_peft: bool = True
    ignored_by_peft: bool = False
    parts: Sequence[tuple[str, str, str]] = ()


def model_card(card: CardData) -> str:
    """Return the card; names and labels are escaped, and no path of this machine is in it."""
    base = public_name(card.base)
    made = "trained" if not card.parts else f"combined from {len(card.parts)} others"
    parts = [
        _front_matter(card, base),
        f"# {_plain(public_name(card.name))}",
        f"{card.kind} for {_code(base)}, {made} with lora-cli. The sha256 of the base weights "
        f"is {_code(card.base_sha256)}; on other weights these tensors are of no use.",
        *(_parts(card) if card.parts else _metrics(card)),
    ]
    if card.labels:
        parts += [f"## Labels\n\n{len(card.labels)}, in this order:", _label_list(card.labels)]
    parts += [
        "## Use",
        "With lora-cli, from this folder:",
        _fence(f"lora-cli predict ADAPTER_FOLDER {_input(card)}", "bash"),
        *(_with_peft(card, base) if card.loads_in_peft else []),
        *([_NOT_WITH_PEFT] if card.ignored_by_peft else []),
        "## Settings",
        _table(
            ["setting", "value"],
            [[_code(name), _code(value)] for name, value in {**card.lora, **card.training}.items()],
        ),
        "## Versions",
        ", ".join(f"{_plain(name)} {_plain(text)}" for name, text in card.versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _metrics(card: CardData) -> list[str]:
    return [
        f"## Metrics\n\nOn the {card.rows} rows of the {_plain(card.split)} split, "
        "before training and with the adapter:",
        _table(
            ["metric", "base", "adapter"],
            [
                [_plain(name), _number(card.before.get(name)), _number(value)]
                for name, value in card.after.items()
            ],
        ),
    ]


def _parts(card: CardData) -> list[str]:
    return [
        "## Combined from",
        _table(
            ["adapter", "weight", "sha256 of its tensors"],
            [
                [_code(public_name(name)), _plain(weight), _code(sha256)]
                for name, weight, sha256 in card.parts
            ],
        ),
    ]


def public_name(name: str) -> str:
    """Return a hub name as it is, and only the last part of anything that is a path.

    Example:
        >>> public_name("google-bert/bert-base-uncased")
        'google-bert/bert-base-uncased'
        >>> public_name("/home/me/models/tiny/")
        'tiny'
        >>> public_name("pkg://package/model")
        'model'
    """
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        return name
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".", "..")]
    return parts[-1] if parts else "model"


def _front_matter(card: CardData, base: str) -> str:
    """Return the YAML block; every value is a JSON string, which is YAML too."""
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        *(["library_name: peft"] if card.loads_in_peft else []),
        "tags:",
        *(['- "lora"'] if card.kind == "A LoRA adapter" else []),
        '- "lora-cli"',
    ]
    pipeline = _PIPELINES.get(card.task_type or card.auto_class)
    if pipeline:
        lines.append(f"pipeline_tag: {json.dumps(pipeline)}")
    return "\n".join([*lines, "---"])


def _input(card: CardData) -> str:
    return _INPUTS.get(card.processor, "input=FILE")


def _with_peft(card: CardData, base: str) -> list[str]:
    return ["With peft:", _fence(_peft_sample(card, base), "python")]


def _peft_sample(card: CardData, base: str) -> str:
    """Return Python code; the base's name enters it as a literal."""
    auto_class = card.auto_class
    options = f", num_labels={card.num_labels}" if card.num_labels else ""
    loader, call = _PROCESSORS[card.processor]
    lines = [
        "from peft import PeftModel",
        f"from transformers import {loader}, {auto_class}",
        "",
        f"base = {json.dumps(base)}  # or the folder that holds it",
        f"model = {auto_class}.from_pretrained(base{options})",
        'model = PeftModel.from_pretrained(model, "ADAPTER_FOLDER").eval()',
        f"{call.partition('(')[0]} = {loader}.from_pretrained(base)",
    ]
    if card.has_one_label:
        lines += [
            f"labels = {json.dumps(list(card.labels))}",
            f"logits = model(**{call}).logits",
            "print(labels[logits.argmax(-1).item()])",
        ]
    return "\n".join(lines)


def _label_list(labels: Sequence[str]) -> str:
    shown = ", ".join(_code(label) for label in labels[:_MOST_LABELS])
    return shown + (", ..." if len(labels) > _MOST_LABELS else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are Markdown already, but for bars."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |" for cells in lines
    )


def _one_line(text: str) -> str:
    """Replace line ends and other control characters, which would end a paragraph or table."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _plain(text: str) -> str:
    """Escape everything that Markdown or HTML would take for markup."""
    return re.sub(r"([\\`*_{}\[\]()#+!<>~&$])", r"\\\1", _one_line(text))


def _code(text: str) -> str:
    """Return an inline code span that no backtick in `text` can end."""
    clean = _one_line(text)
    longest = max((len(run) for run in re.findall("`+", clean)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if not clean or clean[0] in "` " or clean[-1] in "` " else ""
    return f"{fence}{pad}{clean}{pad}{fence}"


def _fence(code: str, language: str) -> str:
    longest = max((len(run) for run in re.findall("`{3,}", code)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
