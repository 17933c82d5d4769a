"""How language models write texts: the same settings for every family that generates."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lora_cli.errors import Problem

_ONLY = {"task.generation.do_sample": ()}
# The settings that are about drawing tokens.
SAMPLING = ("temperature", "top_p", "top_k", "seed")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """How texts are generated, whatever the model's own generation_config.json says."""

    max_new_tokens: int = field(default=128, metadata={"min": 1})
    """Tokens of a generated text at most, its end included."""

    num_beams: int = field(default=1, metadata={"min": 1, "max": 64})
    """Texts to follow at once, of which the most probable is taken; 1 is greedy."""

    do_sample: bool = False
    """Draw each token by its probability, instead of taking the most probable."""

    temperature: float = field(default=1.0, metadata={"above": 0, "only": _ONLY})
    """Logits are divided by it before drawing: below 1 likely tokens become likelier."""

    top_p: float = field(default=1.0, metadata={"above": 0, "max": 1, "only": _ONLY})
    """Draw among the most probable tokens that together have this probability."""

    top_k: int = field(default=0, metadata={"min": 0, "only": _ONLY})
    """Draw among this many of the most probable tokens; 0 among all."""

    repetition_penalty: float = field(default=1.0, metadata={"above": 0})
    """Above 1 makes tokens less probable that are there already (arXiv:1909.05858)."""

    no_repeat_ngram_size: int = field(default=0, metadata={"min": 0})
    """No run of so many tokens is written twice; 0 allows it."""

    length_penalty: float = 1.0
    """Beams are compared by log-probability / length ** this: above 0 favours long texts."""

    stop: tuple[str, ...] = field(default=(), metadata={"text": True})
    """Texts that end the writing where they appear; they are left out of what is written."""

    seed: int = field(default=42, metadata={"min": 0, "max": 2**32 - 1, "only": _ONLY})
    """Decides, with the id of a row, what is drawn for it."""


def _other(name: str) -> Any:
    """The setting `name` of `GenerationConfig`, which may be left as it is."""
    fields = {one.name: one for one in dataclasses.fields(GenerationConfig)}
    kept = {key: value for key, value in fields[name].metadata.items() if key != "only"}
    return field(default=None, metadata=kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOverrides:
    """How texts are generated, where it is to be other than in training; null keeps that."""

    max_new_tokens: int | None = _other("max_new_tokens")
    """Tokens of a generated text at most, its end included."""

    num_beams: int | None = _other("num_beams")
    """Texts to follow at once, of which the most probable is taken; 1 is greedy."""

    do_sample: bool | None = _other("do_sample")
    """Draw each token by its probability, instead of taking the most probable."""

    temperature: float | None = _other("temperature")
    """Logits are divided by it before drawing: below 1 likely tokens become likelier."""

    top_p: float | None = _other("top_p")
    """Draw among the most probable tokens that together have this probability."""

    top_k: int | None = _other("top_k")
    """Draw among this many of the most probable tokens; 0 among all."""

    repetition_penalty: float | None = _other("repetition_penalty")
    """Above 1 makes tokens less probable that are there already (arXiv:1909.05858)."""

    no_repeat_ngram_size: int | None = _other("no_repeat_ngram_size")
    """No run of so many tokens is written twice; 0 allows it."""

    length_penalty: float | None = _other("length_penalty")
    """Beams are compared by log-probability / length ** this: above 0 favours long texts."""

    stop: tuple[str, ...] | None = _other("stop")
    """Texts that end the writing where they appear; they are left out of what is written."""

    seed: int | None = _other("seed")
    """Decides, with the id of a row, what is drawn for it."""

    def given(self) -> dict[str, Any]:
        """Return the settings that are to be other than in training, by name."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def applied_to(self, config: GenerationConfig) -> GenerationConfig:
        """Return `config` with what is given here."""
        return dataclasses.replace(config, **self.given())


def check_generation(
    config: GenerationConfig, *, section: str, given: frozenset[str]
) -> Iterator[Problem]:
    """Report settings that contradict each other, or that do nothing with the others.

    Args:
        config: What is to be done.
        section: Where the settings are: "task.generation" or "generation".
        given: Names of the settings that the user set there, without the section.
    """
    if config.do_sample and config.num_beams > 1:
        yield Problem(
            id="config.contradiction",
            message=f"`{section}.num_beams` must be 1 where tokens are drawn, but is "
            f"{config.num_beams} and `{section}.do_sample` is true.",
            key=f"{section}.num_beams",
            fix="leave one of the two out",
        )
    unread = {} if config.num_beams > 1 else {"length_penalty": "num_beams=4"}
    # In training the metadata of the settings says so.
    if section == "generation" and not config.do_sample:
        unread |= dict.fromkeys(SAMPLING, "do_sample=true")
    for name in sorted(given & set(unread)):
        selector = unread[name].partition("=")[0]
        yield Problem(
            id="config.not-read",
            message=f"`{section}.{name}` must be left out with {section}.{selector}="
            f"{str(getattr(config, selector)).lower()}, which has no such setting, but is "
            f"{getattr(config, name)}.",
            key=f"{section}.{name}",
            fix=f"leave {section}.{name} out, or choose {section}.{unread[name]}",
        )
    if any(not text for text in config.stop):
        yield Problem(
            id="config.bad-value",
            message=f"`{section}.stop` must hold texts, but one of them is empty.",
            key=f"{section}.stop",
        )
