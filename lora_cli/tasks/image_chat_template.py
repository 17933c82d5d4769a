"""Chat templates that show images, and processors that make room for them among the tokens.

A template writes a mark of the model for each image, such as ``<image>``; the processor writes as
many tokens in its place as the model makes of the image, which may go by its size. What a token
stands for in the text as the template wrote it is kept, so that turns are found as in any chat.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_cli.data.image_messages import IMAGE
from lora_cli.data.messages import Message
from lora_cli.data.templates import TEMPLATE_KEY
from lora_cli.errors import Problem, UserError
from lora_cli.models.base import silence
from lora_cli.tasks.chat_template import ChatTemplate, Refused, Spans, first_line

_QUESTION = "question"
_SIDE = 64
# What the tokenizer gives besides that is no input of the model.
_TEXT = ("input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets")


class ImageChatTemplate(ChatTemplate):
    """The template of a processor of images and texts.

    Args:
        processor: Of the model. It is given the template, to be saved with it.
        source: The template, or None for the processor's own.

    Attributes:
        token_inputs: Names of what the model is given for each token besides the token.
        extras: These, by name, for the tokens that were made last.

    Raises:
        UserError: If there is no template, it shows no images, or the processor does not tell
            where in a text it puts them.
    """

    known = "a file with a template in Jinja that shows images"
    fix = f"{TEMPLATE_KEY}=FILE, with the template of a model of the same kind"

    def __init__(self, processor: Any, source: str | None) -> None:
        self._processor = processor
        self._images: Sequence[Any] = ()
        self.extras: Mapping[str, list[int]] = {}
        tokenizer = processor.tokenizer
        # The template of the processor is the one for images, if there are two.
        own = getattr(processor, "chat_template", None)
        own = own.get("default") if isinstance(own, Mapping) else own
        starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._bos = tokenizer.bos_token if starts else ""
        self._is_whole = True
        try:
            super().__init__(tokenizer, source or own)
        except UserError:
            # Some templates take texts where there are no images, and nothing else.
            self._is_whole = False
            super().__init__(tokenizer, source or own)
        processor.chat_template = tokenizer.chat_template
        self._probe()

    def showing(self, images: Sequence[Any]) -> "ImageChatTemplate":
        """Return the same for a conversation with these images, in order, of Pillow in RGB."""
        bound = copy.copy(self)
        bound._images = images
        return bound

    def image_inputs(self, images: Sequence[Sequence[Any]]) -> dict[str, torch.Tensor]:
        """Return what the model is given for the images of some rows, one at least a row."""
        texts = [self._mark * len(row) for row in images]
        found = self._process(texts, images, padding=True, return_tensors="pt")
        return {name: found[name] for name in self._image_names}

    def _probe(self) -> None:
        """Write one image, and see what the processor makes of it.

        Raises:
            UserError: If that cannot be done.
        """
        from PIL import Image

        self._mark: str = getattr(self._processor, "image_token", None) or ""
        asked = [{"role": "user", "content": IMAGE + _QUESTION}]
        try:
            text = self.render(asked, prompt=True)
        except Refused as refused:
            raise UserError(_shows_none(str(refused), self)) from refused
        count = text.count(self._mark) if self._mark else 0
        if count != 1 or _QUESTION not in text:
            raise UserError(_shows_none(f"it writes {count} marks {self._mark} for one", self))
        grey = Image.new("RGB", (_SIDE, _SIDE), (127, 127, 127))
        try:
            plain = self._process([_QUESTION], None)
            found = self._process([text], [[grey]])
            names = [name for name in found if name not in _TEXT]
            self.token_inputs = tuple(name for name in names if name in plain)
            self._image_names = tuple(name for name in names if name not in plain)
            _, offsets = self.showing([grey])._encode(text)
            if max(end for _, end in offsets) > len(text):
                raise ValueError("it writes more than images into the text")
        # A processor may go wrong in any way.
        except Exception as error:
            raise UserError(_unusable_processor(self._processor, error)) from error

    def _shaped(self, messages: Sequence[Message]) -> list[Any]:
        shaped = []
        for message in messages:
            content = message["content"]
            if self._is_whole or IMAGE in content:
                shaped.append({**message, "content": _parts(content)})
            else:
                shaped.append(message)
        return shaped

    def _encode(self, text: str) -> tuple[list[int], Spans]:
        """Return the tokens of a text, and where each begins and ends in it.

        All tokens of an image stand where its mark is.

        Raises:
            Refused: If there are not as many marks as images, or an image is one that the processor
                does not take, such as a very long one.
        """
        count = text.count(self._mark)
        if count != len(self._images):
            raise Refused(f"it writes {count} marks {self._mark} for {len(self._images)} images")
        start = "" if text.startswith(self._bos) else self._bos
        try:
            found = self._process([start + text], [self._images] if self._images else None)
        except Exception as error:
            raise Refused(first_line(error)) from error
        replaced = found["text_replacement_offsets"][0] if self._images else ()
        self.extras = {name: list(found[name][0]) for name in self.token_inputs}
        offsets = [
            _unreplaced(first, last, replaced, before=len(start))
            for first, last in found["offset_mapping"][0]
        ]
        return list(found["input_ids"][0]), offsets

    def _process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]] | None, **options: Any
    ) -> Mapping[str, Any]:
        with silence():
            found: Mapping[str, Any] = self._processor(
                text=list(texts),
                images=None if images is None else [list(row) for row in images],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                **options,
            )
        return found


def _unreplaced(
    first: int, last: int, replaced: Sequence[Mapping[str, Any]], *, before: int
) -> tuple[int, int]:
    """Return where a token is in the text before images were put in.

    Args:
        first: Its first character.
        last: The one behind its last.
        replaced: What the processor says of each image.
        before: Characters that were put before the text.
    """
    shift = before
    for one in replaced:
        start, end = one["new_span"]
        if last <= start:
            break
        if first < end:
            return one["span"][0] - before, one["span"][1] - before
        shift += (end - start) - (one["span"][1] - one["span"][0])
    return max(0, first - shift), max(0, last - shift)


def _parts(content: str) -> list[dict[str, str]]:
    """Return a text with `IMAGE` in it as a list of parts, as templates for images take it."""
    found: list[dict[str, str]] = []
    for number, text in enumerate(content.split(IMAGE)):
        if number:
            found.append({"type": "image"})
        # Templates write what stands between image and text themselves.
        clean = text.strip("\n") if IMAGE in content else text
        if clean or IMAGE not in content:
            found.append({"type": "text", "text": clean})
    return found


def _shows_none(reason: str, template: ImageChatTemplate) -> Problem:
    return Problem(
        id="chat.no-images",
        message=f"The chat template must show images, but does not: {reason}.",
        key=TEMPLATE_KEY,
        allowed=template.known,
        fix=template.fix,
    )


def _unusable_processor(processor: Any, error: Exception) -> Problem:
    return Problem(
        id="chat.other-processor",
        message="The processor of the model must put images into a text and tell where, but "
        f"{type(processor).__name__} does not ({type(error).__name__}: {first_line(error)}).",
        key="model.path",
        allowed="models such as LLaVA, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL, Idefics3, Gemma 3",
        fix="choose another model: lora-cli models image_chat",
    )
