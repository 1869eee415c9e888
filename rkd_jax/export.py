"""A trained network as files that need none of this package.

    python -m rkd_jax.export runs/a/best --output runs/a/export
    python -m rkd_jax.export runs/a/best --output runs/a/export --formats jax torch tflite onnx --dataset cifar100

writes into OUTPUT

    network.jaxexport   StableHLO of jax.export, for CPU, CUDA and TPU: uint8 images in, float32 logits out
    network.pth         a PyTorch state dict, for RepDistiller's and mdistiller's networks of that name
    network.tflite      for LiteRT; needs TensorFlow
    network.onnx        for ONNX Runtime and others; needs jax2onnx and onnxruntime
    network.json        what goes in, what comes out, and what was measured of each file

Every file is read again, and its logits are compared with the Flax network's on random images, and on real ones with
--dataset, before the command is content.
"""

import argparse
import dataclasses
import importlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from rkd_jax import _devices, _files, _flags, checkpoint, convert, evaluate, provenance
from rkd_jax.models import _conv

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # of the logits
DTYPES = {"uint8": jnp.uint8, "normalized": jnp.float32}
DEVICE = f"cpu ({provenance.processor()})"
Predict = Callable[[np.ndarray], np.ndarray]  # images [B, H, W, K] -> logits [B, C]


@dataclasses.dataclass(frozen=True, eq=False)
class Export:
    """The function of images that is exported."""

    network: evaluate.Restored
    shape: tuple[int, int, int]  # of an image: height, width, channels
    batch: int | None  # None: any
    images: str  # of DTYPES: "uint8", normalised in the graph, or "normalized" before it

    def __call__(self, images: jax.Array) -> jax.Array:
        """The logits."""
        if self.images == "uint8":
            return self.network(images).logits
        return self.network.network.apply(self.network.variables, images, train=False).logits

    @property
    def dtype(self) -> Any:
        """Of the images."""
        return DTYPES[self.images]

    def example(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 images as the exported function takes them."""
        if self.images == "uint8":
            return pixels
        mean, std = (np.asarray(x, np.float32) for x in self.network.normalization)
        return (pixels.astype(np.float32) / 255 - mean) / std

    def signature(self) -> dict[str, Any]:
        """What goes in and what comes out, for network.json."""
        mean, std = self.network.normalization
        formula = "(images / 255 - mean) / std, by channel, of uint8 images"
        return {
            "network": self.network.metadata["network"],
            "input": {
                "name": "images",
                "shape": [self.batch or "batch", *self.shape],
                "axes": "batch, height, width, channel",
                "dtype": jnp.dtype(self.dtype).name,
                "values": "0 to 255" if self.images == "uint8" else formula,
                "normalisation": f"in the graph: {formula}" if self.images == "uint8" else "before the graph: yours",
                "mean": mean,
                "std": std,
            },
            "output": {
                "name": "logits",
                "shape": [self.batch or "batch", self.network.metadata["num_classes"]],
                "dtype": "float32",
            },
        }


# Formats: each writes a file and returns how to read it, as a function of images; None where there is nothing to time.


def to_jax(export: Export, path: Path) -> Predict:
    """StableHLO, for all platforms in one file."""
    batch = export.batch or jax.export.symbolic_shape("batch")[0]
    spec = jax.ShapeDtypeStruct((batch, *export.shape), export.dtype)
    exported = jax.export.export(jax.jit(export), platforms=PLATFORMS)(spec)
    path.write_bytes(exported.serialize())
    call = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: np.asarray(call(images))


def to_torch(export: Export, path: Path) -> Predict:
    """A state dict; read back, it is applied by Flax, for PyTorch need not be here."""
    network, metadata = export.network, export.network.metadata
    name = metadata["network"]
    convert.save(path, network.variables, name, metadata | {"image_size": export.shape[0]})
    again = convert.from_torch(path, name, metadata["num_classes"])
    apply = jax.jit(dataclasses.replace(export, network=dataclasses.replace(network, variables=again)))
    return lambda images: np.asarray(apply(images))


def to_tflite(export: Export, path: Path) -> Predict:
    """A flat buffer of TensorFlow Lite's builtin operations."""
    (tf,) = _import("tflite")
    from jax.experimental import jax2tf

    tf.config.set_visible_devices([], "GPU")
    spec = tf.TensorSpec((export.batch, *export.shape), jnp.dtype(export.dtype).name, "images")
    polymorphic = None if export.batch else ["(batch, ...)"]
    function = tf.function(
        jax2tf.convert(export, polymorphic_shapes=polymorphic, with_gradient=False),
        autograph=False,
        input_signature=[spec],
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()], function)
    path.write_bytes(converter.convert())
    with warnings.catch_warnings():  # it would have us take the same interpreter from ai_edge_litert
        warnings.simplefilter("ignore", UserWarning)
        interpreter = tf.lite.Interpreter(str(path))
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()

    def predict(images: np.ndarray) -> np.ndarray:
        if tuple(interpreter.get_input_details()[0]["shape"]) != images.shape:
            interpreter.resize_tensor_input(given["index"], images.shape)
            interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(made["index"])

    interpreter.allocate_tensors()
    return predict


def to_onnx(export: Export, path: Path) -> Predict:
    """An ONNX graph, by jax2onnx."""
    jax2onnx, runtime = _import("onnx")
    spec = jax.ShapeDtypeStruct((export.batch or "batch", *export.shape), export.dtype)
    names = {"input_names": ["images"], "output_names": ["logits"]}
    with mock.patch("jax.lax.platform_dependent", _on_cpu):  # which jax2onnx 0.17 does not know
        jax2onnx.to_onnx(export.__call__, [spec], return_mode="file", output_path=str(path), **names)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def _on_cpu(*args: Any, default: Callable | None = None, **branches: Callable) -> Any:
    """What jax.lax.platform_dependent computes on a CPU."""
    return branches.get("cpu", default)(*args)


class Format(NamedTuple):
    """A kind of file."""

    write: Callable[[Export, Path], Predict]
    file: str
    packages: tuple[str, ...] = ()  # that it needs: the names to import and to install them by


FORMATS = {
    "jax": Format(to_jax, "network.jaxexport", ("flatbuffers",)),
    "torch": Format(to_torch, "network.pth"),
    "tflite": Format(to_tflite, "network.tflite", ("tensorflow",)),
    "onnx": Format(to_onnx, "network.onnx", ("jax2onnx", "onnxruntime")),
}


def _import(kind: str) -> list[Any]:
    """The modules that a format needs; ImportError that says what to install."""
    packages = FORMATS[kind].packages
    try:
        return [importlib.import_module(name) for name in packages]
    except ImportError as error:
        names = " ".join(packages)
        raise ImportError(f"--formats {kind} needs {names}: pip install {names} ({error})") from error


# The command.


def verify(export: Export, predict: Predict, pixels: np.ndarray) -> float:
    """The largest difference of the logits from those of the Flax network, on uint8 images [N, H, W, K]."""
    expected = np.asarray(jax.jit(lambda x: export.network(x).logits)(pixels))
    size = export.batch or len(pixels)
    batches = [export.example(pixels[i : i + size]) for i in range(0, len(pixels), size)]
    found = np.concatenate([predict(batch) for batch in batches])
    return float(np.abs(found - expected).max())


def latency(predict: Predict, images: np.ndarray, repeats: int = 20) -> float:
    """Median milliseconds of a call, the first ones not counted."""
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        predict(images)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def run(args: argparse.Namespace) -> None:
    """Writes and checks the files of one network; what is wrong with the flags is said before the first."""
    metadata = checkpoint.read_metadata(args.folder, "FOLDER")
    side = args.image_size or metadata.get("image_size")
    if side is None:
        raise ValueError(
            "--image_size is missing, and the network's metadata lacks it; give the images' side in pixels"
        )
    shape = (side, side, len(metadata["mean"]))
    formats = args.formats or (["jax"] if ":" in metadata["network"] else ["jax", "torch"])
    for kind in formats:
        _import(kind)
    there = _described(args.output / "network.json")
    _check_output(args.output, there, metadata, formats)
    export = Export(evaluate.restore(args.folder, shape, field="FOLDER"), shape, args.batch, args.images)
    pixels = _images(args, shape)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output={args.output} cannot be made a folder ({error.strerror}); name another") from error
    facts = export.signature() | {"platforms of network.jaxexport": PLATFORMS}
    facts |= {name: metadata.get(name) for name in ("fingerprint", "class_names")}
    facts, path = json.loads(json.dumps(facts)), args.output / "network.json"
    files = there.pop("files", {})
    files = files if there == facts else {}  # of the same network, input and output
    for kind in formats:
        name = FORMATS[kind].file
        made = provenance.record() | {"device": DEVICE, "convolutions": "XLA"}  # whatever else there is: see `main`
        files[name] = write(export, kind, args.output / name, pixels) | made
        _files.write_json(path, facts | {"files": files})
        for other in {FORMATS[kind].file for kind in formats} - {*files}:  # another network's, should its format fail
            (args.output / other).unlink(missing_ok=True)


def _described(path: Path) -> dict[str, Any]:
    """What a network.json says; {} where there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_output(output: Path, there: Mapping[str, Any], metadata: Mapping[str, Any], formats: Sequence[str]) -> None:
    """ValueError where files of another network's export would be left beside the new ones."""
    others = any(name in there and there[name] != metadata.get(name) for name in ("network", "fingerprint"))
    left = [each.file for kind, each in FORMATS.items() if kind not in formats and (output / each.file).exists()]
    if others and left:
        raise ValueError(
            f"--output={output} holds {', '.join(left)} of another network; remove it, or name another folder"
        )


def write(export: Export, kind: str, path: Path, pixels: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Writes and checks a file on uint8 images, by what they are; returns and prints what was measured of it.

    ValueError where the network cannot be converted, or where the logits differ; a file of before stays as it is.
    """
    with _files.replacing_file(path) as fresh:
        return _measured(export, kind, fresh, pixels)


def _measured(export: Export, kind: str, path: Path, pixels: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Writes a file, and says what `write` says of it."""
    try:
        predict = FORMATS[kind].write(export, path)
    except OSError:
        raise
    except Exception as error:  # what others' converters raise is of any kind
        raise ValueError(
            f"--formats {kind}: {export.network.metadata['network']} cannot be converted ({type(error).__name__}: "
            f"{str(error)[:200]}); try --batch 1, or leave {kind} out"
        ) from error
    record = {"bytes": path.stat().st_size, "max_abs_difference": {}}
    print(f"{path.with_name(FORMATS[kind].file)}: {record['bytes']:,} bytes")
    for what, some in pixels.items():
        record["max_abs_difference"][what] = difference = verify(export, predict, some)
        print(f"  largest difference of the logits from Flax's, {what}: {difference:.1e}")
        if not difference <= TOLERANCE:
            raise ValueError(f"--formats {kind}: the file's logits are not the network's; leave {kind} out")
    if kind == "torch":
        return record  # read back into Flax: its speed would not be PyTorch's
    record["milliseconds"] = {}
    for size in (1, 64) if export.batch is None else (export.batch,):
        images = export.example(np.resize(pixels["random images"], (size, *export.shape)))
        record["milliseconds"][str(size)] = milliseconds = round(latency(predict, images), 3)
        print(f"  batch {size}: {milliseconds:.2f} ms, median, {DEVICE}")
    return record


def _images(args: argparse.Namespace, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """uint8 images to compare on, by what they are: as many as fill batches."""
    count = args.batch or 64
    found = {"random images": np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)}
    if args.dataset:
        test = evaluate.load_splits(args.dataset, args.data_dir, shape[0]).test.images
        if test.shape[1:] != shape:
            raise ValueError(f"--dataset={args.dataset} has images of {test.shape[1:]}, the network takes {shape}")
        found[f"test images of {args.dataset}"] = np.resize(test[:count], (count, *shape))
    return found


def _batch(text: str) -> int | None:
    return None if text == "dynamic" else _flags.positive(text)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; it runs on the CPU, whatever else there is."""
    parser = argparse.ArgumentParser(
        prog="python -m rkd_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="a network: best/ or last/ of a run, or a converted one")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="default: jax and torch")
    parser.add_argument("--batch", type=_batch, default=None, metavar="N|dynamic", help="default: dynamic, any size")
    parser.add_argument("--images", choices=DTYPES, default="uint8", help="normalised in the graph, or before it")
    parser.add_argument("--image_size", type=_flags.positive, help="side in pixels; default: as in training")
    parser.add_argument("--dataset", default="", help="compare on its test images, too")
    parser.add_argument("--data_dir", default="", help=_flags.DATA_DIR_HELP)
    args = parser.parse_args(argv)
    with _flags.one_sentence(args):
        cpu = jax.default_device(_devices.start("cpu"))
        with cpu, _conv.xla_alone():  # what is exported runs elsewhere
            run(args)


if __name__ == "__main__":
    main()
