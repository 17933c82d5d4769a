"""Chat with images: a vision-language model learns what an assistant answers.

As in `lora_cli.tasks.chat`, the loss is cross-entropy over the tokens that the assistant writes,
the end of each turn included. Tokens that stand for an image are read, and never learned. A row
keeps the places of its images: they are opened once when it is encoded, since their size decides
how many tokens they take, and again in each forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_cli.config.language import ImageChatConfig
from lora_cli.config.tasks import DataConfig
from lora_cli.data.columns import list_columns
from lora_cli.data.image_messages import (
    IMAGE,
    image_name,
    list_images,
    locate_images,
    read_image_messages,
    with_places,
)
from lora_cli.data.images import describe_image, read_image, within_pixels
from lora_cli.data.made_up import picture
from lora_cli.data.media import MediaError, Place, UnreadableError, locate, read_place
from lora_cli.data.messages import Fault
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.chat import Chat, ChatTask, Inputs, last_answer
from lora_cli.tasks.chat_refusals import not_written
from lora_cli.tasks.chat_template import Refused
from lora_cli.tasks.contract import Batch, Features
from lora_cli.tasks.image_chat_template import ImageChatTemplate
from lora_cli.tasks.media import MediaFamily, like_model
from lora_cli.tasks.rows import Columns, Role, raise_if

_NAMES = ("images", "image", "img", "image_path", "image_paths", "image_file", "file_name")


class ImageChatTask(ChatTask):
    """Chat with images, bound to a configuration, columns and a processor with a template."""

    template = ImageChatTemplate
    _template: ImageChatTemplate

    def encode(self, row: Row) -> Features:
        """Write a conversation by template and processor.

        Returns:
            What `ChatTask.encode` does; ``places`` of its images; ``extras``, what the model is
            given for each token besides the token; for a prompt ``prompt_extras``, and
            ``prompt_images``, how many of the images are in it.

        Raises:
            UserError: If it cannot be written, or is too long.
            UnreadableError: If an image cannot be read.
        """
        messages = self._with_system(
            read_image_messages(row, self._columns, answering=self._is_answering)
        )
        places, images, kinds = self._open(row)
        template = self._template.showing(images)
        try:
            if self._is_answering:
                found = self._question(row, template.prompt(messages), None)
                found |= {"prompt_extras": template.extras, "prompt_images": len(images)}
                return {**found, "places": places}
            ids, spans = template.read(messages)
            extras = {name: _fit(values, len(ids)) for name, values in template.extras.items()}
            features = self._whole(row, ids, spans)
            if self._config.generate_in_eval:
                last = last_answer(messages)
                count = sum(one["content"].count(IMAGE) for one in messages[:last])
                asking = template.showing(images[:count])
                prompt = asking.prompt(messages[:last])
                asked = self._question(row, prompt, str(messages[last]["content"]))
                features |= {name: asked[name] for name in ("prompt", "references")}
                features |= {"prompt_extras": asking.extras, "prompt_images": count}
        except Refused as refused:
            raise UserError(not_written(row, refused, other=template.fix)) from refused
        measures = {"tokens": len(ids), "learned tokens": features["supervised"]}
        measures["images"] = len(images)
        return {**features, "extras": extras, "places": places, "measures": measures, **kinds}

    def collate(self, features: Sequence[Features]) -> Batch:
        """Stack conversations as `ChatTask.collate` does; images stay where they are."""
        batch = super().collate(features)
        shape = batch["inputs"]["input_ids"].shape
        for name in self._template.token_inputs if shape[0] else ():
            values = torch.zeros(shape, dtype=torch.long)
            for number, row in enumerate(features):
                own = row["extras"][name]
                values[number, : len(own)] = torch.tensor(own)
            batch["inputs"][name] = values
        return batch

    def _inputs_of_lines(self, model: Callable[..., Any], batch: Batch) -> Inputs:
        # Each row has one line.
        return lambda lines: self._images([row["places"] for row in batch["rows"][lines]], model)

    def _inputs_of_prompts(self, model: Callable[..., Any], batch: Batch) -> Inputs:
        def inputs(places: Sequence[int]) -> Mapping[str, torch.Tensor]:
            rows = [batch["rows"][place] for place in places]
            width = max(len(row["prompt"]) for row in rows)
            extras = {
                name: torch.tensor(
                    [
                        [0] * (width - len(own)) + own
                        for own in (r["prompt_extras"][name] for r in rows)
                    ]
                )
                for name in self._template.token_inputs
            }
            images = self._images([row["places"][: row["prompt_images"]] for row in rows], model)
            return {**like_model(extras, model), **images}

        return inputs

    def _images(
        self, places: Sequence[Sequence[Place]], model: Callable[..., Any]
    ) -> Mapping[str, torch.Tensor]:
        """Decode the images of rows, and return the arguments of the model."""
        images = [[self._decode(read_place(place)) for place in row] for row in places if row]
        return like_model(self._template.image_inputs(images), model) if images else {}

    def _decode(self, content: bytes) -> Any:
        return within_pixels(read_image(content), self._config.max_pixels)

    def _open(self, row: Row) -> tuple[list[Place], list[Any], Features]:
        """Return places, images and what the report tells of them.

        Raises:
            UnreadableError: If one cannot be read.
        """
        places, images, faults = [], [], []
        kinds: dict[str, dict[str, None]] = {"format": {}, "mode": {}}
        for value in list_images(row, self._columns):
            try:
                place = locate(value, row.source)
                content = read_place(place)
                for name, kind in describe_image(content)["kinds"].items():
                    kinds[name][kind] = None
                images.append(self._decode(content))
                places.append(place)
            except MediaError as error:
                faults.append((image_name(value, row), str(error)))
        if faults:
            raise UnreadableError("image", faults)
        told = {name: " and ".join(sorted(found)) or "none" for name, found in kinds.items()}
        return places, images, {"kinds": told}


def _fit(values: Sequence[int], length: int) -> list[int]:
    """Return what goes with tokens of which the last was cut off or put there."""
    return [*values[: length - 1], *(values[length - 1 : length] or [0])]


class ImageChat(MediaFamily, Chat):
    """The family's row in the table."""

    kind, module, extra = "image", "PIL", "vision"
    processor = "image chat processor"
    auto_class = "AutoModelForImageTextToText"
    task_type: str | None = None
    task = ImageChatTask
    read = staticmethod(read_image_messages)
    inputs = (
        *(role for role in Chat.inputs if role.name != "documents"),
        Role("image", _NAMES, optional=True),
    )

    def suit(
        self, data: DataConfig, loaded: Loaded, *, state: Mapping[str, Any] | None = None
    ) -> tuple[DataConfig, Loaded]:
        """Put the places of its images into each row.

        Raises:
            UserError: If files are missing; all splits together.
        """
        del state
        names = list_columns([row for rows in loaded.rows.values() for row in rows])
        columns = {
            role.name: _usual(names, getattr(data, f"{role.name}_column"), role.known)
            for role in self.inputs
        }
        rows: dict[str, tuple[Row, ...]] = {}
        faults: list[tuple[str, str]] = []
        for split, own in loaded.rows.items():
            rows[split] = tuple(_placed(row, columns, faults) for row in own)
        if faults:
            raise UnreadableError(self.kind, faults)
        return data, replace(loaded, rows=rows)

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse what `Chat` does, other numbers of marks than of images, and missing files."""
        return super().check_rows(rows, columns) or self.input_problems(rows, columns)

    def check_row(self, row: Row, state: Mapping[str, Any]) -> None:
        """Refuse a row that cannot be answered."""
        super().check_row(row, state)
        raise_if(self.input_problems((row,), state["columns"]))

    def input_problems(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows of which an image is not there."""
        faults = [fault for row in rows for fault in locate_images(row, columns)[1]]
        return list(UnreadableError(self.kind, faults).problems) if faults else []

    def made_up_rows(self, config: Any, count: int) -> list[dict[str, Any]]:
        """Return conversations about an image each."""
        column = config.data.image_column or _NAMES[1]
        rows = super().made_up_rows(config, count)
        return [{**row, column: picture(config, number)} for number, row in enumerate(rows)]

    def learn(
        self, config: Any, train: Sequence[Row], loaded: Loaded, columns: Columns
    ) -> dict[str, Any]:
        """Return what `Chat` does.

        Raises:
            UserError: If no row of train has an image, or as `Chat` does.
        """
        if not any(list_images(row, columns) for row in train):
            raise UserError(_no_images(list_columns(train)))
        return super().learn(config, train, loaded, columns)

    def arrange(
        self, config: Any, features: Sequence[Features], model: nn.Module
    ) -> tuple[list[Features], tuple[str, ...]]:
        """Leave rows as they are."""
        del config, model
        return list(features), ()

    def fit_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Leave a decoder as it is.

        Raises:
            UserError: If the model has an encoder for texts.
        """
        del state
        config: Any = model.config
        if config.is_encoder_decoder:
            raise UserError(_no_decoder(config.model_type))

    def build(self, config: ImageChatConfig, state: Mapping[str, Any], processor: Any) -> ChatTask:
        """Bind the family; `processor` is one of images and texts.

        Raises:
            UserError: As `Chat.build`, and if several texts are to be followed at once.
        """
        if config.generation.num_beams > 1:
            raise UserError(_no_beams(config.generation.num_beams))
        return super().build(config, state, processor)


def _usual(names: Sequence[str], wanted: str | None, known: Sequence[str]) -> str | None:
    """Return the column that is named, or the first usual one, as it is spelled in the data."""
    by_folded = {name.casefold(): name for name in reversed(names)}
    return wanted or next((by_folded[name] for name in known if name in by_folded), None)


def _placed(row: Row, columns: Columns, faults: list[tuple[str, str]]) -> Row:
    """Return a row with the places of its images; those that are missing are added to `faults`."""
    try:
        places, missing = locate_images(row, columns)
    except Fault:
        # It is reported with the other rows.
        return row
    faults += missing
    return with_places(row, columns, columns["image"] or _NAMES[0], places) if places else row


def _no_images(columns: Sequence[str]) -> Problem:
    return Problem(
        id="data.no-images",
        message="`train` must have rows with images, but none has any.",
        key="task.data.image_column",
        allowed=", ".join(columns),
        fix="task.data.image_column=NAME with one of these columns; without images: task=chat",
    )


def _no_decoder(kind: str) -> Problem:
    return Problem(
        id="model.no-decoder",
        message="`model.path` must name a model that reads images and text in one sequence, but "
        f"this {kind} has an encoder of its own for what it reads.",
        key="model.path",
        allowed="models such as LLaVA, Qwen2-VL, Idefics3, Gemma 3: lora-cli models image_chat",
        fix="choose one of these",
    )


def _no_beams(count: int) -> Problem:
    return Problem(
        id="generation.no-beams",
        message="`generation.num_beams` must be 1 for task=image_chat, since transformers mixes up "
        f"the images of rows with several of them otherwise, but is {count}.",
        key="task.generation.num_beams",
        allowed="1",
        fix="leave it out",
    )
