"""Chat templates: how a conversation becomes text, and which of its tokens the assistant writes.

A template is rendered by `apply_chat_template` of transformers, in its sandbox. What the assistant
writes of a turn is all between the end of the prompt that it is asked with and the mark that ends
the turn, this included; where a template has ``{% generation %}`` marks, what is in these. The turn
is found in the rendering of the whole conversation, by rendering that once more with another
text in its place: what is equal before and after is not the turn. So it does not matter whether a
template renders earlier turns in another way once later ones are there.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from lora_cli.data.messages import Message, put_before_question
from lora_cli.data.templates import BUILT_IN, TEMPLATE_KEY, bad_template, no_template
from lora_cli.errors import UserError

# Characters of the private use area, which no text has by itself.
_MARK = "\ue0f1turn\ue0f2"
_PROBE = ({"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK})
_THOUGHT = "\ue0f1thought\ue0f2"
_DOCUMENT = {"title": "\ue0f3title", "text": "\ue0f3text"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Characters that a template may put between the prompt and the text of a turn.
_FAR = 200

Spans = list[tuple[int, int]]


class Refused(Exception):  # noqa: N818  # becomes a Problem that names the row
    """A template cannot render a conversation, or it cannot be told what the assistant writes."""


class ChatTemplate:
    """The template of a tokenizer.

    Args:
        tokenizer: A fast tokenizer. It is given the template, to be saved with it.
        source: The template, a name of `BUILT_IN`, or None for the tokenizer's own.

    Attributes:
        end_text: What follows the text of a turn and ends it; empty where nothing does.
        end_ids: The special token in it, by which a model stops; none where there is no such.
        takes_documents: Whether the template shows passages that it is given.
        known: What may be named in place of the model's own template.
        fix: What to do where that is of no use.

    Raises:
        UserError: If there is no template, or it does not render a question and an answer.
    """

    known = ", ".join((*BUILT_IN, "a file with a template in Jinja"))
    fix = f"{TEMPLATE_KEY}=chatml"

    def __init__(self, tokenizer: Any, source: str | None) -> None:
        self._tokenizer = tokenizer
        if source is not None:
            tokenizer.chat_template = self._built_in(source) if source in BUILT_IN else source
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(no_template(tokenizer, self.known, self.fix))
        try:
            self._special = _special_tokens(tokenizer)
            self._marked = _GENERATION.search(tokenizer.get_chat_template()) is not None
            tail = self.render(_PROBE).partition(_MARK)[2]
            thinking = self.render((_PROBE[0], {**_PROBE[1], "reasoning_content": _THOUGHT}))
            shown = self.render(_PROBE, documents=[_DOCUMENT])
        except (Refused, ValueError) as refused:
            raise UserError(bad_template(str(refused), self.known, self.fix)) from refused
        first = min((one for one in self._special if one in tail), key=tail.index, default=None)
        self.end_text = tail.rstrip() if first is None else tail[: tail.index(first) + len(first)]
        self.end_ids: tuple[int, ...] = ()
        if first is not None:
            self.end_ids = (tokenizer.convert_tokens_to_ids(first),)
        self.takes_documents = _DOCUMENT["text"] in shown
        self._takes_thinking = _THOUGHT in thinking

    def render(
        self,
        messages: Sequence[Message],
        *,
        documents: Sequence[Mapping[str, str]] = (),
        prompt: bool = False,
    ) -> str:
        """Return the text of a conversation; with `prompt` it ends where the assistant goes on.

        Raises:
            Refused: If the template does not render it.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                self._shaped(messages),
                documents=list(documents) or None,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        # A template may go wrong in any way.
        except Exception as error:
            raise Refused(first_line(error)) from error
        return text

    def prompt(
        self, messages: Sequence[Message], documents: Sequence[Mapping[str, str]] = ()
    ) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant goes on.

        Raises:
            Refused: If the template does not render it.
        """
        messages, documents = self._placed(messages, documents)
        text = self.render(messages, documents=documents, prompt=True)
        self._check_shown(messages, documents, text, prompt=True)
        ids, _ = self._encode(text)
        return ids

    def read(
        self, messages: Sequence[Message], documents: Sequence[Mapping[str, str]] = ()
    ) -> tuple[list[int], Spans]:
        """Return the tokens of a conversation, and those that the assistant writes.

        A turn of which the template leaves out the thinking is not one that a model would write,
        and has no span. Where a template ends no turn by a special token, the end token of the
        tokenizer is put behind the last turn, and what follows that is left out.

        Returns:
            The tokens, and first token and token after the last of each turn.

        Raises:
            Refused: If the template does not render it, or it cannot be told.
        """
        messages, documents = self._placed(messages, documents)
        self._check_shown(messages, documents, self.render(messages, documents=documents))
        if self._marked:
            ids, spans = self._read_marks(messages, documents)
        else:
            ids, spans = self._read_turns(messages, documents)
        end = self._tokenizer.eos_token_id
        if spans and not self.end_ids and end is not None and messages[-1]["role"] == "assistant":
            first, last = spans[-1]
            ids, spans[-1] = [*ids[:last], end], (first, last + 1)
        return ids, spans

    def _shaped(self, messages: Sequence[Message]) -> list[Any]:
        """Return messages as the template is given them."""
        return list(messages)

    def _encode(self, text: str) -> tuple[list[int], Spans]:
        """Return the tokens of a text, and where in it each begins and ends."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    def _check_shown(
        self,
        messages: Sequence[Message],
        documents: Sequence[Mapping[str, str]],
        text: str,
        *,
        prompt: bool = False,
    ) -> None:
        """Refuse a conversation of which the template leaves out a message or a call of a tool.

        What the assistant said before may be left out in part, as its thinking is.
        """
        for number, message in enumerate(messages):
            content = message["content"].strip()
            if message.get("tool_calls"):
                other = {key: value for key, value in message.items() if key != "tool_calls"}
                what = "calls a tool, which the template does not show"
            elif message["role"] != "assistant" and content and content not in text:
                other, what = {**message, "content": _MARK}, "is not shown by the template"
            else:
                continue
            changed = [*messages[:number], other, *messages[number + 1 :]]
            try:
                is_shown = self.render(changed, documents=documents, prompt=prompt) != text
            except Refused:
                is_shown = True
            if not is_shown:
                raise Refused(f"message {number + 1} {what}")

    def _read_turns(
        self, messages: Sequence[Message], documents: Sequence[Mapping[str, str]]
    ) -> tuple[list[int], Spans]:
        text = self.render(messages, documents=documents)
        turns = [
            self._find_turn(messages, number, text, documents)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        return self._tokenize(text, [turn for turn in turns if turn is not None])

    def _placed(
        self, messages: Sequence[Message], documents: Sequence[Mapping[str, str]]
    ) -> tuple[Sequence[Message], Sequence[Mapping[str, str]]]:
        """Put passages into the question where the template does not show them."""
        if documents and not self.takes_documents:
            return put_before_question(messages, documents), ()
        return messages, documents

    def _find_turn(
        self,
        messages: Sequence[Message],
        number: int,
        text: str,
        documents: Sequence[Mapping[str, str]],
    ) -> tuple[int, int] | None:
        """Return where in `text` the assistant's turn `number` is, in characters."""
        marked = [dict(message) for message in messages]
        marked[number]["content"] = _MARK
        before, mark, after = self.render(marked, documents=documents).partition(_MARK)
        if not mark or _MARK in after or "tool_calls" in messages[number]:
            return self._between_prefixes(messages, number, text, documents)
        end = len(text) - len(after)
        start = self._start(messages[:number], text, before, documents)
        if start is None or not start <= end or not text.endswith(after):
            raise Refused(f"turn {number + 1} changes what is around it")
        said = str(messages[number]["content"])
        if "</think>" in said and not _squash(text[:end]).endswith(_squash(said)):
            return None
        thought = str(messages[number].get("reasoning_content") or "")
        if self._takes_thinking and _squash(thought) not in _squash(text[start:end]):
            return None
        return start, end + (len(self.end_text) if after.startswith(self.end_text) else 0)

    def _start(
        self,
        earlier: Sequence[Message],
        text: str,
        before: str,
        documents: Sequence[Mapping[str, str]],
    ) -> int | None:
        """Return where a turn begins: behind the prompt that a model is asked with.

        Args:
            earlier: The messages before the turn.
            text: The whole conversation.
            before: What is before the text of the turn, with another text in its place.
            documents: Passages.
        """
        try:
            asked = self.render(earlier, documents=documents, prompt=True) if earlier else ""
        except Refused:
            asked = ""
        if asked and text.startswith(asked) and before.startswith(asked):
            return len(asked)
        # The prompt was another one then; what it ends with is the same, as the header of a turn.
        best, most = len(before), 0
        for place in range(len(before), max(0, len(before) - _FAR), -1):
            between = before[place:]
            if any(token in between for token in self._special):
                break
            same = _same_end(before[:place], asked)
            if same > most and str(earlier[-1]["content"]) not in between:
                best, most = place, same
        return best if text.startswith(before[:best]) else None

    def _between_prefixes(
        self,
        messages: Sequence[Message],
        number: int,
        text: str,
        documents: Sequence[Mapping[str, str]],
    ) -> tuple[int, int]:
        """Find a turn by what the conversation is without it and with nothing behind it."""
        asked = self.render(messages[:number], documents=documents, prompt=True)
        told = self.render(messages[: number + 1], documents=documents)
        if not (told.startswith(asked) and text.startswith(told)):
            raise Refused(f"turn {number + 1} is not found in what the template makes of it")
        stop = self.end_text.strip()
        place = told.rfind(stop, len(asked)) if stop else -1
        return len(asked), place + len(stop) if place >= 0 else len(told.rstrip())

    def _tokenize(self, text: str, turns: Sequence[tuple[int, int]]) -> tuple[list[int], Spans]:
        ids, offsets = self._encode(text)
        spans: Spans = []
        for start, end in turns:
            inside = [
                place
                for place, (first, last) in enumerate(offsets)
                if first < end and last > start and first < last
            ]
            if inside:
                spans.append((inside[0], inside[-1] + 1))
        return ids, spans

    def _read_marks(
        self, messages: Sequence[Message], documents: Sequence[Mapping[str, str]]
    ) -> tuple[list[int], Spans]:
        """Return tokens and turns as the marks in the template tell, and the end of each turn."""
        try:
            found = self._tokenizer.apply_chat_template(
                self._shaped(messages),
                documents=list(documents) or None,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"return_offsets_mapping": True},
            )
        except Exception as error:
            raise Refused(first_line(error)) from error
        parts = zip(found["assistant_masks"], found["offset_mapping"], strict=True)
        groups = [(bool(mark), list(group)) for mark, group in groupby(parts, lambda part: part[0])]
        runs = [(group[0][1][0], group[-1][1][1]) for is_marked, group in groups if is_marked]
        ids, spans = self._tokenize(self.render(messages, documents=documents), runs)
        marked = {n for start, end in spans for n in range(start, end)}
        spans = []
        # Some templates mark the header of a turn as well, with which a model is prompted.
        with suppress(Refused):
            same_ids, turns = self._read_turns(messages, documents)
            if same_ids == ids:
                marked &= {n for start, end in turns for n in range(start, end)}
        for n in sorted(marked):
            if spans and spans[-1][1] == n:
                spans[-1] = (spans[-1][0], n + 1)
            else:
                spans.append((n, n + 1))
        ends = [end < len(ids) and ids[end] in self.end_ids for _, end in spans]
        return ids, [(start, end + more) for (start, end), more in zip(spans, ends, strict=True)]

    def _built_in(self, name: str) -> str:
        ids = self._tokenizer("a")["input_ids"]
        starts = ids and ids[0] == self._tokenizer.bos_token_id
        return ("{{ bos_token }}" if starts else "") + BUILT_IN[name]


def _special_tokens(tokenizer: Any) -> frozenset[str]:
    added = tokenizer.added_tokens_decoder.values()
    return frozenset((*tokenizer.all_special_tokens, *(str(one) for one in added if one.special)))


def _same_end(left: str, right: str) -> int:
    pairs = zip(reversed(left), reversed(right), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _squash(text: str) -> str:
    return "".join(text.split())


def first_line(error: Exception) -> str:
    """Say in one line what went wrong."""
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
