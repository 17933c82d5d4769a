"""Processors of models that chat about images, loaded without what only videos need.

Some processors hold a third part for videos, which transformers loads by torchvision alone. Where
that is not installed they are loaded without it; its settings stay with the processor, so that a
model which is saved with them can be given videos elsewhere.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

_VIDEOS = "video_processor"
_VIDEO_FILE = "video_preprocessor_config.json"
_WHOLE = "processor_config.json"
_FILES = (_VIDEO_FILE, "preprocessor_config.json")


class ImageChatProcessor:
    """Loads the processor of a model, as AutoProcessor of transformers does."""

    @staticmethod
    def from_pretrained(folder: Path, **options: Any) -> Any:
        """Return the processor in a folder.

        Args:
            folder: Of the model.
            options: As transformers takes them.

        Raises:
            ImportError: If it needs a package that is not installed.
        """
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        named = getattr(transformers, _read(folder / _WHOLE).get("processor_class", ""), None)
        kind: Any = named or PROCESSOR_MAPPING.get(type(config), None)
        has_videos = kind is not None and _VIDEOS in kind.get_attributes()
        if not has_videos or importlib.util.find_spec("torchvision") is not None:
            return transformers.AutoProcessor.from_pretrained(folder, **options)
        processor = without_videos(kind).from_pretrained(folder, **options)
        processor.video_settings = _video_settings(folder)
        return processor


def without_videos(kind: Any) -> Any:
    """Return a class of processors like `kind` that has no part for videos."""
    parts = kind.get_attributes()

    class Processor(kind):  # type: ignore[misc]  # a class of transformers
        video_settings: dict[str, Any] | None = None

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in parts if part != _VIDEOS]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **options: Any) -> list[Any]:
            found: list[Any] = super()._get_arguments_from_pretrained(*args, **options)
            found.insert(parts.index(_VIDEOS), None)
            return found

        def to_dict(self) -> dict[str, Any]:
            return {k: v for k, v in super().to_dict().items() if k != "video_settings"}

        def save_pretrained(self, save_directory: Any, **options: Any) -> Any:
            found = super().save_pretrained(save_directory, **options)
            if self.video_settings is not None:
                text = json.dumps(self.video_settings, indent=2) + "\n"
                (Path(save_directory) / _VIDEO_FILE).write_text(text, encoding="utf-8")
            return found

        def __reduce__(self) -> Any:
            return _again, (kind, self.__dict__)

    # It is saved under the name by which transformers loads it.
    Processor.__name__ = Processor.__qualname__ = kind.__name__
    return Processor


def _again(kind: Any, values: dict[str, Any]) -> Any:
    """Return a processor of `without_videos` in another process."""
    processor = object.__new__(without_videos(kind))
    processor.__dict__.update(values)
    return processor


def _video_settings(folder: Path) -> dict[str, Any] | None:
    """Return what a folder says of videos; transformers takes it from the first file there is."""
    if (nested := _read(folder / _WHOLE).get(_VIDEOS)) is not None:
        return dict(nested)
    return next((_read(folder / name) for name in _FILES if (folder / name).is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}
