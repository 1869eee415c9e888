"""The exported files give the Flax network's logits, the artefact without this package."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import linen as nn
from PIL import Image

from rkd_jax import checkpoint, data, evaluate, export, models

ALONE = """
import json, sys
from pathlib import Path
import jax
import jax.export
import numpy as np

folder = Path(sys.argv[1])
exported = jax.export.deserialize(bytearray((folder / "network.jaxexport").read_bytes()))
images = np.load(folder / "images.npy")
assert images.dtype == json.loads((folder / "network.json").read_text())["input"]["dtype"]
np.save(folder / "logits.npy", np.concatenate([exported.call(images[:1]), exported.call(images[1:])]))
assert not {"rkd_jax", "flax"} & set(sys.modules), "the artefact needs jax and numpy alone"
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The folder of a resnet8 for 12 classes of 16x16 RGB images, every number drawn at random."""
    model, generator = models.create("resnet8", 12), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32))
    variables = jax.tree.map(lambda leaf: generator.uniform(0.1, 0.4, leaf.shape).astype(np.float32), shapes)
    variables["params"] = jax.tree.map(lambda leaf: leaf - 0.25, variables["params"])
    path = tmp_path_factory.mktemp("networks") / "resnet8"
    facts = {
        "network": "resnet8",
        "num_classes": 12,
        "image_size": 16,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.25],
        "class_names": list("abcdefghijkl"),
    }
    checkpoint.save_network(path, variables, facts)
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8)


def test_python_of_the_docs_runs(network, images, tmp_path):
    export.main([str(network), "--output", str(tmp_path / "runs" / "a" / "export"), "--formats", "jax"])
    page = (ROOT / "docs" / "export.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    block = block.replace("(64, 32, 32, 3)", "(64, 16, 16, 3)")
    result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(64, 12) float32"


def logits_of(path, images):
    restored = evaluate.restore(path, images.shape[1:])
    with pytest.raises(ValueError, match="images are float32; give uint8 from 0 to 255"):
        restored(images / np.float32(255))
    with pytest.raises(ValueError, match=r"images have the shape \(16, 16, 3\); give a batch of them, \[B, H, W, 3\]"):
        restored(images[0])
    with pytest.raises(ValueError, match=r"image_shape=\(16, 16\); give height, width and channels"):
        evaluate.restore(path, images.shape[1:3])
    for channels, mend in ((4, "name a network of such images"), (1, "save these in RGB")):
        message = f"^{path} was trained on images of 3 channels, and here are images of {channels}; {mend}$"
        with pytest.raises(ValueError, match=message):
            evaluate.restore(path, (16, 16, channels))
    return np.asarray(jax.jit(restored)(images).logits), restored.normalization


def test_artefact_runs_without_this_package(network, images, tmp_path, capsys):
    export.main([str(network), "--output", str(tmp_path)])
    assert "batch 64" in capsys.readouterr().out
    np.save(tmp_path / "images.npy", images)
    # From another folder, where this package cannot be found by chance.
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits_of(network, images)[0], rtol=1e-5, atol=1e-5)

    record = json.loads((tmp_path / "network.json").read_text())
    assert record["input"]["shape"] == ["batch", 16, 16, 3]
    assert (record["input"]["mean"], record["input"]["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25])
    assert (record["input"]["dtype"], record["input"]["values"]) == ("uint8", "0 to 255")
    assert record["class_names"] == list("abcdefghijkl")
    assert record["output"]["shape"] == ["batch", 12]
    assert record["fingerprint"] == checkpoint.read_metadata(network)["fingerprint"]
    for name, file in record["files"].items():
        assert file["bytes"] == (tmp_path / name).stat().st_size
    exported = jax.export.deserialize(bytearray((tmp_path / "network.jaxexport").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_state_dict_gives_the_same_logits_in_pytorch(network, images, tmp_path):
    torch = pytest.importorskip("torch")
    import torch_networks

    export.main([str(network), "--output", str(tmp_path), "--formats", "torch"])
    peer = torch_networks.create("resnet8", 12).eval()
    peer.load_state_dict(torch.load(tmp_path / "network.pth", weights_only=True)["model"], strict=True)
    expected, (mean, std) = logits_of(network, images)
    normalized = ((images.astype(np.float32) / 255 - mean) / std).astype(np.float32)
    with torch.no_grad():
        found = peer(torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy()))[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_fixed_batch_of_normalised_images(network, images, tmp_path):
    arguments = ["--formats", "jax", "--batch", "5", "--images", "normalized"]
    export.main([str(network), "--output", str(tmp_path), *arguments])
    exported = jax.export.deserialize(bytearray((tmp_path / "network.jaxexport").read_bytes()))
    expected, (mean, std) = logits_of(network, images)
    found = exported.call(((images.astype(np.float32) / 255 - mean) / std).astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    given = json.loads((tmp_path / "network.json").read_text())["input"]
    assert (given["shape"], given["dtype"]) == ([5, 16, 16, 3], "float32")
    assert given["values"].startswith("(images / 255 - mean) / std")
    with pytest.raises(ValueError, match="shape"):
        exported.call(images[:1].astype(np.float32))


class ByPlatform(nn.Module):
    """A network that computes in another way on every platform."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        mean = jax.lax.platform_dependent(
            images, cpu=lambda x: x.mean((1, 2)), cuda=lambda x: x.sum((1, 2)) / 256, default=lambda x: x[:, 0, 0]
        )
        return nn.Dense(self.num_classes)(mean)


def test_network_of_ones_own_that_depends_on_the_platform(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "by_platform", sys.modules[__name__])
    model = models.create("by_platform:ByPlatform", 3)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    facts = {"network": "by_platform:ByPlatform", "num_classes": 3, "mean": [0.5] * 3, "std": [0.2] * 3}
    checkpoint.save_network(tmp_path / "network", variables, facts)
    export.main([str(tmp_path / "network"), "--output", str(tmp_path / "out"), "--image_size", "16"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"network.jaxexport", "network.json"}
    exported = jax.export.deserialize(bytearray((tmp_path / "out" / "network.jaxexport").read_bytes()))
    expected, _ = logits_of(tmp_path / "network", images)
    np.testing.assert_allclose(exported.call(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "batch", "packages"),
    [
        pytest.param("tflite", "3", ["tensorflow"], id="tflite", marks=pytest.mark.slow),
        pytest.param("onnx", "dynamic", ["jax2onnx", "onnxruntime"], id="onnx"),
    ],
)
def test_other_formats(kind, batch, packages, network, tmp_path):
    for package in packages:
        pytest.importorskip(package)
    export.main([str(network), "--output", str(tmp_path), "--formats", kind, "--batch", batch])
    (file,) = json.loads((tmp_path / "network.json").read_text())["files"].values()
    assert file["max_abs_difference"]["random images"] <= export.TOLERANCE


def test_a_converter_that_fails_is_named_and_leaves_what_was_there(network, tmp_path, monkeypatch):
    def fails(export, path):
        path.write_bytes(b"half")
        raise NotImplementedError("no such operation")

    def untrained(export, path):
        path.write_bytes(b"another network")
        return lambda images: np.zeros((len(images), 12))

    (tmp_path / "network.onnx").write_bytes(b"whole")
    for writes, said in (
        (fails, r"resnet8 cannot be converted .*no such operation.*leave onnx"),
        (untrained, "the file's logits are not the network's; leave onnx out"),
    ):
        monkeypatch.setitem(export.FORMATS, "onnx", export.Format(writes, "network.onnx"))
        with pytest.raises(SystemExit, match=rf"--formats onnx: {said}"):
            export.main([str(network), "--output", str(tmp_path), "--formats", "onnx"])
        assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]
        assert (tmp_path / "network.onnx").read_bytes() == b"whole"


def test_real_images(teacher, tmp_path, capsys):
    arguments = ["--image_size", "8", "--formats", "jax", "--dataset", "digits"]
    export.main([str(teacher), "--output", str(tmp_path), *arguments])
    assert "test images of digits" in capsys.readouterr().out
    assert len(data.load("digits").test.images) > 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{teacher}"], "--image_size is missing"),
        (["{teacher}", "--image_size", "16", "--dataset", "digits"], "--dataset=digits has images of"),
        (["nowhere"], "FOLDER='nowhere' holds no network"),
        (["{teacher}", "--image_size", "0"], "--image_size: '0' is not a whole number of 1 or more"),
        (["{teacher}", "--batch", "-1"], "--batch: '-1' is not a whole number of 1 or more"),
    ],
)
def test_errors_name_the_flag(arguments, message, teacher, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        export.main([*(argument.format(teacher=teacher) for argument in arguments), "--output", str(tmp_path)])
    assert re.search(f"[Ee]rror: .*{message}", f"{stop.value} {capsys.readouterr().err}")


def test_output_that_is_a_file_is_named(network, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=r"--output=.*file cannot be made a folder \(File exists\); name"):
        export.main([str(network), "--output", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_format_whose_package_is_absent_names_it(network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(SystemExit, match="pip install jax2onnx onnxruntime"):
        export.main([str(network), "--output", str(tmp_path), "--formats", "jax", "onnx"])
    assert not list(tmp_path.iterdir())  # it is said before the first format is written


def test_every_file_that_is_there_is_described(network, tmp_path):
    for kind in ("jax", "torch"):
        export.main([str(network), "--output", str(tmp_path), "--formats", kind])
    files = json.loads((tmp_path / "network.json").read_text())["files"]
    assert [*files] == ["network.jaxexport", "network.pth"]
    assert all(file["device"] and file["date"] and file["convolutions"] == "XLA" for file in files.values())
    export.main([str(network), "--output", str(tmp_path), "--formats", "torch", "--batch", "2"])  # another input
    assert [*json.loads((tmp_path / "network.json").read_text())["files"]] == ["network.pth"]
    (tmp_path / "network.json").write_text("[]")
    export.main([str(network), "--output", str(tmp_path), "--formats", "torch"])
    assert [*json.loads((tmp_path / "network.json").read_text())["files"]] == ["network.pth"]


def test_files_of_another_network_are_not_left_beside_the_new_ones(network, tmp_path):
    facts = {"network": "resnet8", "fingerprint": "another", "files": {}}
    (tmp_path / "network.json").write_text(json.dumps(facts))
    for name in ("network.pth", "mine.txt"):
        (tmp_path / name).write_text("before")
    with pytest.raises(SystemExit, match=r"Error: --output=.* holds network\.pth of another network; remove it, or"):
        export.main([str(network), "--output", str(tmp_path), "--formats", "jax"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "network.json", "network.pth"]
    export.main([str(network), "--output", str(tmp_path), "--formats", "torch"])  # in its place
    assert [*json.loads((tmp_path / "network.json").read_text())["files"]] == ["network.pth"]
    assert (tmp_path / "mine.txt").read_text() == "before"


def test_format_that_fails_leaves_no_file_of_another_network(network, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("no such operation")

    (tmp_path / "network.json").write_text(json.dumps({"network": "resnet8", "fingerprint": "another", "files": {}}))
    (tmp_path / "network.jaxexport").write_text("another's")
    monkeypatch.setitem(export.FORMATS, "jax", export.FORMATS["jax"]._replace(write=fail))
    with pytest.raises(SystemExit, match="--formats jax: resnet8 cannot be converted"):
        export.main([str(network), "--output", str(tmp_path), "--formats", "torch", "jax"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.json", "network.pth"]
    assert [*json.loads((tmp_path / "network.json").read_text())["files"]] == ["network.pth"]


def test_images_of_a_folder_come_in_the_networks_size(network, tmp_path, capsys):
    for label in range(12):
        (tmp_path / "images" / f"{label:02}").mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{label:02}" / f"{i}.png")
    dataset = f"folder:{tmp_path / 'images'}"
    export.main([str(network), "--output", str(tmp_path / "out"), "--formats", "jax", "--dataset", dataset])
    assert f"test images of {dataset}" in capsys.readouterr().out


def test_wrong_logits_are_an_error_and_leave_no_file(network, tmp_path, monkeypatch):
    def wrong(export, path):
        path.write_text("")
        return lambda images: np.full((len(images), 12), np.nan)

    monkeypatch.setitem(export.FORMATS, "jax", export.Format(wrong, "network.jaxexport"))
    with pytest.raises(SystemExit, match="are not the network's"):
        export.main([str(network), "--output", str(tmp_path), "--formats", "jax"])
    assert not list(tmp_path.iterdir())
