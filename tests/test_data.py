"""Data sets: splits, subsets, preparing and reading without TensorFlow, the decoded cache, and every error."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import unittest.mock
import zipfile

import numpy as np
import pytest
from conftest import REAL, ROOT
from PIL import ExifTags, Image

from rkd_jax import data
from rkd_jax.data import __main__ as prepare_command
from rkd_jax.data import _cache, _folder, _prepared, base

WNIDS = [f"n{i:08d}" for i in range(200)]


def encode(pixels, kind="png"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_archive(path, per_class=2):
    """A zip of Tiny-ImageNet's layout: wnids out of order, the level of each image tells its class, one image grey."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", "\n".join(WNIDS[::-1]))
        lines = []
        for label, wnid in enumerate(WNIDS):
            for i in range(per_class):
                pixels = np.full((64, 64, 3), label, np.uint8)
                if label == 7 and i == 0:
                    pixels = pixels[..., 0]
                archive.writestr(f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{i}.JPEG", encode(pixels, "jpeg"))
            name = f"val_{(label * 77) % 200}.JPEG"
            lines.append(f"{name}\t{wnid}\t0\t0\t63\t63\n")
            archive.writestr(
                f"tiny-imagenet-200/val/images/{name}", encode(np.full((64, 64, 3), label, np.uint8), "jpeg")
            )
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "".join(lines))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small Tiny-ImageNet, prepared by hand and without TensorFlow, not decoded yet."""
    root = tmp_path_factory.mktemp("tfds")
    (root / "downloads" / "manual").mkdir(parents=True)
    write_archive(root / "downloads" / "manual" / "tiny-imagenet-200.zip")
    _prepared.prepare("tiny_imagenet", root)
    return root


@pytest.fixture
def tiny(prepared, tmp_path, monkeypatch):
    """A copy of it of one's own, and a user's cache folder of one's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    shutil.copytree(prepared / "tiny_imagenet", tmp_path / "tfds" / "tiny_imagenet")
    return tmp_path / "tfds"


def child(code, **environment):
    """Runs Python in a process of its own; its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def check_tiny(splits):
    assert splits.train.images.shape == (400, 64, 64, 3)
    assert splits.test.images.shape == (200, 64, 64, 3)
    assert splits.class_names == tuple(WNIDS)
    assert splits.train.images.dtype == np.uint8
    assert splits.train.labels.dtype == np.int32
    for split in (splits.train, splits.test):  # the level tells the class, JPEG's rounding apart
        assert np.abs(split.images.reshape(len(split.labels), -1).mean(1) - split.labels).max() <= 1


# By name.


def test_digits():
    splits = data.load("digits")
    assert splits.train.images.shape == (1442, 8, 8, 1)
    assert splits.test.images.shape == (355, 8, 8, 1)
    assert (splits.train.images.min(), splits.train.images.max()) == (0, 255)
    assert splits.num_classes == 10
    assert np.bincount(splits.test.labels).min() >= 34
    values = splits.train.images / 255
    np.testing.assert_allclose(splits.mean, values.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(splits.std, values.std((0, 1, 2)), rtol=1e-12)
    assert (data.load("digits").test.labels == splits.test.labels).all()


def test_subset_is_balanced_and_fixed():
    whole, part = data.load("digits").train, data.load("digits", num_train=105, num_test=5)
    assert np.bincount(part.train.labels).tolist() == [11] * 5 + [10] * 5
    assert part.test.labels.tolist() != [0] * 5
    again = data.load("digits", num_train=105).train
    assert (again.images == part.train.images).all()
    rows = {image.tobytes() for image in whole.images}
    assert all(image.tobytes() in rows for image in part.train.images)
    more = data.load("digits", num_train=106).train
    assert {image.tobytes() for image in part.train.images} < {image.tobytes() for image in more.images}
    assert (data.load("digits", num_train=1442).train.images == whole.images).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 1443}, r"config.num_train=1443 exceeds the 1442 training images of digits; lower it"),
        ({"num_test": 356}, r"config.num_test=356 exceeds the 355 test images of digits; lower it"),
        ({"num_train": 0}, r"config.num_train=0 is not positive"),
        ({"image_size": 32}, r"config.image_size=32 is read by tfds: and folder: alone"),
    ],
)
def test_numbers_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load("digits", **arguments)


def test_a_folder_is_written_with_its_kind(tmp_path):
    with pytest.raises(ValueError, match=f"is no data set, but a folder; write 'folder:{tmp_path}'"):
        data.load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10O", r"config.dataset='cifar10O' is no data set; did you mean 'cifar100'\?"),
        ("cifar10", r"did you mean 'cifar100'\? There are .*, tfds:NAME for a set of TFDS \(tfds:cifar10, if that is"),
        ("augment", r"config.dataset='augment' is no data set. There are cifar100, digits, tiny_imagenet, tfds:NAME"),
        ("tfds:mnisst", r"'tfds:mnisst' is no set of TFDS; did you mean 'tfds:mnist'\?"),
        ("tfds:mnist:9.9.9", r"config.dataset='tfds:mnist:9.9.9': this TFDS prepares 3.0.1; take one of them"),
        ("tfds:mnist_corrupted", r"'tfds:mnist_corrupted' comes as identity, .*; name one, as in '.*/ide"),
        ("tfds:mnist_corrupted/grain", r"'tfds:mnist_corrupted' comes as identity, .*; name one"),
        ("tfds:mnist/grain", r"'tfds:mnist' comes in one form; name no other"),
    ],
)
def test_unknown_name(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data.load(name, str(tmp_path))


def test_set_that_is_prepared_in_several_forms_is_named_with_one(tmp_path):
    for config in ("fog", "spatter"):
        (tmp_path / "mnist_corrupted" / config / "1.0.0").mkdir(parents=True)
        (tmp_path / "mnist_corrupted" / config / "1.0.0" / "dataset_info.json").touch()
    message = r"'tfds:mnist_corrupted' comes as fog, spatter; name one, as in 'tfds:mnist_corrupted/fog'"
    with pytest.raises(ValueError, match=message):
        data.load("tfds:mnist_corrupted", str(tmp_path))


def test_decoded_set_alone_is_not_resized(tmp_path):
    _prepared.write_cache("mnist", tmp_path, data.random("cifar100", 20, 10))
    assert data.load("tfds:mnist", str(tmp_path)).train.images.shape == (20, 32, 32, 3)
    with pytest.raises(ValueError, match=r"config.image_size=16: .* holds mnist decoded and at its own size alone"):
        data.load("tfds:mnist", str(tmp_path), image_size=16)


# Preparing and reading.


def test_tiny_imagenet_without_tensorflow(tiny):
    """TensorFlow is neither needed, nor asked for where it is blocked, nor imported where it is installed."""
    code = f"""
import sys
{{}}
from rkd_jax import data
splits = data.load("tiny_imagenet", {str(tiny)!r})
print(len(splits.train.labels), type(sys.modules.get("tensorflow", "absent")).__name__)
"""
    assert child(code.format("sys.modules['tensorflow'] = None")) == "400 NoneType"
    shutil.rmtree(tiny / "tiny_imagenet" / "1.0.0.uint8")
    trap = tiny.parent / "trap"
    (trap / "tensorflow").mkdir(parents=True)
    (trap / "tensorflow" / "__init__.py").write_text("raise SystemError('TensorFlow was imported')")
    assert child(code.format(""), PYTHONPATH=f"{ROOT}{os.pathsep}{trap}") == "400 str"


def test_tiny_imagenet_labels_and_cache(tiny):
    first = data.load("tiny_imagenet", str(tiny))
    check_tiny(first)
    assert first.mean == (0.4802, 0.4481, 0.3975)
    assert (tiny / "tiny_imagenet" / "1.0.0.uint8" / "train_images.npy").exists()
    started = time.perf_counter()
    second = data.load("tiny_imagenet", str(tiny))
    assert time.perf_counter() - started < 1
    assert isinstance(second.train.images, np.memmap)
    assert (second.train.images == first.train.images).all()


@pytest.mark.parametrize("layout", ["name/version.uint8", "the cache itself"])
def test_the_cache_alone_is_enough(tiny, layout):
    data.load("tiny_imagenet", str(tiny))
    cache = tiny / "tiny_imagenet" / "1.0.0.uint8"
    root = tiny.parent / "alone"
    shutil.move(cache, root / "tiny_imagenet" / "1.0.0.uint8" if layout.startswith("name") else root)
    assert len(list(root.rglob("*.npy"))) == 4
    code = f"""
import sys
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = sys.modules["array_record"] = None
from rkd_jax import data
print(data.load("tiny_imagenet", {str(root)!r}).test.images.shape)
"""
    assert child(code) == "(200, 64, 64, 3)"


def test_a_read_only_folder_is_cached_in_the_users(tiny):
    parent = tiny / "tiny_imagenet"
    parent.chmod(0o555)
    try:
        check_tiny(data.load("tiny_imagenet", str(tiny)))
        assert [path.name for path in parent.iterdir()] == ["1.0.0"]
        (cache,) = (tiny.parent / "xdg" / "rkd_jax").iterdir()
        assert isinstance(data.load("tiny_imagenet", str(tiny)).train.images, np.memmap)
        cache.parent.chmod(0o555)  # nowhere to write at all
        shutil.rmtree(cache)
        check_tiny(data.load("tiny_imagenet", str(tiny)))
        assert not cache.exists()
    finally:
        parent.chmod(0o755)


def test_what_a_kill_left_of_a_cache_goes_after_a_day(tmp_path):
    old, fresh, others = (tmp_path / f".[1.0.0].uint8.{rest}" for rest in ("abc_1234", "abc_5678", "my_backup"))
    for folder in (old, fresh, others):
        folder.mkdir()
        (folder / "train_images.npy").write_text("half")
    for folder in (old, others):
        os.utime(folder, (time.time() - 25 * 3600,) * 2)
    _cache.write(tmp_path / "[1.0.0].uint8", "own", "1.0.0", "", data.random("digits", 10, 10))
    assert {*tmp_path.iterdir()} == {fresh, others, tmp_path / "[1.0.0].uint8"}


def test_a_damaged_cache_is_decoded_anew(tiny):
    data.load("tiny_imagenet", str(tiny))
    cache = tiny / "tiny_imagenet" / "1.0.0.uint8"
    for name in ("train_images.npy", "meta.json", "test_labels.npy"):
        (cache / name).write_bytes((cache / name).read_bytes()[:100])
        check_tiny(data.load("tiny_imagenet", str(tiny)))
    (cache / "train_images.npy").write_bytes(b"")
    check_tiny(data.load("tiny_imagenet", str(tiny)))
    (cache / "test_images.npy").unlink()
    check_tiny(data.load("tiny_imagenet", str(tiny)))
    assert not list(cache.parent.glob(".*"))  # nothing half written is left


def test_class_names_of_a_cache_that_has_none_are_those_of_the_set(tiny):
    data.load("tiny_imagenet", str(tiny))
    meta = tiny / "tiny_imagenet" / "1.0.0.uint8" / "meta.json"
    facts = json.loads(meta.read_text())
    del facts["class_names"]
    meta.write_text(json.dumps(facts))
    check_tiny(data.load("tiny_imagenet", str(tiny)))


def test_a_set_prepared_anew_is_decoded_anew(tiny):
    data.load("tiny_imagenet", str(tiny))
    info = tiny / "tiny_imagenet" / "1.0.0" / "dataset_info.json"
    meta = tiny / "tiny_imagenet" / "1.0.0.uint8" / "meta.json"
    before = json.loads(meta.read_text())["fingerprint"]
    info.write_text(json.dumps({**json.loads(info.read_text()), "description": "another"}))
    check_tiny(data.load("tiny_imagenet", str(tiny)))
    assert json.loads(meta.read_text())["fingerprint"] != before
    facts = json.loads(meta.read_text()) | {"format": 0, "class_names": ["of an older form of the cache"]}
    meta.write_text(json.dumps(facts))
    check_tiny(data.load("tiny_imagenet", str(tiny)))


def test_newest_version_of_a_prepared_set_is_read(tmp_path):
    for version in ("9.0.0", "10.0.0", "11.0.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "dataset_info.json").touch()
    (tmp_path / "11.0.0" / "dataset_info.json").unlink()  # not prepared to the end
    assert _prepared._newest(tmp_path, "") == tmp_path / "10.0.0"
    assert _prepared._newest(tmp_path, "9.0.0") == tmp_path / "9.0.0"


def test_caches_alone_are_told_apart_by_size_and_version(tmp_path, offline):
    for folder, side in (("9.0.0", 16), ("10.0.0", 24), ("11.0.0-8", 8)):
        images = np.zeros((20, side, side, 3), np.uint8)
        split = base.Split(images, np.arange(20, dtype=np.int32) % 2)
        splits = base.Splits(split, split, 2, *base.moments(images + 1))
        _cache.write(tmp_path / "own" / f"{folder}.uint8", "own", folder, "", splits)

    def side(name="tfds:own", folder=tmp_path, **size):
        return data.load(name, str(folder), **size).train.images.shape[1]

    assert side() == 24
    assert side("tfds:own:9.0.0") == 16
    assert side(image_size=8) == 8
    assert side(folder=tmp_path / "own" / "9.0.0.uint8") == 16
    assert side(folder=tmp_path / "own" / "9.0.0.uint8", image_size=16) == 16
    for folder, size in ((tmp_path, 16), (tmp_path / "own" / "9.0.0.uint8", 24)):
        with pytest.raises((ValueError, FileNotFoundError)):  # TFDS knows no such set
            side(folder=folder, image_size=size)
    with pytest.raises((ValueError, FileNotFoundError)):
        side("tfds:another", tmp_path / "own" / "9.0.0.uint8")
    shutil.rmtree(tmp_path / "own" / "9.0.0.uint8")
    shutil.rmtree(tmp_path / "own" / "10.0.0.uint8")
    with pytest.raises((ValueError, FileNotFoundError)):
        side()


def test_cache_is_written_where_it_is_asked_for_though_none_can_be_beside_the_set(tiny, tmp_path, monkeypatch):
    write = _cache.write

    def refuse(cache, *arguments):
        if tmp_path / "target" not in cache.parents:
            raise PermissionError("read-only")
        write(cache, *arguments)

    monkeypatch.setattr(_cache, "write", refuse)
    copy = _prepared.copy_cache("tiny_imagenet", str(tiny), tmp_path / "target")
    assert copy == tmp_path / "target" / "tiny_imagenet" / "1.0.0.uint8"
    shutil.rmtree(tiny)
    check_tiny(data.load("tiny_imagenet", str(tmp_path / "target")))


def test_prepare_command(tmp_path):
    write_archive(tmp_path / "mine.zip", per_class=1)
    command = [sys.executable, "-m", "rkd_jax.data", "tiny_imagenet", "--data_dir", str(tmp_path / "tfds")]
    done = subprocess.run(
        [*command, "--archive", str(tmp_path / "mine.zip")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "tiny_imagenet train: 200 images of 64x64x3, 200 classes" in done.stdout, done.stderr
    (tmp_path / "mine.zip").write_bytes((tmp_path / "mine.zip").read_bytes()[:5000])
    command[5] = str(tmp_path / "other")
    done = subprocess.run(
        [*command, "--archive", str(tmp_path / "mine.zip")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "mine.zip is no complete zip archive" in done.stderr
    assert "Traceback" not in done.stderr


def test_archive_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"Error: --archive=.*mine.zip is no file"):
        prepare_command.main(["tiny_imagenet", "--data_dir", str(tmp_path), "--archive", str(tmp_path / "mine.zip")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_image_of_an_archive_that_cannot_be_read_is_named(tmp_path, damage):
    """The archive's directory is whole, so that opening it finds nothing."""
    path = tmp_path / "mine.zip"
    write_archive(path, per_class=1)
    name = "tiny-imagenet-200/val/images/val_77.JPEG"
    with zipfile.ZipFile(path) as archive:
        files = {each: archive.read(each) for each in archive.namelist() if (each, damage) != (name, "missing")}
        start = archive.getinfo(name).header_offset + 30 + len(name)
    if damage == "missing":
        with zipfile.ZipFile(path, "w") as archive:
            for each, content in files.items():
                archive.writestr(each, content)
    else:
        content = bytearray(path.read_bytes())
        content[start + 100] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine.zip: .*val_77.JPEG is damaged or missing \(.*\); fetch http.* again"):
        _prepared.prepare("tiny_imagenet", tmp_path / "tfds", archive=path)


def test_the_prepare_command_names_what_its_user_wrote(tmp_path, offline):
    for arguments, complaint in (
        (["cifar"], "Error: NAME='cifar' is no data set"),
        ([f"folder:{tmp_path}/none"], "Error: NAME='folder:.*none' is no folder"),
        (["cifar100", "--data_dir", str(tmp_path)], "Error: --data_dir='.*' holds no cifar100.* or set --data_dir to"),
        (["digits", "--cache", "x"], "Error: --cache is of what TFDS prepared, and digits needs none"),
        (["cifar100", "--archive", "x.zip"], "Error: --archive is for tiny_imagenet; cifar100 has no use for it"),
    ):
        with pytest.raises(SystemExit, match=complaint):
            prepare_command.main(arguments)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar100", "cifar-100-binary.tar.gz"),
        ("tiny_imagenet", "tiny-imagenet-200.zip"),
        ("tfds:mnist", "train-images-idx3-ubyte.gz"),
    ],
)
def test_absent_and_offline(name, file, tmp_path, offline):
    """One error, at once, that says which file goes where."""
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=f"Put .*{file} .*into {tmp_path}/downloads/manual and start again"):
        data.load(name, str(tmp_path))
    assert time.perf_counter() - started < 10
    assert not list(tmp_path.iterdir())


def test_tensorflow_lacking(tmp_path, offline, monkeypatch):
    """With its file in place, CIFAR-100 asks for what preparing it needs."""
    (tmp_path / "downloads" / "manual").mkdir(parents=True)
    (tmp_path / "downloads" / "manual" / "cifar-100-binary.tar.gz").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ModuleNotFoundError, match=r"preparing cifar100 needs TensorFlow, once; .*pip install"):
        data.load("cifar100", str(tmp_path))


def test_a_damaged_download(tmp_path, offline, monkeypatch):
    """A file put in place by hand must have TFDS's checksum; that is seen before TensorFlow has anything to do."""
    (tmp_path / "downloads" / "manual").mkdir(parents=True)
    (tmp_path / "downloads" / "manual" / "cifar-100-binary.tar.gz").write_bytes(b"half of it")
    monkeypatch.setattr(_prepared.importlib.util, "find_spec", lambda name: name == "tensorflow")
    with pytest.raises(ValueError, match=r"a file of cifar100 is damaged or incomplete; fetch it again: .*checksum"):
        data.load("cifar100", str(tmp_path))


def test_random_has_the_form_of_the_set():
    splits = data.random("cifar100", 200, 100)
    assert splits.train.images.shape == (200, 32, 32, 3)
    assert splits.test.labels.tolist() == list(range(100))
    assert splits.num_classes == 100
    assert (data.random("cifar100", 200, 100).test.images == splits.test.images).all()
    assert data.random("digits", 20, 10).train.images.shape == (20, 8, 8, 1)
    with pytest.raises(ValueError, match=r"config.image_size=16 is read by tfds: and folder: alone, not by 'cifar100'"):
        data.random("cifar100", 20, 10, image_size=16)


def test_cifar100_is_normalised_as_its_teachers_were(tmp_path):
    _prepared.write_cache("cifar100", tmp_path, data.random("cifar100", 20, 10))
    splits = data.load("cifar100", str(tmp_path))
    assert (splits.mean, splits.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def test_real_cifar100():
    if not (REAL / "tfds").exists():
        pytest.skip("no prepared CIFAR-100 at ../shared/data/tfds")
    splits = data.load("cifar100", str(REAL / "tfds"))
    assert splits.train.images.shape == (50_000, 32, 32, 3)
    assert np.bincount(splits.train.labels).tolist() == [500] * 100
    assert np.bincount(splits.test.labels).tolist() == [100] * 100
    mean, std = base.moments(splits.train.images)
    np.testing.assert_allclose(mean, (0.50708, 0.48655, 0.44092), atol=1e-5)
    np.testing.assert_allclose(mean, splits.mean, atol=2e-4)
    assert splits.class_names[:2] == ("apple", "aquarium_fish")  # not those of the 20 coarse classes
    np.testing.assert_allclose(std, splits.std, atol=2e-4)
    started = time.perf_counter()
    data.load("cifar100", str(REAL / "tfds"))
    assert time.perf_counter() - started < 1


def test_real_tiny_imagenet():
    """What the builder reads from the archive, before TFDS writes it: counts, and labels as annotated."""
    archive = REAL / "tiny-imagenet-200-subset.zip"
    if not archive.exists():
        pytest.skip("no ../shared/data/tiny-imagenet-200-subset.zip")
    with _prepared._tensorflow_free("this test"):
        from rkd_jax.data._tiny_imagenet_builder import TinyImagenet

        builder = TinyImagenet(data_dir="unused", file_format="array_record")
        builder.archive = str(archive)
        splits = builder._split_generators(None)
        validation = dict(splits["validation"])
        train = [example["label"] for _, example in splits["train"]]
    names = builder.info.features["label"].names
    assert names == sorted(names)
    assert len(validation) == 10_000
    assert set(np.unique([example["label"] for example in validation.values()], return_counts=True)[1]) == {50}
    assert len(train) == 20_000
    assert set(np.unique(train, return_counts=True)[1]) == {100}
    with zipfile.ZipFile(archive) as file:
        lines = file.read("tiny-imagenet-200/val/val_annotations.txt").decode().splitlines()
    for line in lines[::1000]:
        name, wnid = line.split("\t")[:2]
        assert validation[name]["label"] == wnid
    assert {Image.open(example["image"]).mode for example in validation.values()} == {"RGB"}


# Any set of TFDS, and folders.


def test_class_names_are_the_labels(tmp_path):
    def named(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.labels.txt").write_text(text)
        return _prepared._class_names(tmp_path, 2)

    assert named() == ()
    assert named(kind="a b\x85c\nd\n") == ("a b\x85c", "d")
    assert named(coarse="x\ny\n") == ()  # which of the two is not said
    assert named(label="e\nf\n") == ("e", "f")
    assert named(label="e\nf\ng\n") == ()


def test_tfds_without_a_training_split_is_named(tmp_path):
    def features(f):
        return f.FeaturesDict({"image": f.Image(shape=(8, 8, 1)), "label": f.ClassLabel(num_classes=2)})

    examples = [{"image": io.BytesIO(encode(np.zeros((8, 8), np.uint8))), "label": 0}]
    tfds_set(tmp_path, "TestSet", features, {"test": examples})
    with pytest.raises(ValueError, match=r"config.dataset='tfds:test_set' has no split 'train', only test"):
        data.load("tfds:test_set", str(tmp_path))


def tfds_set(root, name, features, splits):
    """Prepares a set of TFDS of the given features and examples."""
    with _prepared._tensorflow_free("this test") as tfds:
        body = {
            "VERSION": tfds.core.Version("1.0.0"),
            "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=features(tfds.features)),
            "_split_generators": lambda self, manager: {key: iter(enumerate(value)) for key, value in splits.items()},
            "_generate_examples": lambda self: None,
        }
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), {**body, "__module__": __name__})
        builder(data_dir=root, file_format="array_record").download_and_prepare()


def test_tfds_grey_without_test_split(tmp_path):
    def features(f):
        return f.FeaturesDict({"picture": f.Image(shape=(28, 28, 1)), "kind": f.ClassLabel(num_classes=3)})

    examples = [
        {"picture": io.BytesIO(encode(np.full((28, 28), i, np.uint8))), "kind": i % 3} for i in range(90)
    ]  # the level tells the class
    tfds_set(tmp_path, "GreySet", features, {"train": examples})
    splits = data.load("tfds:grey_set", str(tmp_path))
    assert splits.train.images.shape == (81, 28, 28, 1)
    assert np.bincount(splits.test.labels).tolist() == [3, 3, 3]
    assert (splits.test.images[:, 0, 0, 0] % 3 == splits.test.labels).all()
    assert (splits.num_classes, splits.class_names) == (3, ())
    resized = data.load("tfds:grey_set", str(tmp_path), image_size=16)
    assert resized.train.images.shape == (81, 16, 16, 1)
    assert data.load("tfds:grey_set", str(tmp_path)).train.images.shape == (81, 28, 28, 1)  # caches stay apart


def test_tfds_test_split_precedes_validation_and_the_statistics_are_those_of_training(tmp_path):
    def features(f):
        return f.FeaturesDict({"image": f.Image(shape=(8, 8, 1)), "label": f.ClassLabel(num_classes=2)})

    def examples(level, count):
        return [{"image": io.BytesIO(encode(np.full((8, 8), level, np.uint8))), "label": i % 2} for i in range(count)]

    levels = {"train": examples(10, 4), "validation": examples(100, 3), "test": examples(200, 2)}
    tfds_set(tmp_path, "ThreeSplits", features, levels)
    splits = data.load("tfds:three_splits", str(tmp_path))
    assert (splits.test.images == 200).all()
    assert splits.mean == base.moments(splits.train.images)[0]


def test_tfds_of_unequal_sizes_and_secret_labels(tmp_path):
    def features(f):
        return f.FeaturesDict({"image": f.Image(shape=(None, None, 3)), "label": f.ClassLabel(num_classes=2)})

    def examples(count, label=None):
        for i in range(count):
            pixels = np.full((20 + i, 30, 3), 100 * (i % 2), np.uint8)
            yield {"image": io.BytesIO(encode(pixels)), "label": i % 2 if label is None else label}

    tfds_set(
        tmp_path, "UnequalSet", features, {"train": examples(6), "validation": examples(4), "test": examples(5, -1)}
    )
    splits = data.load("tfds:unequal_set", str(tmp_path))
    assert splits.train.images.shape == (6, 64, 64, 3)
    assert splits.test.labels.shape == (4,)
    assert (splits.train.images[:, 0, 0, 0] == 100 * splits.train.labels).all()


def test_tfds_of_something_else(tmp_path):
    tfds_set(tmp_path, "TextSet", lambda f: f.FeaturesDict({"text": f.Text()}), {"train": [{"text": "word"}]})
    with pytest.raises(ValueError, match="'tfds:text_set' is not one image and one class an example"):
        data.load("tfds:text_set", str(tmp_path))


def write_folder(root, counts, size=(10, 12)):
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((*size, 3), 50 * label, np.uint8)).save(root / name / f"{i:02d}.png")


def test_folder_with_splits(tmp_path):
    write_folder(tmp_path / "train", {"ape": 3, "bee": 2})
    write_folder(tmp_path / "val", {"ape": 1, "bee": 2})
    splits = data.load(f"folder:{tmp_path}")
    assert splits.train.images.shape == (5, 10, 12, 3)
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert splits.test.labels.tolist() == [0, 1, 1]
    assert (splits.mean, splits.std) == base.moments(splits.train.images)
    assert (splits.test.images[:, 0, 0, 0] == 50 * splits.test.labels).all()
    assert data.load(f"folder:{tmp_path}", image_size=8).test.images.shape == (3, 8, 8, 3)
    (tmp_path / "val" / "cat").mkdir()
    with pytest.raises(ValueError, match="val has the classes cat, which are not among those of training"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "train" / "cat").mkdir()
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(
        ValueError, match="val lacks the classes dog of training; a class without images here is an emp"
    ):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "val" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "photo.HEIC").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train has no image of cat, dog to train on; add some"):
        data.load(f"folder:{tmp_path}")
    for name in ("cat", "dog"):
        Image.new("RGB", (12, 10)).save(tmp_path / "train" / name / "0.jfif", format="jpeg")
    assert data.load(f"folder:{tmp_path}").num_classes == 4


@pytest.mark.parametrize("parts", [("test", "val"), ("Training", "Testing"), ("test", "val", "unlabeled", "__MACOSX")])
def test_parts_of_a_set_are_not_classes(tmp_path, parts):
    for part in parts:
        write_folder(tmp_path / part, {"ape": 10, "bee": 10})
    with pytest.raises(ValueError, match=r"and [Tv].* look like parts of a set, not like classes; name them"):
        data.load(f"folder:{tmp_path}")


@pytest.fixture
def decodes(monkeypatch):
    """Loads an image folder: the data set, and how many images were decoded for it."""
    read = unittest.mock.Mock(wraps=_folder._read)
    monkeypatch.setattr(_folder, "_read", read)

    def load(path, **size):
        read.reset_mock()
        splits = data.load(f"folder:{path}", **size)
        assert isinstance(splits.test.images, np.memmap)
        return splits, read.call_count

    return load


def test_decoded_folder_is_kept(tmp_path, decodes, caplog, monkeypatch):
    images = tmp_path / "set"
    write_folder(images / "train", {"ape": 20, "bee": 10})
    write_folder(images / "test", {"ape": 2, "bee": 1})
    first, count = decodes(images)
    assert count == 33
    second, count = decodes(images)
    assert count == 0
    for split in range(2):
        for there, here in zip(first[split], second[split], strict=True):
            np.testing.assert_array_equal(here, there)
    assert second[2:] == first[2:]
    assert decodes(images, image_size=5)[0].train.images.shape == (30, 5, 5, 3)
    assert [decodes(images, image_size=5)[1], decodes(images)[1]] == [0, 0]  # neither takes the other's place
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.5.uint8", ".set.own.uint8", "set"]
    assert (tmp_path / ".set.own.uint8").stat().st_mode & 0o777 == 0o700  # as private as images may be
    for name in ("set-5", "set.5"):  # other folders, though their images are the same
        shutil.copytree(images, tmp_path / name)
        assert decodes(tmp_path / name)[0].train.images.shape == (30, 10, 12, 3)
    assert [decodes(images, image_size=5)[1], decodes(images)[1]] == [0, 0]
    shutil.rmtree(images / "train")  # what is left is tested on alone
    assert [decodes(images)[1], decodes(images)[1]] == [3, 0]
    assert "damaged" not in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    tmp_path.chmod(0o555)  # nothing can be kept beside it
    try:
        assert [decodes(images, image_size=4)[1], decodes(images, image_size=4)[1]] == [3, 0]
    finally:
        tmp_path.chmod(0o755)


def test_process_that_was_slower_leaves_the_decoded_copy_of_another(tmp_path):
    def copy(fingerprint, splits):
        _cache.write(tmp_path / "copy", "own", "", fingerprint, splits)
        return (tmp_path / "copy" / "train_images.npy").stat().st_ino

    splits = data.random("cifar100", 8, 4)
    first = copy("a", splits)
    assert copy("a", splits) == first
    assert copy("b", splits) != first  # of another preparation
    assert copy("", splits) != copy("", data.random("cifar100", 9, 4))  # of arrays that nothing is known of
    copy("b", splits)
    (tmp_path / "copy" / "test_labels.npy").write_bytes(b"cut short")
    copy("b", splits)
    assert _cache.read(tmp_path / "copy", "own", "b") is not None


def test_nowhere_to_keep_a_decoded_folder_is_said(tmp_path, monkeypatch, caplog):
    def write(folder, *arguments):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(_cache, "write", write)
    write_folder(tmp_path / "set", {"ape": 20, "bee": 10})
    assert len(data.load(f"folder:{tmp_path / 'set'}").train.labels) == 27
    assert "No decoded copy can be kept, and the next start decodes again (" in caplog.text
    assert caplog.text.count("No space left on device") == 2


def test_changed_folder_is_decoded_anew(tmp_path, decodes, monkeypatch):
    images = tmp_path / "set"
    write_folder(images, {"ape": 20, "bee": 10})
    assert [decodes(images)[1], decodes(images)[1]] == [30, 0]
    image = images / "bee" / "09.png"
    size = image.stat().st_size
    Image.fromarray(np.full((10, 12, 3), 51, np.uint8)).save(image)
    assert image.stat().st_size == size
    splits, count = decodes(images)
    assert (count, splits.test.images[-1].max()) == (30, 51)
    assert decodes(images)[1] == 0
    image.rename(images / "ape" / "bee.png")
    splits, count = decodes(images)
    assert (count, np.bincount(splits.train.labels).tolist()) == (30, [19, 9])
    (images / "ape" / "bee.png").unlink()
    assert decodes(images)[1] == 29
    (images / "bee" / "link.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"link.png cannot be read"):
        decodes(images)
    (images / "bee" / "link.png").unlink()
    assert decodes(images)[1] == 0
    (images / "bee").rename(images / "cat")
    splits, count = decodes(images)
    assert (count, splits.class_names) == (29, ("ape", "cat"))
    (tmp_path / "tests").mkdir()
    images.rename(tmp_path / "tests" / "test")
    assert decodes(tmp_path / "tests")[0].class_names == ("ape", "cat")
    (tmp_path / "tests" / "test" / "dog").mkdir()  # of no images, but a class
    assert decodes(tmp_path / "tests")[0].num_classes == 3
    images = tmp_path / "tests"
    monkeypatch.setattr(_folder.PIL, "__version__", "another")
    assert decodes(images)[1] == 29


def test_folder_whose_test_images_have_another_name(tmp_path):
    write_folder(tmp_path / "train", {"ape": 3, "bee": 2})
    write_folder(tmp_path / "validation", {"ape": 1, "bee": 2})
    assert len(data.load(f"folder:{tmp_path}").test.labels) == 3
    (tmp_path / "validation").rename(tmp_path / "dev")
    with pytest.raises(ValueError, match=r"train holds folders, and there is no test/ beside it \(nor val/, "):
        data.load(f"folder:{tmp_path}")


def test_folder_to_test_on(tmp_path, caplog):
    write_folder(tmp_path / "test", {"ape": 3, "bee": 2})
    splits = data.load(f"folder:{tmp_path}")
    assert (len(splits.train.labels), len(splits.test.labels), splits.class_names) == (0, 5, ("ape", "bee"))
    assert splits.mean == base.moments(splits.test.images)[0]
    assert len(data.random(f"folder:{tmp_path}", 8, 4).test.labels) == 4
    write_folder(tmp_path, {"cat": 20})  # beside classes, it is one
    assert "held out" not in caplog.text
    assert data.load(f"folder:{tmp_path}").class_names == ("cat", "test")
    assert f"{tmp_path} test/ is a class, with no train/ beside it: every tenth image of each class is" in caplog.text
    write_folder(tmp_path / "more" / "test", {"ape": 10, "bee": 10})
    data.load(f"folder:{tmp_path}/more/test")
    assert f"held out to test on (to test on all of them: folder:{tmp_path}/more)" in caplog.text
    assert len(data.load(f"folder:{tmp_path}/more").test.labels) == 20


def test_folder_without_splits(tmp_path, caplog):
    write_folder(tmp_path, {"ape": 20, "bee": 10})
    Image.new("RGB", (30, 30), (50, 50, 50)).save(tmp_path / "bee" / "odd.JPG")
    splits = data.load(f"folder:{tmp_path}")
    data.load(f"folder:{tmp_path}", image_size=8)
    assert caplog.text.count(f"{tmp_path} has no test/: every tenth image of each class is held out to test on\n") == 1
    assert splits.train.images.shape == (28, 64, 64, 3)
    assert splits.test.labels.tolist() == [0, 0, 1]
    assert (splits.train.images[:, 0, 0, 0] == 50 * splits.train.labels).all()


def test_grey_images_with_alpha_are_grey(tmp_path):
    write_folder(tmp_path, {"ape": 10, "bee": 10})
    for path in tmp_path.rglob("*.*"):
        Image.new("LA", (9, 9), (7, 128)).save(path.with_suffix(".png"))
        if path.suffix != ".png":
            path.unlink()
    images = data.load(f"folder:{tmp_path}").train.images
    assert images.shape == (18, 9, 9, 1)
    assert (images == 7).all()
    Image.new("RGB", (9, 9)).save(tmp_path / "bee" / "00.png")  # one in colour, and all are
    assert data.load(f"folder:{tmp_path}").train.images.shape == (18, 9, 9, 3)


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder; it should hold one sub-folder a class"):
        data.load(f"folder:{tmp_path}/absent")
    with pytest.raises(ValueError, match=r"config\.dataset='tfds:' names no set; write tfds:NAME"):
        data.load("tfds:")
    with pytest.raises(FileNotFoundError, match=r"config\.dataset='folder:' is no folder"):
        data.load("folder:")
    with pytest.raises(ValueError, match="holds 0 images in 0 sub-folders"):
        data.load(f"folder:{tmp_path}")
    write_folder(tmp_path, {"ape": 2, "bee": 2})
    with pytest.raises(ValueError, match=f"config.dataset='folder:{tmp_path}': no class has 10 images"):
        data.load(f"folder:{tmp_path}")
    Image.fromarray(np.full((10, 12), 60000, np.uint16)).save(tmp_path / "bee" / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png has more than 8 bits a pixel \(PIL's mode I.*\); convert it to 8"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "bee" / "deep.png").unlink()
    (tmp_path / "bee" / "text.png").write_text("words")
    with pytest.raises(ValueError, match=r"text.png is no image that PIL reads"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "bee" / "text.png").unlink()
    (tmp_path / "bee" / "none.png").symlink_to("absent")
    with pytest.raises(ValueError, match=r"none.png cannot be read: .*; remove it or replace it"):
        data.load(f"folder:{tmp_path}")


def test_all_images_that_cannot_be_read_are_named(tmp_path):
    write_folder(tmp_path, {"ape": 30, "bee": 10})
    whole = (tmp_path / "bee" / "00.png").read_bytes()
    for name in ("1", "2"):
        (tmp_path / "bee" / f"cut{name}.png").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"cut1.png is damaged: .*\n.*cut2.png is damaged: "):
        data.load(f"folder:{tmp_path}")
    write_folder(tmp_path / "parts" / "train", {"ape": 2, "bee": 2})
    write_folder(tmp_path / "parts" / "test", {"ape": 2, "bee": 2})
    for part in ("train", "test"):
        (tmp_path / "parts" / part / "bee" / "00.png").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"train/bee/00.png is damaged: .*\n.*test/bee/00.png is damaged: "):
        data.load(f"folder:{tmp_path / 'parts'}")
    shutil.rmtree(tmp_path / "parts")
    for file in (tmp_path / "ape").iterdir():
        file.write_text("words")
    with pytest.raises(ValueError, match=r"^.*ape/00.png is no image.*\n(.*\n){18}.*19.png.*\nand 10 other files$"):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_image_that_is_cut_short_is_named(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"whole.{kind}")
    whole = (tmp_path / f"whole.{kind}").read_bytes()
    write_folder(tmp_path / "set", {"ape": 10, "bee": 10})
    for length in (0, 10, 30, 100, len(whole) // 2):
        (tmp_path / "set" / "bee" / f"cut.{kind}").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"bee/cut.{kind} (is|cannot be read)"):
            data.load(f"folder:{tmp_path}/set")


def test_photos_are_upright_and_hidden_files_passed_over(tmp_path, caplog):
    write_folder(tmp_path, {"ape": 10, "bee": 10}, size=(12, 12))
    wide = np.zeros((6, 12, 3), np.uint8)
    wide[:, :6] = 255  # as the sensor has it: the left half is bright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned to the right to be seen
    Image.fromarray(wide).save(tmp_path / "bee" / "z.jpg", exif=exif, quality=100)
    (tmp_path / "bee" / "._z.jpg").write_bytes(b"of a file manager")
    (tmp_path / "bee" / "notes.txt").write_text("mine")
    splits = data.load(f"folder:{tmp_path}", image_size=12)
    photo = splits.train.images[-1]
    assert photo[:5].min() > 250
    assert photo[-5:].max() < 5
    assert "files of other suffixes than .avif, .bmp" in caplog.text
    assert caplog.text.endswith("are passed over: 1 .txt\n")


@pytest.mark.parametrize(("kind", "orientation"), [(2, "6"), (7, b"6\0")])  # EXIF's types of text and of bytes
def test_an_orientation_that_is_no_number_is_none(tmp_path, kind, orientation):
    write_folder(tmp_path, {"ape": 10, "bee": 10}, size=(12, 12))
    entry = struct.pack("<HHHI4sI", 1, ExifTags.Base.Orientation, kind, 2, b"6", 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entry
    Image.fromarray(np.zeros((6, 12, 3), np.uint8)).save(tmp_path / "bee" / "z.jpg", exif=exif)
    with Image.open(tmp_path / "bee" / "z.jpg") as image:
        assert image.getexif()[ExifTags.Base.Orientation] == orientation
    assert data.load(f"folder:{tmp_path}", image_size=12).train.images.shape[1:] == (12, 12, 3)
