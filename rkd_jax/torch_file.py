"""PyTorch's files read and written without PyTorch, and without running anything that a file says.

`load` reads both formats of torch.save: the zip archive of 1.6 and later, and the row of pickles from before. A pickle
may name any Python object; the unpickler here knows a dozen harmless names, those that rebuild tensors, and stops at
any other.
"""

import io
import math
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def load(path: str | os.PathLike) -> Any:
    """The object in a file of torch.save, tensors as NumPy arrays (bfloat16 as ml_dtypes.bfloat16).

    Raises:
      FileNotFoundError: no such file.
      ValueError: cut short, damaged, of another kind, or asking for code to run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}; name an existing PyTorch or safetensors file")
    try:
        _check_not_tar(path)
        with path.open("rb") as file:
            read = _load_zip if zipfile.is_zipfile(file) else _load_legacy
            file.seek(0)
            return _values(read(file))
    except _Refused as error:
        raise ValueError(f"{str(path)!r} {error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(
            f"{str(path)!r} is damaged, cut short or no file of torch.save ({type(error).__name__}: {error}); "
            "get it again and compare its size and checksum"
        ) from error


class _Refused(ValueError):
    """What is wrong with a file, to be read after its name."""


class _Opaque:
    """What a pickle may hold but not change: the opcode that sets an object's state is refused."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise _Refused(f"is damaged or malicious: it sets the state of a {type(self).__name__.strip('_')}")


class _Storage(_Opaque):
    """A row of numbers; in the old format filled after the tensors on it are known."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray):
        self.array = array


class _Tensor(_Opaque):
    """A view on a storage."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any):
        shape, strides = tuple(shape), tuple(strides)  # a list could grow after the check
        integers = (offset, *shape, *strides)
        if not all(type(n) is int and n >= 0 for n in integers) or len(shape) != len(strides):
            raise _Refused(f"is damaged: a tensor of shape {shape} and strides {strides}")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        size = storage.array.size
        if math.prod(shape) and (last >= size or math.prod(shape) > size):
            raise _Refused(f"is damaged: a tensor of shape {shape} in a storage of {size} numbers")
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def to_numpy(self) -> np.ndarray:
        """A copy of the view."""
        array = self.storage.array[self.offset :]
        if not math.prod(self.shape):
            return np.zeros(self.shape, array.dtype)
        return np.lib.stride_tricks.as_strided(array, self.shape, [n * array.itemsize for n in self.strides]).copy()


def _values(tree: Any) -> Any:
    """The containers with arrays in place of tensors."""
    if isinstance(tree, _Tensor):
        return tree.to_numpy()
    if isinstance(tree, dict):
        return {key: _values(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_values(value) for value in tree)
    return tree


class _StateDict(OrderedDict):
    """A dict whose attributes (a state dict's _metadata) are dropped, whatever they hold."""

    def __setstate__(self, state: Any) -> None:
        del state


class _Dtype:
    """NumPy's type of a scalar; its pickled details (byte order, alignment) are dropped."""

    __slots__ = ("dtype",)

    def __init__(self, kind: str, *_: Any):
        self.dtype = np.dtype(str(kind))

    def __setstate__(self, state: Any) -> None:
        del state


class _Maker(_Opaque):
    """A function that a pickle may call."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def _scalar(kind: _Dtype, data: bytes) -> Any:
    """NumPy's scalars, as the accuracies in checkpoints."""
    return np.frombuffer(data, kind.dtype, count=1)[0]


_ALLOWED = {
    "collections.OrderedDict": _Maker(_StateDict),
    "torch._utils._rebuild_tensor": _Maker(_Tensor),
    "torch._utils._rebuild_tensor_v2": _Maker(_Tensor),
    "torch._utils._rebuild_parameter": _Maker(lambda tensor, *_: tensor),
    "torch.Size": _Maker(tuple),
    "numpy.core.multiarray.scalar": _Maker(_scalar),
    "numpy._core.multiarray.scalar": _Maker(_scalar),
    "numpy.dtype": _Maker(_Dtype),
    "_codecs.encode": _Maker(lambda text, _: text.encode("latin1")),  # how protocol 2 writes bytes
    **{f"torch.{name}": name for name in _STORAGES},
}


class _Unpickler(pickle.Unpickler):
    """Knows the names of _ALLOWED and no other; `storage` answers for the arrays outside of the pickle."""

    def __init__(self, file: BinaryIO, storage=None):
        super().__init__(file, encoding="utf-8")
        self.persistent_load = storage or self._no_storage

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise _Refused(
                f"asks for {module}.{name}, which a file of weights has no need of; it was not run. In PyTorch, save "
                "weights alone: torch.save(model.state_dict(), path)"
            ) from None

    @staticmethod
    def _no_storage(key: Any) -> Any:
        raise _Refused(f"is damaged: a storage {key!r} where there can be none")


def _check_not_tar(path: Path) -> None:
    """Zip files may follow anything: the last of an archive's would be read as if it were the whole."""
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            names = [member.name for member in archive if member.isfile()]
        if names:  # else the file is of zeros
            raise _Refused(f"is a tar archive; unpack it (tar xf) and name a file of it: {', '.join(names[:8])}")


def _load_zip(file: BinaryIO) -> Any:
    archive = zipfile.ZipFile(file)
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise _Refused(f"is a zip file, but not one of torch.save: it holds {len(roots) or 'no'} data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise _Refused("is a compressed zip file, which torch.save never writes; get the original")
    if f"{roots[0]}byteorder" in archive.namelist() and archive.read(f"{roots[0]}byteorder") != b"little":
        raise _Refused("was written on a big-endian machine; load and save it with PyTorch on another")
    storages: dict[str, np.ndarray] = {}

    def storage(key: tuple) -> _Storage:
        _, kind, name, _, count = key
        if name not in storages:
            storages[name] = np.frombuffer(archive.read(f"{roots[0]}data/{name}"), _STORAGES[kind])
        if storages[name].size != count or storages[name].dtype != _STORAGES[kind]:
            raise _Refused(f"is damaged: storage {name} has {storages[name].size} numbers in place of {count}")
        return _Storage(storages[name])

    return _Unpickler(io.BytesIO(archive.read(f"{roots[0]}data.pkl")), storage).load()


def _load_legacy(file: BinaryIO) -> Any:
    """Pickles of a magic number, a version, the machine, the object and its storages' names; then the storages."""
    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise _Refused("is no file of torch.save")
    _version, _machine = _Unpickler(file).load(), _Unpickler(file).load()
    storages: dict[str, np.ndarray] = {}
    size = os.fstat(file.fileno()).st_size

    def storage(key: tuple) -> _Storage:
        _, kind, name, _, count, view = key
        if name not in storages:
            allotted = sum(array.nbytes for array in storages.values())
            if type(count) is not int or not 0 <= count * _STORAGES[kind].itemsize <= size - allotted:
                raise _Refused(f"is damaged or cut short: it has no room for a storage of {count} numbers")
            storages[name] = np.zeros(count, _STORAGES[kind])
        return _Storage(storages[name] if view is None else storages[name][view[1] : view[1] + view[2]])

    tree = _Unpickler(file, storage).load()
    for name in _Unpickler(file).load():
        (count,) = struct.unpack("<q", file.read(8))
        if count != storages[name].size or file.readinto(storages[name].view(np.uint8)) != storages[name].nbytes:
            raise _Refused(f"is damaged or cut short: storage {name} ends early")
    return tree


def save(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], **notes: str) -> None:
    """Writes {"model": tensors, **notes} as torch.save would, for torch.load(path, weights_only=True)["model"]."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle(tensors, notes))
        archive.writestr("archive/byteorder", "little")
        for name, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{name}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/version", "3\n")


def _pickle(tensors: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> bytes:
    """The pickle of `save`'s dict; every tensor a call of torch._utils._rebuild_tensor_v2, written out by hand."""
    kinds = {dtype: name for name, dtype in _STORAGES.items()}
    out = bytearray(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT)
    for name, note in notes.items():
        out += _plain(name) + _plain(note) + pickle.SETITEM
    out += _plain("model") + pickle.EMPTY_DICT + pickle.MARK
    for name, (key, array) in enumerate(tensors.items()):
        if array.dtype not in kinds:
            raise ValueError(f"{key!r} is of type {array.dtype}, which PyTorch has no storage for; convert it first")
        kind = _global("torch", kinds[array.dtype])
        storage = _tuple(_plain("storage"), kind, _plain(str(name)), _plain("cpu"), _plain(array.size))
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        arguments = _tuple(
            storage + pickle.BINPERSID, _plain(0), _tuple(*map(_plain, array.shape)), _tuple(*map(_plain, strides)),
            pickle.NEWFALSE, hooks,
        )  # fmt: skip
        out += _plain(key) + _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE
    return bytes(out + pickle.SETITEMS + pickle.SETITEM + pickle.STOP)


def _plain(value: str | int) -> bytes:
    """The opcodes of a string or a number, without the frame around them."""
    if isinstance(value, int):
        return pickle.BININT + struct.pack("<i", value)
    text = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(text)) + text


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE
