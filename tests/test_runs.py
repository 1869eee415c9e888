"""What one command runs: comparisons, chains, data and networks of one's own; and training without TensorFlow."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SLOW
from ml_collections import ConfigDict
from PIL import Image
from test_methods import MINE

from configs import cifar100_res56_res20
from rkd_jax import checkpoint, data, evaluate, experiment, optim, run_folder, runs, steps, train

pytestmark = pytest.mark.usefixtures("fast_compile")

OWN = """
from flax import linen as nn

class Small(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(images))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))
"""


def write_images(root, images, labels):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / str(label) / f"{i}.png")


def test_comparison_trains_teacher_student_and_both(tiny, tmp_path, capsys):
    rows = runs.compare(tiny(teacher_checkpoint="", compare=True, num_steps=4), tmp_path / "run")
    assert [row["method"] for row in rows] == ["cross_entropy", "cross_entropy", "kd"]
    assert rows[2]["config"]["teacher_checkpoint"] == str(tmp_path / "run" / "teacher" / "last")
    assert len(json.loads((tmp_path / "run" / "comparison.json").read_text())["rows"]) == 3
    lines = capsys.readouterr().out.strip().splitlines()[-5:]
    assert [line.split()[0] for line in lines[2:]] == ["teacher", "student", "student"]
    for line, row in zip(lines[2:], rows, strict=True):
        assert f"{row['last']['top1']:.2f}" in line
        assert "1,362" in line
    paths = [result["path"] for result in evaluate.run(tiny(), tmp_path / "run")]
    assert len(paths) == 6  # best and last of three


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"student": "resnet9"}, "no network"),
        ({"teacher": ""}, "config.teacher='' is no network"),
        ({"gamma": 1.0}, "gamma=1.0 is"),
        ({"method": "cross_entropy"}, "'cross_entropy' has none; set config.compare=False"),
        ({"method": "cross_entropy", "teacher": ""}, "'cross_entropy' has none; set config.compare=False"),
        ({"method": "takd", "assistant": "resnet8>"}, "config.assistant='resnet8>' has an empty name; write, say,"),
        ({"method": "mlkd"}, "config.views='weak' gives one"),
        ({"method": "takd"}, "config.assistant is not set"),
        ({"method": "takd", "assistant": "resnet8>resnet99"}, "config.assistant='resnet99' is no network"),
        ({"method": "takd", "assistant": "resnet8>ResNet8"}, "'ResNet8' is twice in the chain"),
        ({"method": "fitnets", "hint_stage": 9}, r"hint_stage"),
    ],
)
def test_comparison_finds_what_is_wrong_before_it_trains(tiny, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        runs.compare(tiny(teacher_checkpoint="", compare=True, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_comparison_finds_another_teacher_than_the_given_one_before_it_trains(resnets, tmp_path):
    with pytest.raises(ValueError, match=r"config.teacher_checkpoint=.*holds a resnet8, not a resnet14"):
        runs.compare(resnets(compare=True, teacher="resnet14"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_field_of_ones_own_method_in_comparisons_sweeps_and_within_dot(tiny, tmp_path, monkeypatch):
    (tmp_path / "own_strength.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)

    def make(**fields):
        config = tiny(**fields)
        with config.unlocked():
            config.strength = 0.5
        return config

    config = make(method="own_strength:Method")
    assert experiment.build(config).method.strength == 0.5
    assert "strength" not in experiment.build(experiment.alone(config, config.student)).config
    for method in ("own_strength:Method", "dkd"):
        config = make(method=method, sweep="method=kd,own_strength:Method seed=0,1")
        found = runs.expand(config)
        assert config.strength == 0.5
        built = [experiment.build(member).config for _, member in found]
        assert [(run["method"], run.get("strength")) for run in built[1:3]] == [
            ("kd", None),
            ("own_strength:Method", 0.5),
        ]
    built = experiment.build(make(method="dot", inner="own_strength:Method")).config
    assert (built["inner"], built["strength"]) == ("own_strength:Method", 0.5)
    found = runs.expand(make(method="kd", sweep="method=kd; method=own_strength:Method strength=1,2"))
    built = [experiment.build(member).config for _, member in found]
    assert [run.get("strength") for run in built] == [None, 1.0, 2.0]
    members = runs.expand(make(method="kd", sweep="method=kd,own_strength:Method strength=1,2"))
    with pytest.raises(ValueError, match=r"config\.strength is no field .* of config\.method='kd'; take it away"):
        experiment.build(members[0][1])


@pytest.mark.parametrize("kind", [SLOW("one run"), "a sweep", SLOW("a comparison")])
def test_one_folder_is_of_one_kind(kind, tiny, tmp_path):
    kinds = {
        "one run": tiny(method="cross_entropy", num_steps=2),
        "a sweep": tiny(method="cross_entropy", num_steps=2, sweep="learning_rate=0.1"),
        "a comparison": tiny(teacher_checkpoint="", compare=True, num_steps=2),
    }
    summaries = runs.run(kinds[kind], tmp_path)
    assert [each["steps"] for each in summaries] == [2] * (3 if kind == "a comparison" else 1)
    before = sorted(tmp_path.rglob("*"))
    for other in kinds.keys() - {kind}:
        with pytest.raises(ValueError, match=rf"holds {kind}.*, and this is {other}.*; name another folder"):
            runs.run(kinds[other], tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert runs.run(kinds[kind], tmp_path)[-1]["last"] == summaries[-1]["last"]  # which is finished


def test_chain_finds_another_run_in_its_folder_before_it_trains(resnets, tmp_path, monkeypatch):
    def trained(config, workdir):
        raise RuntimeError(f"{workdir} was trained")

    monkeypatch.setattr(train, "train_and_evaluate", trained)
    chain = resnets(method="takd", assistant="resnet14", seed=5)
    assistant = tmp_path / "takd" / "assistants" / "resnet14"
    assistant.mkdir(parents=True)
    (assistant / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a chain of runs \(takd\), and this is one run; name another folder"):
        runs.run(resnets(), tmp_path / "takd")
    last = experiment.shrink(runs.chain(chain)[-1])
    metadata = {"network": "resnet8", "num_classes": 10, "mean": [0.5], "std": [0.5]}
    checkpoint.save_network(tmp_path / "takd" / "best", {"params": {}}, metadata)
    own = {"temperature": 4.0, "teacher_fingerprint": "of the assistant"}  # which are not known yet
    for there, error, message in (
        ({"method": "kd"}, ValueError, r"values:\n  config.method: 'kd' there, 'takd' here$"),
        ({"assistant": "resnet20"}, ValueError, r"values:\n  config.assistant: 'resnet20' there, 'resnet14' here$"),
        ({"seed": 4}, ValueError, r"values:\n  config.seed: 4 there, 5 here$"),
        ({}, RuntimeError, "resnet14 was trained"),
    ):
        (tmp_path / "takd" / "config.json").write_text(json.dumps(last | own | there))
        with pytest.raises(error, match=message):
            runs.run(chain, tmp_path / "takd")
    shutil.rmtree(tmp_path / "takd" / "best")  # so that nothing was saved: it is no run yet
    (tmp_path / "takd" / "config.json").write_text(json.dumps(last | {"seed": 4}))
    with pytest.raises(RuntimeError, match="resnet14 was trained"):
        runs.run(chain, tmp_path / "takd")


def test_record_of_a_run_in_a_comparison_and_a_chain(tiny, tmp_path, monkeypatch):
    """A record has the fingerprint of the teacher that its run had, which is not that of one that is trained here."""
    begun = []

    def stand_in(config, workdir):
        begun.append((workdir.name, config.get("teacher_fingerprint")))
        return {"parameters": 1, "last": {"top1": 1.0}}

    monkeypatch.setattr(train, "train_and_evaluate", stand_in)
    record = ConfigDict(experiment.build(tiny()).config)
    assert record.teacher_fingerprint
    with record.unlocked():
        record.assistant = "resnet14"
    record.method = "takd"
    runs.distil(record, tmp_path / "chain")
    assert begun == [("resnet14", record.teacher_fingerprint), ("chain", "")]
    record.update(method="kd", teacher_checkpoint="", assistant=None)
    runs.compare(record, tmp_path)
    assert begun[-1] == ("distilled", "")
    record.update(method="takd", teacher="resnet14", assistant="resnet14")
    with pytest.raises(
        ValueError, match=r"config.teacher='resnet14' is an assistant, and .* start from the config that"
    ):
        runs.distil(record, tmp_path / "chain")


def test_comparison_evaluates_a_given_teacher(tiny, tmp_path):
    rows = runs.compare(tiny(compare=True, num_steps=2), tmp_path / "run")
    assert rows[0]["method"] == "as given"
    assert 0 <= rows[0]["last"]["top1"] <= 100
    rows[1] |= {"last": {"top1": 80.0}, "best": {"top1": 90.0}, "seconds": 12.4}
    assert runs.table(rows).splitlines()[3].split()[-3:] == ["80.00", "90.00", "12"]


def test_evaluation_names_the_field_and_says_what_it_cannot_write(resnets, teacher, tmp_path, capsys):
    shutil.copytree(teacher, tmp_path / "network")
    (tmp_path / "network" / "evaluation.json").mkdir()  # not to be written, as in a folder that is read-only
    assert len(evaluate.run(resnets(), tmp_path / "network")) == 1
    assert re.search(r"not written: .*evaluation\.json", capsys.readouterr().out)
    metadata = json.loads((tmp_path / "network" / "metadata.json").read_text())
    (tmp_path / "network" / "metadata.json").write_text(json.dumps(metadata | {"num_classes": 100}))
    with pytest.raises(ValueError, match=r"^config.teacher_checkpoint=.* was trained on 100 classes"):
        runs.compare(resnets(compare=True, teacher_checkpoint=str(tmp_path / "network")), tmp_path / "run")


def test_evaluation_has_the_accuracy_of_each_class(tiny, small_teacher, tmp_path):
    network = shutil.copytree(small_teacher, tmp_path / "network")
    images, labels = data.load("digits", "").test
    write_images(tmp_path / "set" / "test", images[labels != 4, :, :, 0], labels[labels != 4])
    (tmp_path / "set" / "test" / "4").mkdir()
    restored = evaluate.restore(network, images.shape[1:])
    right = np.asarray(restored(images).logits).argmax(1) == labels
    evaluate.run(tiny(dataset=f"folder:{tmp_path / 'set'}", num_train=None, num_test=None), network)
    (result,) = json.loads((network / "evaluation.json").read_text())["results"]
    expected = {str(i): None if i == 4 else 100 * right[labels == i].mean() for i in range(10)}
    assert result["classes"] == pytest.approx(expected)
    assert result["top1"] == pytest.approx(100 * right[labels != 4].mean())


@pytest.mark.slow
def test_evaluation_without_a_config_takes_that_of_each_run(tiny, teacher, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 9, 11), np.uint8)
    write_images(tmp_path / "images", pixels, np.arange(40) % 3)
    own = {"dataset": f"folder:{tmp_path / 'images'}", "image_size": 8, "num_train": 32, "num_test": None}
    alone = {"method": "cross_entropy", "teacher": "", "teacher_checkpoint": "", "num_steps": 1}
    with pytest.raises(ValueError, match=r"has images of 9 x 11 pixels, .*; set config\.image_size=9, say, to which"):
        runs.distil(tiny(**{**own, "image_size": None}, **alone), tmp_path / "all" / "own")
    runs.distil(tiny(**own, **alone), tmp_path / "all" / "own")
    runs.distil(tiny(**alone), tmp_path / "all" / "digits")
    other = tiny(dataset="cifar100", num_test=None)
    found = evaluate.run(other, tmp_path / "all", {"num_test": 3})
    assert [(result["dataset"], result["images"]) for result in found[::2]] == [("digits", 3), (own["dataset"], 3)]
    assert f"(3 test images of {own['dataset']}, 8 pixels)" in capsys.readouterr().out
    found = evaluate.run(other, tmp_path / "all" / "digits" / "best", {})
    assert (found[0]["dataset"], found[0]["images"]) == ("digits", 40)

    moved = shutil.copytree(tmp_path / "all" / "own" / "best", tmp_path / "moved")  # from its run
    assert evaluate.run(tiny(num_train=None, num_test=None), moved, {})[0]["images"] == 3  # in its size
    metadata = json.loads((moved / "metadata.json").read_text())
    del metadata["image_size"]  # as in a network that was converted
    (moved / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"was trained on folder:.*; name --config.dataset and --config.image_size"):
        evaluate.run(tiny(), moved, {})
    fields = {"dataset": own["dataset"], "image_size": 8}
    assert evaluate.run(tiny(**fields, num_train=None, num_test=None), moved, fields)[0]["dataset"] == own["dataset"]
    assert evaluate.run(tiny(), teacher, {})[0]["dataset"] == "digits"  # of the config, for that folder names none
    with pytest.raises(ValueError, match=r"was trained on 3 classes \(folder:.*\), config.dataset has 10"):
        evaluate.run(tiny(), tmp_path / "all" / "own")


def test_network_is_tested_and_teaches_with_its_own_normalisation(tiny, small_teacher, tmp_path):
    variables, metadata = checkpoint.load_network(small_teacher)
    checkpoint.save_network(tmp_path, variables, metadata | {"mean": [0.1], "std": [0.7]})
    run = experiment.build(tiny(teacher_checkpoint=str(tmp_path)))
    assert run.recipe.teacher_normalization == ((0.1,), (0.7,))
    assert run.recipe.student_normalization == (run.splits.mean, run.splits.std)
    eval_step = steps.make_eval_step(run.teacher, run.recipe.teacher_normalization, steps.local_mesh())
    expected = steps.evaluate(eval_step, variables, *run.splits.test, 32)
    assert evaluate.evaluate(tiny(), tmp_path)["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert evaluate.evaluate(tiny(), small_teacher)["loss"] != pytest.approx(expected["loss"], rel=1e-3)


def test_evaluation_loads_a_set_once_and_says_which_fields_it_does_not_read(
    tiny, teacher, tmp_path, monkeypatch, capsys
):
    for name in ("best", "last"):
        shutil.copytree(teacher, tmp_path / name)
    loaded = []
    load_splits = experiment.load_splits
    monkeypatch.setattr(experiment, "load_splits", lambda fields: (loaded.append(fields), load_splits(fields))[1])
    given = ["lam", "num_test", "seed", *evaluate.READ]
    assert len(evaluate.run(tiny(), tmp_path, given=given)) == 2
    assert len(loaded) == 1
    assert "a test reads no config.lam, config.seed: the networks are tested as they" in capsys.readouterr().out
    keep = evaluate._Kept()
    sets = [keep(experiment.Fields(experiment.shrink(tiny(num_test=count)))) for count in (20, 20, 30)]
    assert [len(splits.test.labels) for splits in sets] == [20, 20, 30]
    assert len(loaded) == 3
    evaluate.run(tiny(), tmp_path, given=["num_test", "data_dir"])
    assert "a test reads no" not in capsys.readouterr().out


def test_evaluation_of_what_is_no_folder_says_so(tiny, tmp_path):
    (tmp_path / "x.pth").touch()
    for name, message in (("none", "none is not there; name the folder of"), ("x.pth", "is a file .*rkd_jax.convert")):
        with pytest.raises(FileNotFoundError, match=message):
            evaluate.run(tiny(), tmp_path / name)


def test_evaluation_of_a_network_that_names_no_data_set_asks_for_it(tiny, teacher, tmp_path):
    moved = shutil.copytree(teacher, tmp_path / "converted")
    metadata = json.loads((moved / "metadata.json").read_text())
    (moved / "metadata.json").write_text(json.dumps(metadata | {"num_classes": 100}))
    message = r"^--workdir=.*converted has 100 classes and does not say of what .*: --config.dataset=cifar100, say$"
    with pytest.raises(ValueError, match=message):
        evaluate.run(tiny(), moved, {})


def test_what_smoke_tests_on_random_images_says_so(tmp_path):
    shutil.copytree(ROOT / "results" / "networks" / "cifar100_res56_res20", tmp_path / "network")
    config = cifar100_res56_res20.get_config()
    config.smoke = True
    evaluate.run(config, tmp_path / "network")
    for result in json.loads((tmp_path / "network" / "evaluation.json").read_text())["results"]:
        assert (result["dataset"], result["images"]) == ("random images", 16)


@pytest.mark.slow
def test_command_evaluates_a_run_without_its_config(tiny, tmp_path):
    runs.distil(tiny(num_steps=1), tmp_path)
    command = [sys.executable, str(ROOT / "main.py"), "--mode=eval", f"--workdir={tmp_path}", "--config.num_test=7"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("(7 test images of digits)") == 2
    again = json.loads((tmp_path / "evaluation.json").read_text())["command"]
    assert again.endswith(f"main.py --mode=eval --workdir={tmp_path} --config.num_test=7")  # and no config is named


MOMENTUM = """
import dataclasses
from rkd_jax.methods import kd

@dataclasses.dataclass(frozen=True)
class Method(kd.Method):
    momentum: float = 0.99

@dataclasses.dataclass(frozen=True)
class Unwrapped(kd.Method):
    def wrap_optimizer(self, tx):
        return None
"""


def test_method_of_ones_own_that_does_not_fit_the_config_or_the_optimizer(tiny, tmp_path, monkeypatch):
    (tmp_path / "own_momentum.py").write_text(MOMENTUM)
    monkeypatch.syspath_prepend(tmp_path)
    for fields in ({}, {"compare": True}):
        with pytest.raises(
            ValueError, match="has a field 'momentum', and so has every config; name the method's other"
        ):
            runs.run(tiny(method="own_momentum:Method", **fields), tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"its wrap_optimizer returned a NoneType; return an optax.GradientTransformat"
    ):
        runs.run(tiny(method="own_momentum:Unwrapped"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_summary_is_named(tiny, tmp_path):
    run_folder.claim(tmp_path, experiment.build(tiny()).config)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"summary.json lacks best, last; remove it, and the same command makes it ag"):
        runs.run(tiny(), tmp_path)


def test_weights_to_begin_with_are_the_last_students_alone(resnets):
    config = resnets(method="takd", assistant="resnet14", student_checkpoint="somewhere")
    assert [link.student_checkpoint for link in runs.chain(config)] == ["", "somewhere"]


def test_runs_of_a_comparison_share_their_seed_and_views_and_the_students_alone_what_they_begin_with(
    tiny, small_teacher, tmp_path, monkeypatch
):
    begun = []

    def stand_in(config, workdir):
        begun.append((workdir.name, config.seed, config.views, config.student_checkpoint))
        return {"parameters": 1, "last": {"top1": 1.0}}

    monkeypatch.setattr(train, "train_and_evaluate", stand_in)
    given = str(small_teacher)
    runs.compare(tiny(teacher_checkpoint="", student_checkpoint=given, seed=3, views="both"), tmp_path)
    assert begun == [("teacher", 3, "both", ""), ("alone", 3, "both", given), ("distilled", 3, "both", given)]


@pytest.mark.slow
def test_takd_goes_through_its_assistants(resnets, tmp_path):
    summary = runs.distil(resnets(method="takd", assistant="resnet14", num_steps=2), tmp_path / "run")
    link = json.loads((tmp_path / "run" / "assistants" / "resnet14" / "summary.json").read_text())["config"]
    assert (link["teacher"], link["student"]) == ("resnet8", "resnet14")
    assert (summary["config"]["teacher"], summary["config"]["student"]) == ("resnet14", "resnet8")
    assert summary["config"]["teacher_checkpoint"] == str(tmp_path / "run" / "assistants" / "resnet14" / "last")
    assert summary["config"]["teacher_fingerprint"] != link["teacher_fingerprint"]
    for fields, complaint in (
        ({}, r"config.assistant is not set"),
        ({"assistant": "resnet14>resnet99"}, r"config.assistant='resnet99' is no network"),
        ({"assistant": "resnet8"}, r"config.assistant='resnet8': 'resnet8' is twice in the chain to 'resnet8'"),
        ({"assistant": "resnet14", "method": "dot", "inner": "takd"}, r"config.inner cannot be 'takd', whose chain"),
    ):
        with pytest.raises(ValueError, match=complaint):
            runs.distil(resnets(**{"method": "takd", **fields}), tmp_path / "none")
        assert not (tmp_path / "none").exists()


def test_own_folder_and_own_network_distil(tiny, tmp_path, monkeypatch):
    digits = data.load("digits").train
    write_images(tmp_path / "images", digits.images[:100, :, :, 0], digits.labels[:100])
    (tmp_path / "own_network.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    fields = {"dataset": f"folder:{tmp_path / 'images'}", "image_size": 8, "num_train": None, "num_test": None}
    fields |= {"num_steps": 3}
    alone = {"method": "cross_entropy", "teacher": "", "teacher_checkpoint": "", "student": "own_network:Small"}
    runs.distil(tiny(**fields, **alone), tmp_path / "teacher")
    pair = {"teacher": "own_network:Small", "teacher_checkpoint": str(tmp_path / "teacher" / "best")}
    summary = runs.distil(tiny(**fields, **pair), tmp_path / "student")
    assert np.isfinite(summary["last"]["loss"])
    summary = runs.distil(tiny(**fields | {"num_steps": 2}, **pair, student="own_network:Small"), tmp_path / "own")
    assert summary["parameters"] == 3 * 3 * 8 + 8 + 8 * 10 + 10  # grey images


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of two classes in images of two sizes, and a network trained on it in images of 12 pixels."""
    folder = tmp_path_factory.mktemp("shapes")
    generator = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = generator.integers(0, 128, (8 + i % 2, 9, 3), np.uint8) + np.uint8(127 * label)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i:02}.png")
    return folder


def of_shapes(tiny, shapes, **fields):
    alone = {"method": "cross_entropy", "teacher": "", "teacher_checkpoint": ""}
    some = {"num_train": None, "num_test": None, "num_steps": 4}
    return tiny(**some | alone | {"dataset": f"folder:{shapes / 'images'}", "crop_padding": 0} | fields)


@pytest.fixture
def of_12_pixels(tiny, shapes):
    runs.distil(of_shapes(tiny, shapes, image_size=12), shapes / "run")  # once
    return shapes / "run"


def test_a_network_is_tested_on_images_of_the_size_that_it_was_trained_on(tiny, shapes, of_12_pixels, tmp_path):
    told = json.loads((of_12_pixels / "summary.json").read_text())["last"]
    shutil.copytree(of_12_pixels / "last", tmp_path / "apart")
    config = of_shapes(tiny, shapes)
    for path, changes in (
        (of_12_pixels, None), (of_12_pixels, {}), (of_12_pixels, {"dataset": config.dataset}), (tmp_path / "apart", {}),
    ):  # fmt: skip
        assert evaluate.run(config, path, changes)[-1]["loss"] == told["loss"], (path, changes)
    asked = evaluate.evaluate(of_shapes(tiny, shapes, image_size=16), tmp_path / "apart")
    assert asked["loss"] != told["loss"]


def test_a_teacher_of_other_images_or_classes_is_named(tiny, shapes, of_12_pixels, tmp_path):
    pair = {"method": "kd", "teacher": "small_network:create", "teacher_checkpoint": str(of_12_pixels / "last")}
    with pytest.raises(
        ValueError, match=r"trained on images of 12 pixels, and config\.dataset=.* gives 64; set config\."
    ):
        experiment.build(of_shapes(tiny, shapes, **pair))
    experiment.build(of_shapes(tiny, shapes, image_size=64, **pair))  # as the user says
    shutil.copytree(shapes / "images", tmp_path / "images")
    (tmp_path / "images" / "light").rename(tmp_path / "images" / "bright")
    other = {"dataset": f"folder:{tmp_path / 'images'}", "image_size": 12}
    message = r"was trained on other classes than config\.dataset has: 0 is 'dark' there and 'bright' here"
    with pytest.raises(ValueError, match=message):
        experiment.build(of_shapes(tiny, shapes, **pair | other))
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(of_shapes(tiny, shapes, **other), of_12_pixels / "last")


@pytest.mark.parametrize("field", [{"sweep": "seed=0,1"}, {"compare": True}])
def test_one_run_is_not_several(tiny, tmp_path, field):
    with pytest.raises(ValueError, match=r"is several runs, which rkd_jax\.runs\.run does; unset it here"):
        train.train_and_evaluate(tiny(**field), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_smoke_of_a_folder_takes_a_few_of_its_images(tiny, tmp_path, capsys):
    write_images(tmp_path / "images", np.zeros((33, 8, 8), np.uint8), np.arange(33) % 3)
    alone = {"method": "cross_entropy", "teacher": "", "teacher_checkpoint": "", "num_train": None, "num_test": None}
    runs.distil(tiny(dataset=f"folder:{tmp_path / 'images'}", smoke=True, **alone), tmp_path / "run")
    text = capsys.readouterr().out
    assert "30 training and 3 test images of 8x8" in text
    assert "| SMOKE" in text
    assert "random images" not in text


def test_fields_of_the_step_reach_it(tiny, resnets, monkeypatch):
    run = experiment.build(tiny(crop_padding=2, flip=True, rotation=5.0, fold_teacher=True))
    assert run.recipe.augmentation == {"padding": 2, "flip": True, "rotation": 5.0}
    assert not run.teacher_variables["batch_stats"]
    assert experiment.build(tiny(fold_teacher=False)).teacher_variables["batch_stats"]
    recipe = experiment.build(tiny(num_train=60, num_epochs=3, num_steps=None)).recipe
    assert (recipe.steps_per_epoch, recipe.num_steps) == (7, 3 * 7)  # batches of 8; what fills none is left out
    assert experiment.build(tiny(eval_epochs=0.01)).loop.eval_every == 1
    half = experiment.build(resnets(dtype="bfloat16"))
    assert half.student.dtype == half.teacher.dtype == "bfloat16"
    given, options = {}, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.25}
    create = optim.create_optimizer
    monkeypatch.setattr(optim, "create_optimizer", lambda *args, **kw: given.update(kw) or create(*args, **kw))
    experiment.build(tiny(**options))
    assert given == options


def test_folded_teacher_gives_the_same_losses(tiny, tmp_path):
    lines = []
    for fold in (False, True):
        runs.distil(tiny(num_steps=3, fold_teacher=fold), tmp_path / str(fold))
        lines.append([json.loads(x) for x in (tmp_path / str(fold) / "metrics.jsonl").read_text().splitlines()])
    assert lines[0][0]["distill"] == pytest.approx(lines[1][0]["distill"], rel=1e-4)


def test_training_and_evaluating_never_import_tensorflow_or_pytorch(tiny, tmp_path):
    script = (
        "import sys; sys.modules['tensorflow'] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from ml_collections import ConfigDict\n"
        "from rkd_jax import evaluate, runs\n"
        f"config = ConfigDict({tiny(num_steps=2).to_dict()!r})\n"
        f"runs.run(config, {str(tmp_path / 'run')!r}); evaluate.run(config, {str(tmp_path / 'run')!r})\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "top-1" in result.stdout
    assert [*(tmp_path / "run" / "tensorboard").iterdir()]


@pytest.mark.slow
def test_real_cifar100_trains_without_tensorflow(tiny, real, teacher, tmp_path):
    script = (
        "import sys; sys.modules['tensorflow'] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from ml_collections import ConfigDict\n"
        "from rkd_jax import runs\n"
        f"runs.run(ConfigDict({{config!r}}), {str(tmp_path / 'run')!r})\n"
    )
    config = tiny(dataset="cifar100", data_dir=str(real / "tfds"), method="cross_entropy", teacher="", num_steps=2)
    result = subprocess.run(
        [sys.executable, "-c", script.format(config=config.to_dict())], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "64 training and 40 test images" in result.stdout
