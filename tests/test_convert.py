"""PyTorch files read and written: every layout, both formats, and what is wrong with the bad ones."""

import collections
import hashlib
import json
import pickle
import struct
import tarfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SLOW

from rkd_jax import checkpoint, convert, data, evaluate, experiment, models, torch_file
from rkd_jax.data import cifar100

torch = pytest.importorskip("torch")
import safetensors.torch  # noqa: E402
import torch_networks  # noqa: E402

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def state_dict(name="resnet8", num_classes=10, seed=0):
    torch.manual_seed(seed)
    return torch_networks.create(name, num_classes).state_dict()


def save(tree, path, zipped=True):
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    return path


def prefixed(state, prefix):
    return collections.OrderedDict((f"{prefix}{key}", value) for key, value in state.items())


def assert_holds(variables, state, name="resnet8", num_classes=10):
    """The variables are the state dict's, to the bit."""
    ours = convert.to_torch(variables, name, num_classes)
    assert {key for key in state if "num_batches" not in key} == {key for key in ours if "num_batches" not in key}
    for key, array in ours.items():
        if "num_batches" not in key:
            np.testing.assert_array_equal(array, state[key].numpy(), err_msg=key)


FAMILIES = ("resnet8x4", "wrn_16_2", "vgg13", "MobileNetV2", "ShuffleV1", "ShuffleV2")


@pytest.mark.parametrize("name", [name if name in FAMILIES else SLOW(name) for name in models.names()])
def test_round_trip_is_exact_and_strict(name):
    """Flax -> PyTorch, loaded with strict=True, -> Flax, for every network."""
    model = models.create(name, 10)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    with torch.device("meta"):  # the reference's keys and shapes, without its values
        network = torch_networks.create(name, 10)
    tensors = {key: torch.from_numpy(array) for key, array in convert.to_torch(variables, name, 10).items()}
    network.load_state_dict(tensors, strict=True, assign=True)
    again = convert.from_torch(network.state_dict(), name, 10)
    jax.tree.map(np.testing.assert_array_equal, variables, again)


@FORMATS
@pytest.mark.parametrize(
    "layout",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"epoch": 240, "model": state, "accuracy": torch.tensor(72.5), "optimizer": {"state": {0: {}}}},
        lambda state: {"epoch": 240, "model": state, "best_acc": np.float64(72.5)},
        lambda state: prefixed(state, "module."),
        lambda state: {"model": prefixed(state, "module.student.")},
        lambda state: {"model": prefixed(state, "module.teacher.")},
        lambda state: {
            "model": prefixed(state, "module.student.") | prefixed(state_dict("resnet14"), "module.teacher.")
        },
        lambda state: collections.OrderedDict(
            (key, value) for key, value in state.items() if "num_batches_tracked" not in key
        ),
        lambda state: {key: torch.nn.Parameter(value) for key, value in state.items() if "num" not in key},
    ],
    ids=(
        "bare",
        "model",
        "teacher",
        "numpy",
        "module",
        "student-only",
        "teacher-only",
        "student-and-teacher",
        "uncounted",
        "parameters",
    ),
)
def test_reads_every_layout(tmp_path, layout, zipped):
    state = state_dict()
    path = save(layout(state), tmp_path / "network.pth", zipped)
    assert_holds(convert.from_torch(path, "resnet8", 10), state)


def test_reads_an_optimizers_checkpoint(tmp_path):
    network = torch_networks.create("resnet8", 10)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    network(torch.zeros(2, 3, 4, 4))[0].sum().backward()
    optimizer.step()
    tree = {"epoch": 1, "model": network.state_dict(), "optimizer": optimizer.state_dict()}
    path = save(tree, tmp_path / "last.pth")
    assert_holds(convert.from_torch(path, "resnet8", 10), network.state_dict())


@FORMATS
def test_reads_every_kind_of_tensor(tmp_path, zipped):
    kinds = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    tree = {kind: torch.arange(6).reshape(2, 3).to(getattr(torch, kind)) for kind in kinds}
    base = torch.arange(24.0).reshape(4, 6)
    tree |= {"transposed": base.t(), "row": base[2], "strided": base[::2, 1::2], "scalar": base[1, 1]}
    tree |= {"empty": torch.zeros(0, 3), "nested": [{"a": base}, (1, "b", None)]}
    found = torch_file.load(save(tree, tmp_path / "x.pt", zipped))
    for kind in kinds:
        assert found[kind].dtype == kind
        np.testing.assert_array_equal(found[kind].astype(np.float32), tree[kind].float().numpy())
    for key in ("transposed", "row", "strided", "scalar", "empty"):
        np.testing.assert_array_equal(found[key], tree[key].numpy())
        assert found[key].shape == tuple(tree[key].shape)
    np.testing.assert_array_equal(found["nested"][0]["a"], base.numpy())
    assert found["nested"][1] == (1, "b", None)


def test_reads_what_old_versions_wrote_as_pytorch_does(tmp_path):
    """A part of a storage, of PyTorch before 0.4; and names in UTF-8, of Python 2."""

    class OfAPart(pickle.Pickler):
        def persistent_id(self, thing):
            part = ("a part's key", 2, 5)
            kept = isinstance(thing, torch.storage.TypedStorage)
            return ("storage", torch.FloatStorage, "0", "cpu", 10, part) if kept else None

    with (tmp_path / "x.pth").open("wb") as file:
        for head in (torch_file._LEGACY_MAGIC, 1001, {"little_endian": True}):
            pickle.dump(head, file, protocol=2)
        OfAPart(file, protocol=2).dump({"w": torch.zeros(5)})
        pickle.dump(["0"], file, protocol=2)
        file.write(struct.pack("<q", 10) + np.arange(10, dtype=np.float32).tobytes())
    expected = torch.load(tmp_path / "x.pth")["w"]
    np.testing.assert_array_equal(torch_file.load(tmp_path / "x.pth")["w"], expected)
    np.testing.assert_array_equal(expected, [2, 3, 4, 5, 6])
    assert torch_file.load(forged(tmp_path / "y.pth", b"}U\x02\xc3\xa9K\x01s")) == {"é": 1}


def test_reads_and_writes_grey_and_half_precision(tmp_path):
    state = state_dict()
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    halved = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    variables = convert.from_torch(save(halved, tmp_path / "half.pth"), "resnet8", 10)
    assert variables["params"]["conv1"]["kernel"].shape == (3, 3, 1, 16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert_holds(variables, {key: value.float() for key, value in halved.items()})


def test_safetensors_in_and_out(tmp_path):
    state = state_dict()
    safetensors.torch.save_file(state, tmp_path / "in.safetensors")
    variables = convert.from_torch(tmp_path / "in.safetensors", "resnet8", 10)
    assert_holds(variables, state)
    checkpoint.save_network(
        tmp_path / "folder", variables, {"network": "resnet8", "num_classes": 10, "mean": [0], "std": [1]}
    )
    convert.main(["--checkpoint", str(tmp_path / "folder"), "--output", str(tmp_path / "out.safetensors")])
    torch_networks.create("resnet8", 10).load_state_dict(
        safetensors.torch.load_file(tmp_path / "out.safetensors"), strict=True
    )


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_file_of_our_own_names_its_network_and_normalisation(tmp_path, capsys, suffix):
    variables = convert.from_torch(state_dict("resnet14", 7), "resnet14", 7)
    facts = {"dataset": "folder:mine", "image_size": 48, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    facts["class_names"] = ["größe", *"abcdef"]
    checkpoint.save_network(tmp_path / "a", variables, {"network": "resnet14", "num_classes": 7, **facts})
    path = tmp_path / f"x.{suffix}"
    command(capsys, "--checkpoint", tmp_path / "a", "--output", path)
    out = command(capsys, "--checkpoint", path, "--output", tmp_path / "b")
    assert "normalisation (the file's): mean [0.1, 0.2, 0.3], std [0.4, 0.5, 0.6]" in out
    again, metadata = checkpoint.load_network(tmp_path / "b", "resnet14", 7)
    assert {key: metadata[key] for key in facts} == facts
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    command(capsys, "--checkpoint", path, "--dataset", "cifar100", "--output", tmp_path / "c")
    assert checkpoint.read_metadata(tmp_path / "c")["mean"] == list(cifar100.MEAN)


FLAWED = (
    {"network": "os:abort", "mean": [0], "std": [1]},
    {"mean": [0.5] * 3, "std": [0.0] * 3},
    {"mean": [float("nan")] * 3, "std": [0.2] * 3},
    {"mean": [0.5] * 3, "std": [0.2] * 3, "image_size": "abc"},
    {"mean": [0.5] * 3, "std": [0.2] * 3, "class_names": "a" * 100},
)


@pytest.mark.parametrize(
    "note", ["", "{", "3", "[" * 100_000, '{"network": "resnet8"}', torch.zeros(2), *map(json.dumps, FLAWED)], ids=repr
)
def test_note_that_says_nothing_is_no_harm(tmp_path, capsys, note):
    path = save({"model": state_dict("resnet8", 100), "rkd_jax": note}, tmp_path / "x.pth")
    out = command(capsys, "--model", "resnet8", "--checkpoint", path, "--output", tmp_path / "a")
    assert "normalisation (cifar100)" in out


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_file_that_cannot_be_written_leaves_the_one_of_before(tmp_path, capsys, monkeypatch, suffix):
    variables = convert.from_torch(state_dict(), "resnet8", 10)
    metadata = {"network": "resnet8", "num_classes": 10, "mean": [0.5] * 3, "std": [0.2] * 3}
    path = tmp_path / f"x.{suffix}"
    convert.save(path, variables, "resnet8", metadata)
    before = path.read_bytes()
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode

    def full(self, *args):
        with self.open("wb") as file:
            file.write(before[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.torch_file, "save", lambda path, *args, **notes: full(path))
    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        convert.save(path, variables, "resnet8", metadata)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"plain", path.name}


def test_what_a_file_does_not_say_is_said(tmp_path, capsys):
    path = save(state_dict("resnet8", 7), tmp_path / "x.pth")
    flags = ["--model", "resnet8", "--checkpoint", path, "--mean", *["0.5"] * 3, "--std", *["0.2"] * 3]
    unknown = "the size of its images is not known; --image_size records it"
    assert unknown in command(capsys, *flags, "--output", tmp_path / "a")
    assert unknown not in command(capsys, *flags, "--image_size", "48", "--output", tmp_path / "b")
    path = save([1, 2, 3], tmp_path / "list.pth")
    message = "list.pth' holds no tensors by name; name a file of a network's state dict"
    assert message in refusal(capsys, "--model", "resnet8", "--checkpoint", path, "--output", tmp_path / "c")


def test_file_of_one_tensor_or_of_numbers_that_numpy_lacks_is_named(tmp_path, capsys):
    path = save(torch.zeros(2, 3), tmp_path / "tensor.pth")
    assert "tensor.pth" in refusal(capsys, "--model", "resnet8", "--checkpoint", path, "--output", tmp_path / "a")
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "eight.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"00")
    with pytest.raises(
        ValueError, match=r"eight.safetensors' has arrays of a kind that NumPy lacks .*; save them as fl"
    ):
        convert.from_torch(path, "resnet8", 10)


def test_reads_a_bfloat16_state_dict_in_memory():
    state = {key: x.bfloat16() if x.is_floating_point() else x for key, x in state_dict().items()}
    assert_holds(convert.from_torch(state, "resnet8", 10), {key: x.float() for key, x in state.items()})


def test_note_names_no_code(tmp_path, capsys):
    note = {"network": "os:abort", "mean": [0.5] * 3, "std": [0.2] * 3}
    path = save({"model": state_dict("resnet8", 100), "rkd_jax": json.dumps(note)}, tmp_path / "x.pth")
    assert "--model is missing" in refusal(capsys, "--checkpoint", path, "--output", tmp_path / "a")
    out = command(capsys, "--model", "resnet8", "--checkpoint", path, "--output", tmp_path / "a")
    assert "normalisation (the file's): mean [0.5, 0.5, 0.5]" in out


class Evil:
    """Creates a file when unpickled in the usual way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@FORMATS
def test_runs_nothing_that_a_file_says(tmp_path, zipped):
    path = save({"model": state_dict(), "extra": Evil(tmp_path / "proof")}, tmp_path / "evil.pth", zipped)
    with pytest.raises(ValueError, match=r"asks for .*io\.open.* was not run. In PyTorch, save weights alone"):
        convert.from_torch(path, "resnet8", 10)
    assert not (tmp_path / "proof").exists()


def test_refuses_a_pickled_model(tmp_path):
    path = save(torch_networks.create("resnet8", 10), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"asks for torch_networks.ResNet.*torch.save\(model.state_dict\(\), path\)"):
        convert.from_torch(path, "resnet8", 10)


def forged(path, program, compression=zipfile.ZIP_STORED):
    """A file of the new format with a pickle of our own making, and one storage of four numbers."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    return path


def forged_tensor(offset, size, stride, count=4):
    plain, name, row = torch_file._plain, torch_file._global, torch_file._tuple
    storage = row(plain("storage"), name("torch", "FloatStorage"), plain("0"), plain("cpu"), plain(count))
    arguments = row(storage + pickle.BINPERSID, plain(offset), row(plain(size)), row(plain(stride)))
    return name("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def test_reads_a_forged_tensor_that_is_sound(tmp_path):
    """So that the next tests show what they say."""
    np.testing.assert_array_equal(torch_file.load(forged(tmp_path / "x.pth", forged_tensor(1, 3, 1))), [1, 2, 3])


def test_a_shape_does_not_grow_after_its_check(tmp_path):
    """The shape is a list in the pickle's memo, and longer by the time that the tensor is read."""
    plain, name, row = torch_file._plain, torch_file._global, torch_file._tuple
    storage = row(plain("storage"), name("torch", "FloatStorage"), plain("0"), plain("cpu"), plain(4))
    shape, strides = b"(" + plain(4) + b"lq\x01", b"(" + plain(1) + b"lq\x02"
    tensor = name("torch._utils", "_rebuild_tensor_v2") + row(storage + b"Q", plain(0), shape, strides) + b"R"
    grown = b"(" + tensor + b"h\x01" + plain(1000) + b"ah\x02" + plain(1) + b"at"
    found = torch_file.load(forged(tmp_path / "x.pth", grown))
    np.testing.assert_array_equal(found[0], np.arange(4))
    assert found[1:] == ([4, 1000], [1, 1])


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (forged_tensor(0, 5, 1), "a tensor of shape"),
        (forged_tensor(4, 1, 1), "a tensor of shape"),
        (forged_tensor(0, 3, 2), "a tensor of shape"),
        (forged_tensor(-1, 2, 1), "a tensor of shape"),
        (forged_tensor(3, 2, -1), "a tensor of shape"),
        (forged_tensor(0, 2**30, 0), "a tensor of shape"),
        (forged_tensor(0, 3, 1, count=5), "storage 0 has 4 numbers in place of 5"),
        (forged_tensor(0, 4, 1) + b"}b", "sets the state of a Tensor"),
        (torch_file._global("torch._utils", "_Tensor"), "asks for torch._utils._Tensor"),
        (torch_file._global("torch._utils", "_rebuild_tensor_v2") + b"}b", "sets the state of a Maker"),
        (torch_file._global("builtins", "eval"), "asks for builtins.eval"),
        (torch_file._global("torch._utils", "_rebuild_tensor_v2.__globals__"), "asks for .*__globals__"),
        (torch_file._global("numpy", "load"), "asks for numpy.load"),
        (torch_file._plain("a") * 3 + b"R", "is damaged"),
    ],
)
def test_refuses_a_forged_pickle(tmp_path, program, complaint):
    with pytest.raises(ValueError, match=complaint):
        torch_file.load(forged(tmp_path / "x.pth", program))


def test_refuses_other_zip_files(tmp_path):
    with pytest.raises(ValueError, match="is a compressed zip file"):
        torch_file.load(forged(tmp_path / "x.pth", b"}", zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(forged(tmp_path / "big.pth", forged_tensor(0, 4, 1)), "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(ValueError, match="was written on a big-endian machine"):
        torch_file.load(tmp_path / "big.pth")
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(ValueError, match="but not one of torch"):
        torch_file.load(tmp_path / "y.zip")


@FORMATS
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_refuses_an_archive_of_teachers(tmp_path, zipped, mode):
    save({"model": state_dict()}, tmp_path / "ckpt_epoch_240.pth", zipped)
    with tarfile.open(tmp_path / "teachers.tar", mode) as archive:
        archive.add(tmp_path / "ckpt_epoch_240.pth", "teachers/resnet8_vanilla/ckpt_epoch_240.pth")
    with pytest.raises(ValueError, match=r"is a tar archive; .* name a file of it: teachers/resnet8_vanilla/ckpt"):
        torch_file.load(tmp_path / "teachers.tar")
    (tmp_path / "zeros.pth").write_bytes(bytes(10240))
    with pytest.raises(ValueError, match=r"zeros.pth' is damaged"):
        torch_file.load(tmp_path / "zeros.pth")


@FORMATS
def test_refuses_a_file_cut_short(tmp_path, zipped):
    whole = save({"model": state_dict()}, tmp_path / "whole.pth", zipped).read_bytes()
    for part in (0, 1, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        (tmp_path / "part.pth").write_bytes(whole[:part])
        with pytest.raises(ValueError, match=r"part.pth' .*(damaged|cut short)"):
            convert.from_torch(tmp_path / "part.pth", "resnet8", 10)


def test_refuses_safetensors_cut_short_and_other_files(tmp_path):
    safetensors.torch.save_file(state_dict(), tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("no checkpoint at all")
    for name in ("x.safetensors", "text.pth"):
        with pytest.raises(ValueError, match=f"{name}' is damaged"):
            convert.from_torch(tmp_path / name, "resnet8", 10)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none\.safetensors"):
        convert.from_torch(tmp_path / "none.safetensors", "resnet8", 10)


def test_another_network_is_named():
    with pytest.raises(
        ValueError, match=r"does not fit resnet8x4 .*of another shape.*It holds resnet8 with 10 classes"
    ):
        convert.from_torch(state_dict(), "resnet8x4", 10)
    with pytest.raises(ValueError, match=r"does not fit vgg8 .*missing: .*left over: .*It holds resnet8 with 10"):
        convert.from_torch(state_dict(), "vgg8", 10)


def test_what_a_smaller_network_lacks_is_told_of_the_whole_file():
    with pytest.raises(
        ValueError, match=r"does not fit resnet8 with 10 classes; 60 left over: layer1\.1\.\S+ .*It holds resnet20"
    ):
        convert.from_torch(state_dict("resnet20"), "resnet8", 10)


def test_another_class_count_is_named():
    complaint = (
        r"2 of another shape: fc.bias \(10,\) in place of \(100,\), fc.weight .* resnet8 with 10 classes: say so"
    )
    with pytest.raises(ValueError, match=complaint):
        convert.from_torch(state_dict(), "resnet8", 100)


def test_missing_and_left_over_keys_are_named():
    state = state_dict()
    state["fc.scale"] = state.pop("layer1.0.bn1.bias")
    with pytest.raises(
        ValueError, match=r"1 missing: layer1.0.bn1.bias; 1 left over: fc.scale \(16,\). Get the checkpoint"
    ):
        convert.from_torch(state, "resnet8", 10)


def test_what_is_no_part_of_the_network_may_be_taken_out():
    state = state_dict() | {"aux.bias": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"1 left over: aux.bias \(3,\). Get .*, or take out of the file what is no"):
        convert.from_torch(state, "resnet8", 10)


def test_weights_that_are_not_finite_are_named():
    state = state_dict()
    state["fc.bias"][3] = np.nan
    state["conv1.weight"][0, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"the state dict holds NaN or infinite numbers, in \S+ and 1 more"):
        convert.from_torch(state, "resnet8", 10)


def test_two_networks_in_one_file_ask_which():
    student, teacher = state_dict(seed=1), state_dict(seed=2)
    both = prefixed(student, "module.student.") | prefixed(teacher, "module.teacher.")
    with pytest.raises(ValueError, match=r"holds resnet8 2 times; choose with prefix= .*'module.teacher.'"):
        convert.from_torch(both, "resnet8", 10)
    assert_holds(convert.from_torch(both, "resnet8", 10, prefix="module.teacher."), teacher)


def test_to_torch_checks_the_variables():
    variables = convert.from_torch(state_dict(), "resnet8", 10)
    with pytest.raises(ValueError, match="the variables do not fit resnet8 with 100 classes"):
        convert.to_torch(variables, "resnet8", 100)
    del variables["params"]["fc"]
    with pytest.raises(ValueError, match=r"2 missing: fc\.bias, fc\.weight"):
        convert.to_torch(variables, "resnet8", 10)


def command(capsys, *args):
    convert.main([str(arg) for arg in args])
    return capsys.readouterr().out


def refusal(capsys, *args):
    """What the command says as it stops: argparse on the error stream, and others as the exit's message."""
    with pytest.raises(SystemExit) as stop:
        command(capsys, *args)
    return f"{stop.value} {capsys.readouterr().err}"


def test_command_there_and_back(tmp_path, capsys):
    state = state_dict("resnet8", 100)
    path = save({"model": state}, tmp_path / "resnet8.pth")
    out = command(capsys, "--model", "RESNET8", "--checkpoint", path, "--output", tmp_path / "folder")
    assert "resnet8, 100 classes, 83,892 parameters" in out
    variables, metadata = checkpoint.load_network(tmp_path / "folder", "resnet8", 100)
    assert (metadata["mean"], metadata["image_size"]) == ([0.5071, 0.4867, 0.4408], 32)
    assert metadata["source"] == "resnet8.pth"
    assert len(metadata["sha256"]) == 64
    assert_holds(variables, state, num_classes=100)
    out = command(capsys, "--checkpoint", tmp_path / "folder", "--output", tmp_path / "back" / "x.pth")
    assert "weights_only=True" in out
    back = torch.load(tmp_path / "back" / "x.pth", weights_only=True)["model"]
    torch_networks.create("resnet8", 100).load_state_dict(back, strict=True)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_command_takes_the_normalisation(tmp_path, capsys):
    path = save(state_dict("resnet8", 7), tmp_path / "x.pth")
    flags = ["--model", "resnet8", "--checkpoint", path, "--output", tmp_path / "folder"]
    command(capsys, *flags, "--mean", 0.5, 0.4, 0.3, "--std", 0.1, 0.2, 0.3)
    metadata = checkpoint.read_metadata(tmp_path / "folder")
    assert (metadata["mean"], metadata["std"], metadata["num_classes"]) == ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3], 7)
    assert "image_size" not in metadata  # nobody said it
    command(capsys, *flags, "--dataset", "tiny_imagenet")
    metadata = checkpoint.read_metadata(tmp_path / "folder")
    assert (metadata["mean"], metadata["image_size"]) == ([0.4802, 0.4481, 0.3975], 64)
    command(capsys, *flags, "--dataset", "tiny_imagenet", "--image_size", 48)
    assert checkpoint.read_metadata(tmp_path / "folder")["image_size"] == 48


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model", "resnet9"], "--model='resnet9' is no network; did you mean 'resnet8'"),
        (["--model", "resnet8"], "of no known data set; say how its training images were normalised"),
        (["--model", "resnet8", "--mean", "0.5"], "--mean and --std go together, 3 numbers each"),
        ([], "--model is missing; x.pth holds resnet8 with 7 classes"),
        (["--model", "resnet8", "--num_classes", "100"], "It holds resnet8 with 7 classes"),
        (["--model", "resnet8", "--num_classes", "0"], "--num_classes: '0' is not a whole number of 1 or more"),
        (["--model", "resnet8", "--image_size", "-1"], "--image_size: '-1' is not a whole number of 1 or more"),
        (["--model", "resnet8", "--mean", *"123", "--std", *"111"], "give them of pixels of 0..1, not 0..255"),
        (["--model", "resnet8", "--mean", *"000", "--std", *"110"], "a std is above 0"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, capsys, flags, complaint):
    path = save(state_dict("resnet8", 7), tmp_path / "x.pth")
    assert complaint in refusal(capsys, *flags, "--checkpoint", path, "--output", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_command_replaces_networks_alone(tmp_path, capsys):
    flags = ["--model", "resnet8", "--checkpoint", save(state_dict("resnet8", 100), tmp_path / "x.pth")]
    kept = tmp_path / "runs" / "kept" / "metrics.jsonl"
    kept.parent.mkdir(parents=True)
    kept.touch()
    for output, complaint in ((tmp_path / "runs", "holds 'kept', which would be lost"), (kept, "is a file")):
        assert complaint in refusal(capsys, *flags, "--output", output)
        assert kept.is_file()
    for name in ("network.old", "network.new", "network", "network"):
        command(capsys, *flags, "--output", tmp_path / "runs" / name)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"kept", "network", "network.new", "network.old"}
    assert kept.is_file()


def test_converting_back_says_what_is_wrong(tmp_path, capsys):
    path = save(state_dict("resnet8", 100), tmp_path / "x.pth")
    command(capsys, "--model", "resnet8", "--checkpoint", path, "--output", tmp_path / "folder")
    (tmp_path / "taken.pth").mkdir()
    for output, flags, complaint in (
        ("taken.pth", [], "Is a directory"),
        ("back.pth", ["--mean", "0.5"], "--mean is for a PyTorch file"),
        ("back.bin", [], "end it in .pth, .pt or .safetensors"),
    ):
        said = refusal(capsys, "--checkpoint", tmp_path / "folder", "--output", tmp_path / output, *flags)
        assert said.startswith("Error: ")
        assert complaint in said


def test_command_names_what_a_file_of_two_holds(tmp_path, capsys):
    state = state_dict("resnet8", 100)
    path = save({"student": state, "teacher": state}, tmp_path / "two.pth")
    for flags in ([], ["--model", "resnet20"]):
        message = refusal(capsys, *flags, "--checkpoint", path, "--output", tmp_path / "folder")
        assert "two.pth" in message
        assert "holds resnet8 with 100 classes" in message
    flags = ["--model", "resnet8", "--prefix", "teacher.", "--checkpoint", path, "--output", tmp_path / "folder"]
    assert "resnet8, 100 classes" in command(capsys, *flags)


def test_command_checks_the_checksum_in_a_files_name(tmp_path, capsys):
    path = save(state_dict("resnet8", 100), tmp_path / "cifar100_resnet8-00000000.pt")
    flags = ["--model", "resnet8", "--output", tmp_path / "folder", "--checkpoint"]
    assert "its name says 00000000; get it again" in refusal(capsys, *flags, path)
    right = f"cifar100_resnet8-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pt"
    assert "normalisation (pytorch-cifar-models): mean" in command(capsys, *flags, path.rename(tmp_path / right))
    metadata = checkpoint.read_metadata(tmp_path / "folder")
    assert (metadata["std"], metadata["image_size"]) == ([0.2673, 0.2564, 0.2761], 32)


def test_command_takes_the_64x64_form_there_and_back(tmp_path, capsys):
    state = state_dict("MobileNetV2_64x64", 200)
    path = save(state, tmp_path / "x.pth")
    flags = ["--model", "MobileNetV2", "--image_size", 64, "--checkpoint", path, "--output", tmp_path / "folder"]
    assert "MobileNetV2_64x64, 200 classes, 2,497,480 parameters" in command(capsys, *flags)
    metadata = checkpoint.read_metadata(tmp_path / "folder")
    assert (metadata["image_size"], metadata["mean"]) == (64, [0.4802, 0.4481, 0.3975])
    command(capsys, "--checkpoint", tmp_path / "folder", "--output", tmp_path / "x.safetensors")
    back = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_network_stays_in_the_form_that_it_was_trained_in(tmp_path, capsys):
    """MobileNetV2 on 64 pixels, where its name in a config means another form."""
    network = models.create("MobileNetV2", 5)
    variables = experiment.untrained(network, (64, 64, 3))
    metadata = {"network": "MobileNetV2", "num_classes": 5, "mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 64}
    checkpoint.save_network(tmp_path / "folder", variables, metadata)
    assert evaluate.restore(tmp_path / "folder", (64, 64, 3)).network == network
    assert "MobileNetV2, 5 classes" in command(
        capsys, "--checkpoint", tmp_path / "folder", "--output", tmp_path / "x.pth"
    )
    back = convert.from_torch(tmp_path / "x.pth", "MobileNetV2", 5)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    flags = "--checkpoint", tmp_path / "folder", "--image_size", 64, "--output", tmp_path / "y.pth"
    assert "--image_size is for a PyTorch file" in refusal(capsys, *flags)


def test_real_resnet56(real, tmp_path, capsys):
    """Its file converts with its own normalisation, gives PyTorch's logits, and converts back to the bit."""
    path = real / "cifar100_resnet56-f2eff4c8.pt"
    command(capsys, "--model", "resnet56", "--checkpoint", path, "--output", tmp_path / "resnet56")
    variables, metadata = checkpoint.load_network(tmp_path / "resnet56", "resnet56", 100)
    assert metadata["mean"] == [0.5070, 0.4865, 0.4409]
    assert metadata["std"] == [0.2673, 0.2564, 0.2761]
    assert metadata["sha256"].startswith("f2eff4c8")
    network = torch_networks.create("resnet56", 100).eval()
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert_holds(variables, network.state_dict(), "resnet56", 100)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    logits = jax.jit(models.create("resnet56", 100).apply)(variables, images).logits
    with torch.no_grad():
        reference = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[0].numpy()
    np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def test_shipped_resnet32x4(real):
    """The repository's teacher, as PyTorch's: the same logits of real test images, and about its stated accuracy."""
    path, splits = ROOT / "teachers" / "resnet32x4", data.load("cifar100", str(real / "tfds"), num_test=100)
    restored = evaluate.restore(path, (32, 32, 3), splits)
    state = convert.to_torch(restored.variables, "resnet32x4", 100)
    network = torch_networks.create("resnet32x4", 100).eval()
    network.load_state_dict({key: torch.from_numpy(np.array(array)) for key, array in state.items()}, strict=True)
    mean, std = (np.float32(restored.metadata[key]) for key in ("mean", "std"))
    images = (splits.test.images / np.float32(255) - mean) / std
    with torch.no_grad():
        reference = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[0].numpy()
    logits = jax.jit(restored)(splits.test.images[:8]).logits
    np.testing.assert_allclose(logits, reference[:8], rtol=0, atol=1e-5 * np.abs(reference).max())
    accuracy = 100 * (reference.argmax(-1) == splits.test.labels).mean()
    assert abs(accuracy - restored.metadata["top1"]) < 3 * 100 * np.sqrt(0.8 * 0.2 / 100)
