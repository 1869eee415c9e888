"""PyTorch checkpoints to networks of this package, and back.

    python -m rkd_jax.convert --model resnet56 --checkpoint resnet56.pth --output runs/teachers/resnet56
    python -m rkd_jax.convert --checkpoint runs/teachers/resnet56 --output resnet56.pth       (or .safetensors)

reads the files of RepDistiller, mdistiller and pytorch-cifar-models, in either format of torch.save, or safetensors,
without PyTorch and without running code from the file. Files that it wrote itself name their network and how its images
are normalised: they need --checkpoint and --output alone.
"""

# The keys follow from the modules' names (see `rkd_jax.models.layers`), so that a new family needs nothing here.

import argparse
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from rkd_jax import _devices, _files, _flags, checkpoint, models, torch_file
from rkd_jax.data import cifar100, tiny_imagenet
from rkd_jax.models._nnx import FromNNX

# Mean and std of 0..1 by channel, as the teachers' training normalised.
NORMALISATION = {
    "cifar100": (cifar100.MEAN, cifar100.STD),  # RepDistiller, mdistiller
    "tiny_imagenet": (tiny_imagenet.MEAN, tiny_imagenet.STD),
    "pytorch-cifar-models": ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),  # chenyaofo's CIFAR-100 networks
}
NOTE = "rkd_jax"  # the name, in a file for PyTorch, of what our metadata say of it
NOTED = ("network", "num_classes", "class_names", "dataset", "image_size", "mean", "std")
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


class _Slot(NamedTuple):
    path: tuple[str, ...]  # in the variables
    shape: tuple[int, ...]  # in PyTorch


def from_torch(
    source: Mapping[str, Any] | str | os.PathLike, name: str, num_classes: int, prefix: str | None = None
) -> dict[str, Any]:
    """A network's variables, {"params": ..., "batch_stats": ...}, float32 NumPy arrays, from PyTorch's.

    Args:
      source: a state dict (NumPy arrays or tensors) or a file; weights may lie in an outer dict ("model") and behind
        prefixes ("module.", "module.student."), which are found by themselves.
      name: the network, as `rkd_jax.models.create` takes it.
      num_classes: of the classifier.
      prefix: what precedes the keys, where a file holds several such networks: "module.teacher.".

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, not finite, or of another network or class count; names what is missing, left over, of
        another shape.
    """
    label = f"{str(source)!r}" if isinstance(source, str | os.PathLike) else "the state dict"
    return _variables(_arrays(_read(source)), name, num_classes, prefix, label)


def _variables(
    found: Mapping[str, np.ndarray], name: str, num_classes: int, prefix: str | None, label: str
) -> dict[str, Any]:
    """`from_torch` of arrays by their keys; `label` names their source in the errors."""
    state = _under(found, name, prefix, label)
    channels = _counts(state, name)[1] or 3
    layout = _layout(name, num_classes, channels)
    _check(state, layout, f"{label} does not fit {name} with {num_classes} classes", found)
    flat = {}
    for key, (path, shape) in layout.items():
        axes = np.argsort(_torch_axes(path, len(shape)))
        flat[path] = np.ascontiguousarray(state[key].astype(np.float32).transpose(axes))
    if broken := [key for key, (path, _) in layout.items() if not np.isfinite(flat[path]).all()]:
        raise ValueError(
            f"{label} holds NaN or infinite numbers, in {broken[0]} and {len(broken) - 1} more: its training "
            "diverged, or the file is damaged; get a sound one"
        )
    return traverse_util.unflatten_dict(flat)


def to_torch(variables: Mapping[str, Any], name: str, num_classes: int) -> dict[str, np.ndarray]:
    """A PyTorch state dict of NumPy arrays, for load_state_dict(..., strict=True) in RepDistiller and mdistiller.

    ValueError where the variables are not those of network `name` with `num_classes` classes. PyTorch's batch counters
    (num_batches_tracked) start at 0; no result depends on them.
    """
    flat = traverse_util.flatten_dict(dict(variables))
    state = {
        _torch_key(path): np.ascontiguousarray(np.asarray(leaf).transpose(_torch_axes(path, np.ndim(leaf))))
        for path, leaf in flat.items()
    }
    layout = _layout(name, num_classes, _counts(state, name)[1] or 3)
    _check(state, layout, f"the variables do not fit {name} with {num_classes} classes", state)
    ordered = {}
    for key in layout:
        ordered[key] = state[key]
        if key.endswith("running_var"):
            ordered[key.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return ordered


def save(path: str | os.PathLike, variables: Mapping[str, Any], name: str, metadata: Mapping[str, Any]) -> None:
    """Writes a network's state dict for PyTorch, to .pth, .pt or .safetensors, and what its metadata say of it.

    Whole or not at all: a file of before stays where it cannot be written.
    """
    state, path = to_torch(variables, name, metadata["num_classes"]), Path(path)
    note = json.dumps({key: metadata[key] for key in NOTED if key in metadata} | {"network": name})
    with _files.replacing_file(path) as fresh:
        if path.suffix == ".safetensors":
            fresh.write_bytes(safetensors.numpy.save(state, {NOTE: note}))
        else:
            torch_file.save(fresh, state, **{NOTE: note})


def _noted(path: Path, found: Any) -> dict[str, Any]:
    """What `save` noted in a file that holds `found`; {} where it is another's.

    "network" is one of this package, or missing: no code that a file names is run.
    """
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "np") as file:
            found = file.metadata() or {}
    try:
        note = json.loads(found[NOTE])
        sound = all(0 <= x <= 1 for x in note["mean"]) and all(0 < x <= 1 for x in note["std"])
        sound &= int(note.get("image_size", 1)) > 0
        names = note.get("class_names", [])
        sound &= isinstance(names, list) and all(isinstance(name, str) for name in names)
        if note.get("network") not in models.names():
            note.pop("network", None)
        return note if sound else {}
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


@functools.cache
def _layout(name: str, num_classes: int, channels: int) -> dict[str, _Slot]:
    """PyTorch's keys of a network: where each lies in the variables, and its shape; no batch counters."""
    model = models.create(name, num_classes, field="name")
    if isinstance(getattr(model, "network", None), FromNNX):
        raise ValueError(f"{name} is a network of Flax NNX, and PyTorch's files are read and written of Linen's alone")
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    return {
        _torch_key(path): _Slot(path, tuple(leaf.shape[axis] for axis in _torch_axes(path, leaf.ndim)))
        for path, leaf in traverse_util.flatten_dict(variables).items()
    }


def _torch_key(path: tuple[str, ...]) -> str:
    """("params", "layer1_0", "conv1", "kernel") -> "layer1.0.conv1.weight"."""
    _, *modules, leaf = path
    return f"{'.'.join(modules).replace('_', '.')}.{_LEAVES.get(leaf, leaf)}"


def _torch_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Kernels are [height, width, in, out] here and [out, in, height, width] there; dense ones [in, out], [out, in]."""
    return ((1, 0) if ndim == 2 else (3, 2, 0, 1)) if path[-1] == "kernel" else tuple(range(ndim))


def _read(source: Mapping[str, Any] | str | os.PathLike) -> Any:
    if isinstance(source, Mapping):
        return source
    if Path(source).suffix != ".safetensors" or not Path(source).is_file():
        return torch_file.load(source)
    try:
        return safetensors.numpy.load_file(source)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(source)!r} is damaged or cut short ({error}); get it again") from error
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(source)!r} has arrays of a kind that NumPy lacks ({error}); save them as float32"
        ) from error


def _arrays(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Every array of nested dicts, by its keys joined with dots; batch counters left out."""
    found = {}
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Mapping):
            found |= _arrays(value, f"{prefix}{key}.")
        elif hasattr(value, "shape") and not str(key).endswith("num_batches_tracked"):
            if hasattr(value, "detach"):
                value = value.detach().cpu()
                value = value.float() if str(value.dtype) == "torch.bfloat16" else value  # which NumPy lacks
            found[f"{prefix}{key}"] = np.asarray(value)
    return found


def _by_prefix(
    found: Mapping[str, np.ndarray], name: str, prefix: str | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """The arrays behind the given prefix, or behind each where a key of the network's follows; without it, by it."""
    expected = _layout(name, 2, 1).keys()
    starts = {key: [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")] for key in found}
    prefixes = {key[:start] for key in found for start in starts[key] if key[start:] in expected}
    if prefix is not None or not prefixes:
        prefixes = {prefix or ""}
    return {
        start: {key.removeprefix(start): array for key, array in found.items() if key.startswith(start)}
        for start in prefixes
    }


def _under(found: Mapping[str, np.ndarray], name: str, prefix: str | None, label: str) -> dict[str, np.ndarray]:
    """The arrays behind one prefix, without it: the given one, or that whose keys are nearest to the network's."""
    if not found:
        raise ValueError(f"{label} holds no tensors by name; name a file of a network's state dict")
    expected, states = _layout(name, 2, 1).keys(), _by_prefix(found, name, prefix)
    # Fewest missing first: a few layers of a larger network, taken for all, would leave less over than the whole does.
    nearest = sorted(states, key=lambda at: (len(expected - states[at].keys()), len(states[at].keys() - expected), at))
    whole = [start for start in nearest if states[start].keys() == expected]
    if len(whole) > 1:
        raise ValueError(f"{label} holds {name} {len(whole)} times; choose with prefix= (--prefix): {whole}")
    return states[nearest[0]]


def _counts(state: Mapping[str, np.ndarray], name: str) -> tuple[int | None, int | None]:
    """The class and channel counts that a state dict of network `name` has; None where that layer is missing."""
    small, large = _layout(name, 2, 1), _layout(name, 3, 3)
    shapes = [(state[key].shape, slot.shape, large[key].shape) for key, slot in small.items() if key in state]
    classes = [found[0] for found, a, b in shapes if found and a[0] != b[0]]
    channels = [found[1] for found, a, b in shapes if len(found) == len(a) > 1 and a[1] != b[1]]
    return (classes or [None])[0], (channels or [None])[0]


def _differences(state: Mapping[str, Any], layout: Mapping[str, _Slot]) -> list[str]:
    """What is missing, left over, of another shape; one line each, empty where all fits."""
    missing = [key for key in layout if key not in state]
    extra = [f"{key} {state[key].shape}" for key in state if key not in layout]
    wrong = [
        f"{key} {state[key].shape} in place of {slot.shape}"
        for key, slot in layout.items()
        if key in state and state[key].shape != slot.shape
    ]
    kinds = {"missing": missing, "left over": extra, "of another shape": wrong}
    return [
        f"{len(keys)} {kind}: {', '.join(keys[:4])}" + (", ..." if len(keys) > 4 else "")
        for kind, keys in kinds.items()
        if keys
    ]


def _check(state: Mapping[str, Any], layout: Mapping[str, _Slot], complaint: str, found: Mapping[str, Any]) -> None:
    differences = _differences(state, layout)
    if differences:
        fits = _fitting(found)
        mend = f"It holds {' or '.join(fits)}: say so" if fits else "Get the checkpoint of the network that you name"
        if not fits and all(" left over: " in line for line in differences):
            mend += ", or take out of the file what is no part of it"
        raise ValueError(f"{complaint}; {'; '.join(differences)}. {mend}.")


def _fitting(found: Mapping[str, Any]) -> list[str]:
    """The networks of this package that the arrays fit, with their class counts."""
    fits = []
    for name in models.names():
        for state in _by_prefix(found, name).values():
            if state.keys() == _layout(name, 2, 1).keys():
                classes, channels = _counts(state, name)
                if not _differences(state, _layout(name, classes, channels)):
                    fits.append(f"{name} with {classes} classes")
    return list(dict.fromkeys(fits))


def _normalisation(
    args: argparse.Namespace, noted: Mapping[str, Any], zoo: bool, num_classes: int, channels: int
) -> dict[str, Any]:
    """The mean and std of the command line, else of --dataset, of the file, of its zoo, or of the class count."""
    if args.mean is not None or args.std is not None:
        if not len(args.mean or ()) == len(args.std or ()) == channels:
            raise ValueError(f"--mean and --std go together, {channels} numbers each: one for every channel")
        if not all(0 <= mean <= 1 for mean in args.mean) or not all(0 < std <= 1 for std in args.std):
            raise ValueError(
                f"--mean {args.mean} --std {args.std}: give them of pixels of 0..1, not 0..255; a std is above 0"
            )
        return {"mean": args.mean, "std": args.std, "normalisation": "command line"}
    if not args.dataset and len(noted.get("mean", ())) == len(noted.get("std", ())) == channels:
        return {"mean": noted["mean"], "std": noted["std"], "normalisation": "the file's"}
    kind = args.dataset or ("pytorch-cifar-models" if zoo else {100: "cifar100", 200: "tiny_imagenet"}.get(num_classes))
    if kind is None or channels != 3:
        raise ValueError(
            f"a network of {num_classes} classes and {channels} channels is of no known data set; say how its training "
            f"images were normalised, of 0..1, by channel: --mean{' 0.5' * channels} --std{' 0.25' * channels}"
        )
    mean, std = NORMALISATION[kind]
    return {"mean": list(mean), "std": list(std), "normalisation": kind}


def _is_of_zoo(path: Path, digest: str) -> bool:
    """Whether a file is named as pytorch-cifar-models' for CIFAR-100 are; the name ends in the checksum's start."""
    named = re.fullmatch(r"cifar100_\w+-([0-9a-f]{8})\.pt", path.name)
    if named and not digest.startswith(named[1]):
        raise ValueError(f"{str(path)!r} is damaged: SHA-256 {digest[:8]}..., its name says {named[1]}; get it again")
    return named is not None


def _check_output(output: Path) -> None:
    """ValueError where --output is there and is anything but a network's folder: what it holds would be lost."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={str(output)!r} is a file; name a folder")
    held = {path.name for path in output.iterdir()} if output.exists() else set()
    if foreign := sorted(held - {"metadata.json", "variables", "evaluation.json"}):
        raise ValueError(
            f"--output={str(output)!r} holds {foreign[0]!r}, which would be lost; name a new folder, say "
            f"{str(output / 'network')!r}"
        )


def _to_folder(args: argparse.Namespace) -> str:
    """A PyTorch file to a network's folder; returns what to print."""
    _check_output(Path(args.output))
    path = Path(args.checkpoint)
    held = _read(path)
    found, noted = _arrays(held), _noted(path, held)
    model = args.model or noted.get("network")
    if model is None:
        raise ValueError(
            f"--model is missing; {path.name} holds {' or '.join(_fitting(found)) or 'no network of ours'}"
        )
    name = models.resolve(model, args.image_size, field="--model")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    zoo = _is_of_zoo(path, digest)
    classes, channels = _counts(_under(found, name, args.prefix, repr(str(path))), name)
    num_classes = args.num_classes or classes or 100
    variables = _variables(found, name, num_classes, args.prefix, repr(str(path)))
    metadata = {
        "network": name,
        "num_classes": num_classes,
        **_normalisation(args, noted, zoo, num_classes, channels),
        "source": path.name,
        "sha256": digest,
    }
    usual = {"cifar100": 32, "pytorch-cifar-models": 32, "tiny_imagenet": 64}.get(metadata["normalisation"])
    if side := args.image_size or noted.get("image_size", usual):  # of another set's images, the size is not known
        metadata["image_size"] = side
    metadata |= {"dataset": noted["dataset"]} if "dataset" in noted else {}
    if len(names := noted.get("class_names", ())) == num_classes:
        metadata["class_names"] = names
    checkpoint.save_network(args.output, variables, metadata)
    count = models.count_parameters(variables["params"])
    return (
        f"{args.output}: {name}, {num_classes} classes, {count:,} parameters, from {path.name} ({digest[:12]})\n"
        f"normalisation ({metadata['normalisation']}): mean {metadata['mean']}, std {metadata['std']}"
        + ("" if side else "\nthe size of its images is not known; --image_size records it")
    )


def _to_file(args: argparse.Namespace) -> str:
    """A network's folder to a file for PyTorch; returns what to print."""
    for flag in ("dataset", "mean", "std", "image_size", "prefix"):
        if getattr(args, flag) is not None:
            raise ValueError(
                f"--{flag} is for a PyTorch file; --checkpoint={args.checkpoint!r} is a folder: leave it out"
            )
    variables, metadata = checkpoint.load_network(args.checkpoint, args.model, args.num_classes, field="--checkpoint")
    name, output = metadata["network"], Path(args.output)
    if output.suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"--output={str(output)!r}: end it in .pth, .pt or .safetensors, which says what to write")
    output.parent.mkdir(parents=True, exist_ok=True)
    save(output, variables, name, metadata)
    read = f"torch.load({str(output)!r}, weights_only=True)['model']"
    if output.suffix == ".safetensors":
        read = f"safetensors.torch.load_file({str(output)!r})"
    return f"{output}: {name}, {metadata['num_classes']} classes; load_state_dict({read}, strict=True)"


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m rkd_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="PyTorch or safetensors file; a folder converts back")
    parser.add_argument("--output", required=True, help="folder to write; converting back: .pth, .pt or .safetensors")
    parser.add_argument("--model", help=f"network: {', '.join(models.names())}")
    parser.add_argument("--num_classes", type=_flags.positive, help="default: as the file's classifier says")
    parser.add_argument(
        "--dataset", choices=NORMALISATION, help="whose normalisation its training used; default: by file and classes"
    )
    parser.add_argument(
        "--mean", type=float, nargs="+", help="of 0..1, a number for each channel, in place of --dataset's"
    )
    parser.add_argument("--std", type=float, nargs="+", help="likewise")
    parser.add_argument("--image_size", type=_flags.positive, help="in pixels; 64 with MobileNetV2: its 64x64 form")
    parser.add_argument("--prefix", help="of the keys, in a file of several networks: module.teacher.")
    args = parser.parse_args(argv)
    with _flags.one_sentence(args):
        _devices.start()
        print(_to_file(args) if Path(args.checkpoint).is_dir() else _to_folder(args))


if __name__ == "__main__":
    main()
