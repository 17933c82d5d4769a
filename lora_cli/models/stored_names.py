"""What the tensors of a folder are called in the model that transformers loads from it.

Loading renames: the files may be those of the body alone, of an older release, or hold in several
tensors what the model has in one. transformers itself is asked, by the functions that it loads
with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class UnknownNamesError(Exception):
    """transformers does not tell how it renames; the message says why."""


@dataclass(frozen=True, slots=True)
class StoredNames:
    """Names in the model, and in files.

    Attributes:
        plain: For each tensor in the files that is one of the model, the name in the model.
        converted: Likewise for those which are a part of one, or several, or other values.
        written: For each of `plain`, what it is to be called in files of this model: with or
            without the name of the body, as the model has it, and in all else as it was.
    """

    plain: Mapping[str, str]
    converted: Mapping[str, str]
    written: Mapping[str, str]


def name_stored(model: Any, stored: Mapping[str, tuple[int, ...]]) -> StoredNames:
    """Tell what tensors of files are called in a model.

    Args:
        model: A model of transformers, possibly without numbers.
        stored: Shapes by name in the files. Those of another shape than in the model, or not in
            it, are left out of the result.

    Raises:
        UnknownNamesError: If this release of transformers does not tell.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        state, prefix = model.state_dict(), model.base_model_prefix

        def rename(name: str, plainly: bool = False) -> tuple[str, str | None]:
            if plainly:
                return rename_source_key(name, [], [], prefix, state)
            return rename_source_key(name, renamings, converters, prefix, state)

        found = {name: rename(name) for name in stored}
        for name, (renamed, _) in found.items():
            if renamed not in state and name in state:
                found[name] = rename(name, plainly=True)
        bare = {name: rename(name, plainly=True)[0] for name in stored}
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UnknownNamesError(f"{type(error).__name__}: {error}") from error
    plain = {
        name: renamed
        for name, (renamed, pattern) in found.items()
        if pattern is None and renamed in state and tuple(state[renamed].shape) == stored[name]
    }
    converted = {
        name: renamed
        for name, (renamed, pattern) in found.items()
        if pattern is not None and renamed in state
    }
    written = {name: bare[name] if bare[name] == plain[name] else name for name in plain}
    return StoredNames(plain, converted, written)
