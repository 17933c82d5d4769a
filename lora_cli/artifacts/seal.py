"""A hash at the end of an ONNX file, of everything before it.

The file is a protobuf message, whose lists may be written in parts: an entry of the metadata that
is appended is read like the others, so that the file stays one that every runtime takes.
"""

import hashlib
from pathlib import Path

from lora_cli.models.weights import hash_file

_KEY, _DATA_KEY = b"sha256", b"data_sha256"
_DIGEST_BYTES = 64
_CHUNK = 2**20
# Field numbers of ModelProto.metadata_props and of StringStringEntryProto, each with the wire type
# of what has a length.
_METADATA, _NAME, _VALUE = 14 << 3 | 2, 1 << 3 | 2, 2 << 3 | 2


def _entry_start(key: bytes) -> bytes:
    """Return an entry of the metadata as far as the digest, which is its end."""
    inner = bytes([_NAME, len(key)]) + key + bytes([_VALUE, _DIGEST_BYTES])
    return bytes([_METADATA, len(inner) + _DIGEST_BYTES]) + inner


def _data_file(path: Path) -> Path:
    """Return where the weights of a model of more than 2 GB are."""
    return path.with_name(f"{path.name}.data")


def seal(path: Path) -> None:
    """Append the hash of an ONNX file to it, and that of the file of its weights if it has one."""
    data = _data_file(path)
    if data.is_file():
        _append(path, _DATA_KEY, hash_file(data))
    _append(path, _KEY, hash_file(path))


def _append(path: Path, key: bytes, digest: str) -> None:
    with path.open("ab") as file:
        file.write(_entry_start(key) + digest.encode())


def find_damage(path: Path) -> str | None:
    """Return why a file is not as `seal` left it, or None where it is.

    Raises:
        OSError: If it cannot be read.
    """
    start, before = _entry_start(_KEY), _entry_start(_DATA_KEY)
    left = path.stat().st_size - len(start) - _DIGEST_BYTES
    found, last = hashlib.sha256(), b""
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, _CHUNK))):
            found.update(chunk)
            left -= len(chunk)
            last = (last + chunk)[-len(before) - _DIGEST_BYTES :]
        if file.read() != start + found.hexdigest().encode():
            return "its end is not the hash of the rest, so it was damaged or changed"
    if last.startswith(before):
        data = _data_file(path)
        if not data.is_file():
            return f"{data.name} is missing"
        if hash_file(data).encode() != last[len(before) :]:
            return f"{data.name} does not match its sha256"
    return None
