"""Files in a few parts of limited size, with checksums: what one slice of a campaign hands to the next.

All files go into one zip, which is cut. The bytes of an array's file are first put in another order, all the words'
lowest bytes, then all the next: those that hold signs and exponents then deflate to a third, and float32 and float16
weights to five sixths.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from rkd_jax import _files

PART = 16 << 20  # bytes at most
HEADER = 512  # bytes kept for a part's first line
TEXT = (".json", ".jsonl", ".txt", ".md")  # suffixes of files that are not arrays


def pack(
    files: Mapping[str, Path], folder: Path, about_to: Callable[[str], None] = lambda state: None
) -> tuple[int, dict[str, int]]:
    """Writes `files`, by name, as `folder`/part-0, part-1, ..., in place of what is there.

    Returns the bytes of all parts, and what they come to in each folder of `files`. `about_to` is called with what
    `state` will return, just before the parts are in place.
    """
    buffer, sizes = io.BytesIO(), {}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, path in sorted(files.items()):
            content = path.read_bytes()
            archive.writestr(name, content if path.suffix in TEXT else _by_significance(content))
            sizes[name] = archive.getinfo(name).compress_size
    whole = buffer.getbuffer()
    step = PART - HEADER
    chunks = [whole[start : start + step] for start in range(0, len(whole), step)]
    state = hashlib.sha256(whole).hexdigest()
    with _files.replacing(folder) as fresh:
        for i, chunk in enumerate(chunks):
            facts = {"part": i, "parts": len(chunks), "state": state, "sha256": hashlib.sha256(chunk).hexdigest()}
            (fresh / f"part-{i}").write_bytes(json.dumps(facts).encode() + b"\n" + chunk)
        about_to(state)
    folders: dict[str, int] = {}
    for name, size in sizes.items():
        place = "/".join(name.split("/")[:2])
        folders[place] = folders.get(place, 0) + size
    return len(whole) + HEADER * len(chunks), folders


def state(folder: Path) -> str | None:
    """What `folder`'s parts are parts of, by its SHA-256; None where there are none, or the first is damaged."""
    try:
        return json.loads((folder / "part-0").read_bytes().partition(b"\n")[0])["state"]
    except (OSError, ValueError, KeyError):
        return None


def unpack(folder: Path, target: Path) -> None:
    """Writes the files of `folder`'s parts into `target`; ValueError where a part is lacking, damaged or another's."""
    parts = sorted(folder.glob("part-*"), key=lambda path: int(path.name.split("-")[1]))
    whole, first = b"", {}
    for i, path in enumerate(parts):
        if first and i >= first["parts"]:
            break  # left of a larger state that this one was copied over
        line, _, chunk = path.read_bytes().partition(b"\n")
        try:
            facts = json.loads(line)
        except ValueError:
            facts = {}
        if facts.get("sha256") != hashlib.sha256(chunk).hexdigest():
            raise ValueError(f"{path} is damaged; copy it again")
        first = first or facts
        if (facts["part"], facts["state"]) != (i, first["state"]):
            raise ValueError(f"{path} is of another slice than {parts[0]}, or one before it is lacking; copy all again")
        whole += chunk
    if len(parts) < first.get("parts", 1):
        raise ValueError(f"{folder} holds {len(parts)} of {first.get('parts', 'no')} parts; copy all of them")
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        for name in archive.namelist():
            path = target / name
            if not path.resolve().is_relative_to(target.resolve()):
                raise ValueError(f"{folder} names a file outside of {target}: {name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            content = archive.read(name)
            path.write_bytes(content if path.suffix in TEXT else _by_significance(content, (4, -1)))


def _by_significance(content: bytes, shape: tuple[int, int] = (-1, 4)) -> bytes:
    """The first bytes of all words of four, then the second ones, ...; what is left over, last. (4, -1) undoes it."""
    whole = len(content) // 4 * 4
    return np.frombuffer(content[:whole], np.uint8).reshape(shape).T.tobytes() + content[whole:]
