"""The loop: the recipe, resuming, and what stops a run."""

import itertools
import json
import logging as std_logging
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import unittest.mock
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from conftest import ROOT, SLOW
from ml_collections import ConfigDict
from PIL import Image

from configs import default
from rkd_jax import (
    _files,
    _flags,
    checkpoint,
    data,
    evaluate,
    experiment,
    metrics,
    models,
    optim,
    provenance,
    run_folder,
    steps,
    train,
)  # fmt: skip
from rkd_jax.data import augment
from rkd_jax.methods import kd
from rkd_jax.models import __main__ as table

pytestmark = pytest.mark.usefixtures("fast_compile")


def records(workdir):
    """The lines of metrics.jsonl without the times, which two identical runs do not share."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in metrics.TIMES} for line in lines]


def test_clock_counts_training_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    clock = metrics.Clock(seconds=5.0, steps=7)
    for start, stop, passes in ((10, 20, 2.0), (21, 51, 6.0)):  # from 20 to 21 it stands: a program compiles
        clock.stop(start)
        now[0] += 100.0
        clock.start(start)
        now[0] += passes
        clock.stop(stop)
    assert clock.rate() == 40 / 8
    assert (clock.seconds, clock.steps) == (13, 47)
    assert clock.rate() == 0


def test_the_speed_leaves_out_the_calls_that_compile(tiny, tmp_path, monkeypatch):
    """Logged every three steps, two steps a call: 2 + 1, four times. The first of either length compiles."""
    clocks = []

    class Kept(metrics.Clock):
        def __init__(self, *progress):
            super().__init__(*progress)
            clocks.append(self)

    monkeypatch.setattr(train, "Clock", Kept)
    train.train_and_evaluate(tiny(steps_per_call=2, log_every=3, num_steps=12, eval_epochs=10.0), tmp_path / "run")
    assert [clock.steps for clock in clocks] == [12 - 2 - 1]


def network(workdir, name="last"):
    return checkpoint.load_network(workdir / name)[0]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of `tiny`, made once."""
    made = {}

    def run(config):
        if not made:
            made["workdir"] = tmp_path_factory.mktemp("finished") / "run"
            made["summary"] = train.train_and_evaluate(config, made["workdir"])
        return made["workdir"], made["summary"]

    return run


def test_run_leaves_what_it_promises(tiny, finished):
    workdir, summary = finished(tiny())
    assert {"config.json", "metrics.jsonl", "summary.json", "best", "last", "tensorboard", "checkpoints"} <= {
        path.name for path in workdir.iterdir()
    }
    assert list((workdir / "tensorboard").iterdir())
    assert summary["last"]["step"] == 12
    assert summary["best"]["top1"] >= summary["last"]["top1"]
    assert summary["config"]["temperature"] == 4.0  # resolved, though the config leaves it unset
    assert "lam" not in summary["config"]
    assert {"commit", "versions", "device", "date", "command"} <= set(summary)
    lines = records(workdir)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [3, 6, 9, 12]
    assert [(line["step"], line["epoch"]) for line in lines if line["kind"] == "test"] == [(8, 1), (12, 1.5)]
    assert {"loss", "label", "distill", "top1", "learning_rate"} <= set(lines[0])


def test_what_is_logged_is_the_mean_since_the_last_log(tiny, finished, tmp_path):
    workdir, _ = finished(tiny())
    train.train_and_evaluate(tiny(log_every=1), tmp_path / "each")
    logged, each = (
        [line for line in records(path) if line["kind"] == "train"] for path in (workdir, tmp_path / "each")
    )
    assert [line["step"] for line in each] == list(range(1, 13))
    for name in ("loss", "label", "distill", "top1"):
        means = np.array([line[name] for line in each]).reshape(4, 3).mean(1)
        np.testing.assert_allclose([line[name] for line in logged], means, rtol=1e-5)
    assert [line["learning_rate"] for line in logged] == pytest.approx([0.01] * 4)


def test_event_files_of_a_run_that_goes_on_have_what_metrics_jsonl_has(tmp_path):
    """A kill takes what had not come to the disk, and the run goes on behind it."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")

    def scalars():
        found = []
        for file in sorted((tmp_path / "tensorboard").iterdir()):
            rest = file.read_bytes()
            while rest:
                (size,) = struct.unpack("<Q", rest[:8])
                event = proto.Event.FromString(rest[12 : 12 + size])
                found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
                rest = rest[16 + size :]
        return found

    written = [(1, "train", {"loss": 2.0}), (2, "train", {"loss": 1.5, "top1": 50.0}), (2, "test", {"loss": math.nan})]
    writer = metrics.Writer(tmp_path, 0, 10, 5, 8)
    for each in [*written, (3, "train", {"loss": 9.0})]:
        writer.write(*each)
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    writer = metrics.Writer(tmp_path, 2, 10, 5, 8)
    writer.write(3, "train", {"loss": 1.0})
    writer.close()
    *first, nan, last = scalars()
    assert first == [(1, "train/loss", 2.0), (2, "train/loss", 1.5), (2, "train/top1", 50.0)]
    assert nan[:2] == (2, "test/loss")
    assert math.isnan(nan[2])
    assert last == (3, "train/loss", 1.0)


def test_evaluation_agrees_to_the_digit(tiny, finished, capsys):
    workdir, summary = finished(tiny())
    results = {result["path"].rsplit("/", 1)[1]: result for result in evaluate.run(tiny(), workdir)}
    for name in ("best", "last"):
        assert {key: results[name][key] for key in ("step", "top1", "top5")} == {
            key: summary[name][key] for key in ("step", "top1", "top5")
        }
        metadata = checkpoint.read_metadata(workdir / name)
        assert {key: metadata[key] for key in ("step", "top1", "top5")}.items() <= summary[name].items()
        of_class = json.loads((workdir / "evaluation.json").read_text())["results"][name == "last"]["classes"]
        counts = np.bincount(data.load("digits", "", num_test=40).test.labels, minlength=10)
        assert [*of_class] == [str(i) for i in range(10)]
        assert np.average([*of_class.values()], weights=counts) == pytest.approx(summary[name]["top1"])
    assert "top-1" in capsys.readouterr().out


def test_same_seed_same_bits_other_seed_others(tiny, finished, tmp_path):
    workdir, _ = finished(tiny())
    train.train_and_evaluate(tiny(), tmp_path / "again")
    assert_same(network(workdir), network(tmp_path / "again"))
    assert records(workdir) == records(tmp_path / "again")
    train.train_and_evaluate(tiny(seed=1), tmp_path / "other")
    assert records(workdir) != records(tmp_path / "other")


def test_seed_is_of_what_a_student_begins_with_and_data_seed_of_its_images(tiny, tmp_path):
    begun, losses = [], []
    for seed, data_seed in ((0, 0), (1, 0), (0, 1)):
        fields = {"seed": seed, "data_seed": data_seed, "method": "cross_entropy", "learning_rate": 0.0, "num_steps": 1}
        train.train_and_evaluate(tiny(**fields), tmp_path / f"{seed}{data_seed}")
        begun.append(network(tmp_path / f"{seed}{data_seed}")["params"]["conv1"]["kernel"].tolist())
        losses.append(records(tmp_path / f"{seed}{data_seed}")[0]["loss"])
    assert begun[0] == begun[2] != begun[1]
    assert len({*losses}) == 3


SCRIPT = """
import sys
import types
sys.path[:0] = [{root!r}, {tests!r}]
from ml_collections import ConfigDict
from rkd_jax import steps, train
real, calls = steps.accumulate, []
def accumulate(totals, new):  # says how far the run is, so that it is killed in the middle
    calls.append(1)
    print("step", len(calls), flush=True)
    return real(totals, new)
steps.accumulate = accumulate
train.train_and_evaluate(ConfigDict({config!r}), {workdir!r})
"""


def start(config, workdir):
    script = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), config=config.to_dict(), workdir=str(workdir))
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for_step(process, step):
    for line in process.stdout:
        if line.strip() == f"step {step}":
            return
    raise AssertionError(f"the run ended before step {step}")


@pytest.mark.parametrize("killed_after", [(8,), SLOW((5, 4))], ids=["once", "twice"])
def test_run_that_was_killed_ends_with_the_same_bits(killed_after, tiny, finished, tmp_path, monkeypatch):
    workdir, _ = finished(tiny())
    config = tiny(checkpoint_seconds=0.0)  # after every step
    for steps_done in killed_after:
        process = start(config, tmp_path / "run")
        wait_for_step(process, steps_done)
        process.kill()
        process.wait()
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert 5 <= max(saved) < 12  # of two processes, the second went on where the first one was
    real, calls = steps.accumulate, []
    monkeypatch.setattr(steps, "accumulate", lambda *given: calls.append(1) or real(*given))
    train.train_and_evaluate(config, tmp_path / "run")
    assert len(calls) == 12 - max(saved)  # it goes on, and does not begin anew
    assert_same(network(workdir), network(tmp_path / "run"))
    assert_same(network(workdir, "best"), network(tmp_path / "run", "best"))
    assert records(workdir) == records(tmp_path / "run")


def test_signal_during_the_last_test_ends_the_command(tiny, tmp_path, monkeypatch, capsys):
    evaluate = train.Student.evaluate

    def stop(self, step, *arguments):
        evaluate(self, step, *arguments)
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Student, "evaluate", stop)
    with pytest.raises(SystemExit) as stopped:  # so that no other run begins
        train.train_and_evaluate(tiny(), tmp_path / "run")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "SIGTERM: the run is finished, and what would follow it is left" in capsys.readouterr().out
    assert train.train_and_evaluate(tiny(), tmp_path / "run")["last"]["step"] == 12
    assert "holds this run, finished" in capsys.readouterr().out


def test_second_signal_is_obeyed_at_once_and_after_a_run_the_first():
    given = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with train._signals() as received:
            signal.raise_signal(signal.SIGINT)
            assert received == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with train._signals():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, given)


def test_sigterm_saves_first(tiny, finished, tmp_path, monkeypatch, capsys):
    workdir, _ = finished(tiny())
    real, calls = steps.accumulate, []

    def accumulate(totals, new):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(totals, new)

    monkeypatch.setattr(steps, "accumulate", accumulate)
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: float(len(calls))))  # a second a step
    with pytest.raises(SystemExit) as stop:
        train.train_and_evaluate(tiny(), tmp_path / "run")
    assert stop.value.code == 128 + signal.SIGTERM
    assert "saved at step 5" in capsys.readouterr().out
    summary = train.train_and_evaluate(tiny(), tmp_path / "run")
    assert len(calls) == 12  # none done twice
    assert_same(network(workdir), network(tmp_path / "run"))
    assert records(workdir) == records(tmp_path / "run")
    # In batches of 8; each time, the first step compiles and does not count: of the log at step 6, all that there was.
    assert (summary["seconds"], summary["images_per_second"]) == (4 + 6, 8)
    assert re.search(r"train step 9/12 .* \| 8 images/s, 0:00:03 left", capsys.readouterr().out)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_per_second"] for line in lines if line["kind"] == "train"] == [8, 0, 8, 8]


def test_checkpoints_are_so_many_seconds_apart(tiny, tmp_path, monkeypatch):
    real, calls, saved = steps.accumulate, [], []
    monkeypatch.setattr(steps, "accumulate", lambda *given: calls.append(1) or real(*given))
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: float(len(calls))))  # a second a step
    monkeypatch.setattr(train.Student, "save", lambda self, step, *_: saved.append(step))
    train.train_and_evaluate(tiny(checkpoint_seconds=5.0), tmp_path / "run")
    assert saved == [5, 10, 12]


@pytest.mark.parametrize("damage", ["flipped", "cut", "lost"])
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage, caplog):
    tree = {"a": np.random.default_rng(0).normal(size=50_000), "b": (np.int32(1), {})}
    states = checkpoint.Checkpoints(tmp_path / "checkpoints")
    for step in (0, 1, 2):
        states.save(step, tree | {"b": (np.int32(step), {})}, {"note": step})
    states.close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}
    files = [path for path in (tmp_path / "checkpoints" / "2" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.unlink()
    if damage != "lost":
        largest.write_bytes(content[:100] if damage == "cut" else content)
    (tmp_path / "damaged-2" / "before").mkdir(parents=True)  # it is not for the first time
    states = checkpoint.Checkpoints(tmp_path / "checkpoints")
    assert states.restore(tree, 2) is None
    assert "before" not in {path.name for path in (tmp_path / "damaged-2").iterdir()}
    state, progress = states.restore(tree, 1)
    assert (progress, state["b"][0]) == ({"note": 1}, 1)
    assert f"checkpoint {tmp_path / 'checkpoints' / '2'} is damaged" in caplog.text
    states.save(2, tree, {"note": "again"})  # its place is free
    states.close()
    states = checkpoint.Checkpoints(tmp_path / "checkpoints")
    states.drop_after(1)
    assert states.steps() == {1}
    states.close()


def test_a_checkpoint_that_cannot_be_read_now_is_not_set_aside(tmp_path, monkeypatch):
    tree = {"a": np.arange(5.0)}
    states = checkpoint.Checkpoints(tmp_path / "checkpoints")
    states.save(1, tree, {})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_checksum", lambda tree: bytearray(1 << 62))
        with pytest.raises(MemoryError, match=r"1 cannot be read: the machine's memory does not suffice"):
            states.restore(tree, 1)

        def deny(tree):
            raise ValueError("PERMISSION_DENIED: Error opening a file")

        patch.setattr(checkpoint, "_checksum", deny)
        with pytest.raises(OSError, match=r"1 cannot be read: PERMISSION_DENIED: .*; change its permissions"):
            states.restore(tree, 1)
    assert states.restore(tree, 1)[0]["a"].tolist() == tree["a"].tolist()
    states.close()


def test_what_a_kill_left_of_a_save_is_removed(tmp_path):
    states = checkpoint.Checkpoints(tmp_path / "checkpoints")
    states.save(1, {"a": np.arange(5.0)}, {})
    states.close()
    (tmp_path / "checkpoints" / f"2{checkpoint.ocp.utils.TMP_DIR_SUFFIX}" / "state").mkdir(parents=True)
    checkpoint.Checkpoints(tmp_path / "checkpoints").close()
    assert len([*(tmp_path / "checkpoints").iterdir()]) == 2  # another may be writing it
    with run_folder.locked(tmp_path):
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def abstract_state(config):
    return jax.eval_shape(lambda: experiment.build(config).create_state(jax.random.key(0)))


def test_loss_that_is_not_finite_stops_and_names_the_step(tiny, tmp_path):
    config = tiny(learning_rate=1e18, checkpoint_seconds=0.0, num_steps=40, method="cross_entropy")
    with pytest.raises(FloatingPointError, match=r"step \d+ is not finite") as stop:
        train.train_and_evaluate(config, tmp_path / "run")
    bad = int(str(stop.value).split("step ")[1].split()[0])
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert kept[-1] == bad  # the state after `bad` steps, before the bad one
    restored, _ = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").restore(abstract_state(config), bad)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.params))


def test_tested_networks_are_written_with_the_next_checkpoint(tiny, tmp_path, monkeypatch):
    """Each as it was when it was tested."""
    run, there, accuracies = tmp_path / "run", [], iter((50.0, 50.0, 30.0))
    save = train.Student.save

    def look(student, *args):
        there.append((student.workdir / "best").exists())
        save(student, *args)

    monkeypatch.setattr(train.Student, "save", look)
    monkeypatch.setattr(steps, "evaluate", lambda *_: {"top1": next(accuracies), "top5": 90.0, "loss": 1.0})
    train.train_and_evaluate(tiny(num_steps=16), run)
    assert there == [False]
    found = {name: checkpoint.read_metadata(run / name)["step"] for name in ("best", "last")}
    assert found == {"best": 8, "last": 16}  # the best is the first of equals
    train.train_and_evaluate(tiny(num_steps=8), tmp_path / "half")
    assert_same(network(run, "best"), network(tmp_path / "half"))


def test_best_before_a_run_was_stopped_stays_the_best(tiny, tmp_path, monkeypatch, stopped):
    accuracies = iter((50.0, 40.0))  # of steps 8 and 12
    monkeypatch.setattr(steps, "evaluate", lambda *_: {"top1": next(accuracies), "top5": 90.0, "loss": 1.0})
    config = tiny(checkpoint_seconds=0.0)
    stopped(config, tmp_path / "run", 9)
    summary = train.train_and_evaluate(config, tmp_path / "run")
    assert [(summary[name]["step"], summary[name]["top1"]) for name in ("best", "last")] == [(8, 50.0), (12, 40.0)]
    assert checkpoint.read_metadata(tmp_path / "run" / "best")["step"] == 8


@pytest.mark.parametrize("again", [SLOW(60.0), 40.0])  # as on a CPU, and by a GPU's other rounding
def test_best_that_no_checkpoint_tells_of_is_the_best(tiny, tmp_path, monkeypatch, again):
    accuracies, save = iter((50.0, 60.0, again, again)), checkpoint.Checkpoints.save  # of steps 8, 12, and 12 again
    monkeypatch.setattr(steps, "evaluate", lambda *_: {"top1": next(accuracies), "top5": 90.0, "loss": 1.0})

    def killed(self, step, *arguments):
        if step == 12:
            raise KeyboardInterrupt
        save(self, step, *arguments)

    config = tiny(checkpoint_seconds=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    (tmp_path / "cut" / "best" / "metadata.json").write_text("")
    summary = train.train_and_evaluate(config, tmp_path / "run")
    assert summary["best"] == {"step": 12, "top1": 60.0, "top5": 90.0, "loss": 1.0}
    assert (summary["last"]["step"], summary["last"]["top1"]) == (12, again)
    for name in ("best", "last"):
        metadata = checkpoint.read_metadata(tmp_path / "run" / name)
        assert {key: metadata[key] for key in summary[name]} == summary[name]
    assert train.train_and_evaluate(config, tmp_path / "cut")["best"]["step"] == (12 if again > 50 else 8)


def test_a_tests_numbers_that_are_not_finite_are_null(tiny, tmp_path, monkeypatch):
    """Which JSON has not, so that other programs refuse a file that has them."""
    monkeypatch.setattr(steps, "means", lambda _: {"top1": 50.0, "top5": 90.0, "loss": float("nan")})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "loss": Infinity}\n')  # as an older version wrote it
    train.train_and_evaluate(tiny(num_steps=2), tmp_path / "run")
    evaluate.run(tiny(), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    files = [*(tmp_path / "run").rglob("*.json")]
    assert {path.name for path in files} >= {"summary.json", "metadata.json", "evaluation.json", "config.json"}
    for text in (*lines, *(path.read_text() for path in files)):
        json.loads(text, parse_constant=pytest.fail)
    assert [json.loads(line)["loss"] for line in (lines[0], lines[-1])] == [None, None]
    assert _files.plain((1.5, True, None, "NaN", {"a": -math.inf})) == [1.5, True, None, "NaN", {"a": None}]


def diverging(learning_rate):
    """An optimizer that is one until the first test."""
    return optax.sgd(lambda step: jnp.where(step < 8, learning_rate(step), jnp.inf))


def test_network_tested_before_it_diverged_is_kept(tiny, tmp_path):
    with pytest.raises(train.Diverged, match="step 8 is not finite"):
        train.train_and_evaluate(tiny(optimizer="test_train:diverging", weight_decay=0.0), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert {checkpoint.read_metadata(tmp_path / "run" / name)["step"] for name in ("best", "last")} == {8}


@pytest.mark.parametrize(("step", "mend"), [(0, "loss, or look at its formula, for nothing had"), (1, "loss$")])
def test_what_to_do_where_a_step_is_not_finite(tmp_path, step, mend):
    student = types.SimpleNamespace(bad_step=step, workdir=tmp_path)
    with pytest.raises(train.Diverged, match=rf"step {step} is not finite\. Lower config.learning_rate, or .*{mend}"):
        raise train.Diverged([student], [None])


def test_folder_in_which_nothing_was_saved_is_left_free(tiny, tmp_path):
    with pytest.raises(train.Diverged, match=r"step 1 is not finite\. Lower [^;]*$"):
        train.train_and_evaluate(tiny(learning_rate=1e30, num_steps=4), tmp_path / "run")
    train.train_and_evaluate(tiny(num_steps=4), tmp_path / "run")
    with pytest.raises(ValueError, match=r"'crld' compares the views of an image, and config\.views='weak' gives one"):
        train.train_and_evaluate(tiny(method="crld"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_run_goes_on_with_another_log_every(tiny, tmp_path, monkeypatch):
    evaluate, steps_seen = train.Student.evaluate, []

    def stop(self, step, *arguments):
        evaluate(self, step, *arguments)
        steps_seen.append(step)
        if step == 8 and steps_seen.count(8) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Student, "evaluate", stop)
    with pytest.raises(SystemExit):
        train.train_and_evaluate(tiny(checkpoint_seconds=0.0), tmp_path / "run")
    train.train_and_evaluate(tiny(log_every=2, eval_batch_size=7), tmp_path / "run")
    lines = [record["step"] for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert lines == [3, 6, 9, 10, 12]


def test_steps_of_a_call_that_no_call_would_have_are_refused(tiny):
    assert experiment.build(tiny(steps_per_call=3)).loop.steps_per_call == 3  # log_every is 3
    with pytest.raises(ValueError, match=r"config\.steps_per_call=4 is more than the 3 steps between two .*log_every"):
        experiment.build(tiny(steps_per_call=4))
    with pytest.raises(ValueError, match=r"config\.steps_per_call=9 is more than the 8 steps .*epoch"):
        experiment.build(tiny(steps_per_call=9, log_every=50))
    assert experiment.build(tiny(steps_per_call=4, smoke=True)).loop.steps_per_call == 2


def test_on_a_gpu_a_call_is_an_epoch_where_all_calls_can_be(tiny, monkeypatch):
    split = data.load("digits").train

    def loop(steps_per_epoch=125, num_steps=None, **fields):
        config = experiment.Fields(tiny(log_every=None, **fields).to_dict())
        return experiment._loop(config, split, steps_per_epoch, num_steps or 6 * steps_per_epoch)[:2]

    assert loop() == (1, 50)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loop() == loop(eval_epochs=2.0) == (125, 125)
    assert loop(eval_epochs=0.5) == loop(num_steps=300) == loop(stream=True) == (10, 125)
    assert loop(1562) == (781, 781)  # in two calls: a signal waits for the end of one
    assert loop(17) == (10, 50)
    for log_every, steps_per_call in ((25, 25), (50, 10)):
        config = experiment.Fields(tiny(log_every=log_every).to_dict())
        assert experiment._loop(config, split, 125, 750)[:2] == (steps_per_call, log_every)


def test_commit_of_another_project_is_none_of_ours(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "site-packages" / "rkd_jax"
    package.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    monkeypatch.setenv("RKD_JAX_COMMIT", "named")
    git("init")
    git("commit", "--allow-empty", "-m", "another project")
    assert provenance._commit() == "named"
    (package / "provenance.py").write_text("")
    git("add", ".")
    git("commit", "-m", "this one")
    assert len(provenance._commit()) == 40
    (package / "provenance.py").write_text("changed")
    assert provenance._commit() == "named"  # the tree may have been copied over another's history
    monkeypatch.delenv("RKD_JAX_COMMIT")
    assert re.fullmatch("[0-9a-f]{40}[+]", provenance._commit())


def test_record_has_the_command_the_devices_and_xlas_flags(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setenv("XLA_FLAGS", "--fast")
    for given, command in (([""], "python"), (["main.py", "--seed=1", "a b"], "python main.py --seed=1 'a b'")):
        monkeypatch.setattr(sys, "argv", given)
        record = provenance.record()
        assert (record["command"], record["XLA_FLAGS"]) == (command, "--fast")
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert provenance.record()["device"].startswith("2 x ")


def test_what_a_short_run_leaves_out_of_its_schedule_is_said(tiny, tmp_path, capsys):
    train.train_and_evaluate(tiny(num_steps=2, decay_epochs=(1, 2), lr_warmup_epochs=1.5), tmp_path / "short")
    said = "the rate never falls: config.decay_epochs=[1, 2] | the rate rises to the end: config.lr_warmup_epochs=1.5"
    assert said in capsys.readouterr().out
    train.train_and_evaluate(tiny(num_steps=9, decay_epochs=(1, 2), lr_warmup_epochs=1.0), tmp_path / "long")
    assert "the rate" not in capsys.readouterr().out
    for epochs in (("a", "b"), (-5,), (float("inf"),), (True,)):
        with pytest.raises(ValueError, match=r"config\.decay_epochs=.* are no epochs"):
            train.train_and_evaluate(tiny(decay_epochs=epochs), tmp_path / "bad")


def test_workdir_of_another_config_is_refused(tiny, finished):
    workdir, _ = finished(tiny())
    before = (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match=r"config.temperature: 4.0 there, 2.0 here$"):
        train.train_and_evaluate(tiny(temperature=2.0), workdir)
    with pytest.raises(ValueError, match=r": 12 there, 20 here\nTo train its network on: .*_checkpoint='.*last'$"):
        train.train_and_evaluate(tiny(num_steps=20), workdir)
    assert (workdir / "config.json").read_text() == before


def test_run_goes_on_with_other_values_of_a_few_fields_alone(tiny, tmp_path):
    config = experiment.build(tiny()).config
    run_folder.claim(tmp_path, config)
    free = {"data_dir", "teacher_checkpoint", "student_checkpoint", "stream", "checkpoint_seconds"}
    free |= {"log_every", "eval_batch_size", "steps_per_call"}
    for name in config.keys() - free:
        with pytest.raises(ValueError, match=rf"config\.{name}: .* there, 'other' here"):
            run_folder.claim(tmp_path, config | {name: "other"})
    run_folder.claim(tmp_path, config | dict.fromkeys(free, "other"))


def test_workdir_that_holds_something_else_is_refused(tiny, finished, small_teacher, tmp_path):
    config = tiny()
    with pytest.raises(ValueError, match="is the folder of a network, not of a run; name another"):
        train.train_and_evaluate(config, small_teacher)
    workdir = shutil.copytree(finished(config)[0], tmp_path / "run")
    # What the same command, or another, would go on with.
    (workdir / "config.json").unlink()
    for name in ("7", "best/part"):  # of another kind
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert run_folder.claim(tmp_path / "runs", {})
    for lost in (["best", "last"], ["summary.json"], ["checkpoints"]):
        with pytest.raises(ValueError, match=r"holds a run, but no config\.json that says of what; put it back"):
            train.train_and_evaluate(config, workdir)
        assert not (workdir / "config.json").exists()
        for name in lost:
            (workdir / name).rename(tmp_path / name)
    assert run_folder.claim(workdir, {})


def test_what_was_killed_before_it_saved_is_no_run(tiny, tmp_path):
    (tmp_path / "config.json").write_text('{"num_steps": 5000}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 50, "kind": "train"}\n')
    with run_folder.locked(tmp_path) as alone:
        assert alone
        with pytest.raises(ValueError, match="holds a run of another config"):
            run_folder.claim(tmp_path, {"num_steps": 6})  # where none can be kept out
    train.train_and_evaluate(tiny(), tmp_path)
    assert max(record["step"] for record in records(tmp_path)) == 12  # what was written before is gone


@pytest.mark.slow
def test_a_workdir_in_which_another_process_trains_is_left_alone(tiny, tmp_path):
    config = tiny(checkpoint_seconds=0.0, num_steps=30)
    process = start(config, tmp_path / "run")
    try:
        wait_for_step(process, 4)
        process.send_signal(signal.SIGSTOP)
        before = (tmp_path / "run" / "metrics.jsonl").read_text()
        with pytest.raises(ValueError, match=r"run: another run trains there; wait for it, or stop it"):
            train.train_and_evaluate(config, tmp_path / "run")
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == before != ""
    finally:
        process.kill()  # which takes the lock along
        process.wait()
    assert train.train_and_evaluate(config, tmp_path / "run")["last"]["step"] == 30


def test_a_runs_record_is_a_config_that_can_be_changed(tiny, small_teacher, tmp_path):
    begun = experiment.build(tiny(student_checkpoint=str(small_teacher))).config
    assert experiment.build(ConfigDict(begun)).config == begun
    assert "student_fingerprint" not in experiment.build(ConfigDict(begun | {"student_checkpoint": ""})).config
    fields = dict.fromkeys(("alpha", "beta", "temperature", "standardize"))
    alone = experiment.build(ConfigDict(begun | fields | {"method": "cross_entropy"})).config
    assert alone["teacher_fingerprint"] == ""
    assert experiment.build(ConfigDict(alone | {"method": "kd"})).config["teacher_fingerprint"]


def test_a_teacher_is_another_with_other_arrays_or_another_normalisation(tiny, small_teacher, tmp_path):
    variables, metadata = checkpoint.load_network(small_teacher)
    normalised = {"mean": [0.1] * len(metadata["mean"])}
    checkpoint.save_network(tmp_path / "normalised", variables, metadata | normalised)
    checkpoint.save_network(tmp_path / "doubled", jax.tree.map(lambda x: 2 * x, variables), metadata)
    file = tmp_path / "doubled" / "metadata.json"  # as a folder made elsewhere may be
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "fingerprint"}))
    config, workdir = tiny(num_steps=1), tmp_path / "run"
    train.train_and_evaluate(config, workdir)
    others = {"normalised": ("teacher_normalization", "other normalisation"), "doubled": ("teacher_fingerprint", "ano")}
    for name, (field, what) in others.items():
        other = tiny(num_steps=1, teacher_checkpoint=str(tmp_path / name))
        with pytest.raises(ValueError, match=rf"another config; .*\n  config\.{field}: .* there, .* here \({what}"):
            train.train_and_evaluate(other, workdir)
        with pytest.raises(ValueError, match=f"train together share config.{field}, which is "):
            train.train_together([(config, tmp_path / "a"), (other, tmp_path / "b")])
    # A record of an earlier version does not say how its teacher's images were normalised.
    record = json.loads((workdir / "config.json").read_text())
    assert record.pop("teacher_normalization")
    (workdir / "config.json").write_text(json.dumps(record))
    assert train.train_and_evaluate(tiny(num_steps=1, teacher_checkpoint=str(tmp_path / "normalised")), workdir)


def test_a_network_is_put_back_where_a_kill_took_it_away(tiny, small_teacher, tmp_path, monkeypatch):
    workdir = shutil.copytree(small_teacher, tmp_path / "run" / "best").parent
    variables, metadata = checkpoint.load_network(small_teacher)
    rename = Path.rename

    def killed(path, target):
        if path.suffix == ".new":
            raise KeyboardInterrupt
        rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_network(workdir / "best", variables, metadata)
    monkeypatch.undo()
    assert not (workdir / "best").exists()
    with run_folder.locked(workdir):
        assert checkpoint.load_network(workdir / "best")[1] == metadata


def test_images_that_change_beneath_a_run_are_noticed(tiny, tmp_path):
    generator = np.random.default_rng(0)

    def draw(name):
        for label in "ab":
            (tmp_path / "set" / label).mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / label / f"{name}.png")

    for i in range(10):
        draw(i)
    fields = {"dataset": f"folder:{tmp_path / 'set'}", "num_train": None, "num_test": None, "method": "cross_entropy"}
    config, workdir = tiny(**fields, num_steps=1), tmp_path / "run"
    train.train_and_evaluate(config, workdir)
    record = json.loads((workdir / "config.json").read_text())
    draw(5)  # in place of others
    with pytest.raises(ValueError, match=r"config\.data_fingerprint: '\w{16}' there, '\w{16}' here \(other images\)"):
        train.train_and_evaluate(config, workdir)
    with pytest.raises(ValueError, match=r"config\.data_fingerprint='\w+' is of a run with other images than now, '"):
        experiment.build(ConfigDict(record))
    # What is there to be tested on alone is not trained on.
    (tmp_path / "set").rename(tmp_path / "test")
    (tmp_path / "set").mkdir()
    (tmp_path / "test").rename(tmp_path / "set" / "test")
    for smoke in (False, True):
        with pytest.raises(ValueError, match=r"config\.dataset='folder:.*' has images to test on alone; add train/"):
            experiment.build(tiny(**fields, smoke=smoke))


def test_images_that_are_not_square_are_named(tiny, monkeypatch):
    digits = data.load("digits", num_train=64, num_test=40)
    wide = (split._replace(images=split.images[:, 1:7]) for split in (digits.train, digits.test))
    monkeypatch.setattr(data, "load", lambda *_: digits._replace(**dict(zip(("train", "test"), wide, strict=True))))
    with pytest.raises(ValueError, match=r"images of 6 x 8 pixels, and .* square ones; set config\.image_size=6, say"):
        experiment.build(tiny())


def test_a_state_of_other_arrays_is_no_damaged_one(tiny, tmp_path, monkeypatch):
    config = tiny(num_steps=4, eval_epochs=100.0)
    monkeypatch.setattr(train.Student, "finish", lambda *_, **__: None)
    train.train_and_evaluate(config, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    monkeypatch.setattr(kd.Method, "init", lambda *_: ({"w": jnp.zeros(3)}, {}))
    with pytest.raises(ValueError, match=r"4 has params/method/w as nothing, where it is float32\[3\] now: "):
        train.train_and_evaluate(config, tmp_path / "run")
    monkeypatch.setattr(kd.Method, "init", lambda *_: ({}, {"count": np.zeros(3, np.int32)}))
    with pytest.raises(ValueError, match=r"4 has method_state/count as nothing, where it is int32\[3\] now: "):
        train.train_and_evaluate(config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


@pytest.mark.slow
def test_two_left_without_a_whole_checkpoint_in_common_go_on_apart(tiny, tmp_path, monkeypatch, capsys):
    rates = {"a": 0.01, "b": 0.02}
    members = [
        (tiny(num_steps=4, checkpoint_seconds=0.0, learning_rate=rate), tmp_path / name) for name, rate in rates.items()
    ]
    with monkeypatch.context() as patch:
        patch.setattr(train.Student, "finish", lambda *_, **__: None)
        train.train_together(members)  # which keeps steps 3 and 4
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "4")
    for path in (tmp_path / "a" / "checkpoints" / "3" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    summaries = train.train_together(members)
    assert [summary["last"]["step"] for summary in summaries] == [4, 4]
    said = capsys.readouterr().out
    assert re.search(r"\na \| .*goes on from step 4", said)
    assert re.search(r"\nb \| .*goes on from step 3", said)


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_stops_before_it_starts_anew(tiny, tmp_path, monkeypatch):
    members = [(tiny(num_steps=4, learning_rate=rate), tmp_path / name) for rate, name in ((0.01, "a"), (0.02, "b"))]
    with monkeypatch.context() as patch:
        patch.setattr(train.Student, "finish", lambda *_, **__: None)
        train.train_together(members)
    before = (tmp_path / "b" / "metrics.jsonl").read_text()
    for path in (tmp_path / "b" / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"/b: no checkpoint is whole, .* as damaged-STEP; the same command now"
    ) as said:
        train.train_together(members)
    assert str(tmp_path / "a") not in str(said.value)
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == before
    assert (tmp_path / "b" / "damaged-4").is_dir()
    assert [summary["last"]["step"] for summary in train.train_together(members)] == [4, 4]


def test_workdir_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written.*name another"):
        train.train_and_evaluate(tiny(), tmp_path / "file" / "run")


def test_finished_run_is_not_run_again(tiny, finished, capsys):
    workdir, summary = finished(tiny())
    began = time.time()
    assert train.train_and_evaluate(tiny(), workdir) == summary
    assert "finished" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").stat().st_mtime < began


def cropped(rng, images):  # a view of one's own, which is the weak one of `tiny`
    return augment.weak(rng, images, padding=1, flip=False)


def test_own_view_trains_as_the_same_view_does(tiny, tmp_path):
    train.train_and_evaluate(tiny(num_steps=3), tmp_path / "weak")
    train.train_and_evaluate(tiny(num_steps=3, views="test_train:cropped"), tmp_path / "own")
    assert records(tmp_path / "own") == records(tmp_path / "weak")
    record = json.loads((tmp_path / "own" / "config.json").read_text())
    assert [record[name] for name in ("crop_padding", "flip", "rotation")] == [None] * 3
    assert experiment.build(ConfigDict(record)).config == record


@pytest.mark.parametrize(
    ("given", "views"),
    [
        ("both", ("weak", "strong")),
        ("weak+strong", ("weak", "strong")),
        ("weak+test_train:cropped", ("weak", "test_train:cropped")),
    ],
)
def test_views_are_joined(tiny, given, views):
    run = experiment.build(tiny(views=given))
    assert run.recipe.views == views
    assert (run.config["views"], run.config["crop_padding"]) == (given, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"batch_size": 65},
            "config.batch_size=65 exceeds the 64 training examples of digits; lower it or raise config.num_train$",
        ),
        (
            {"batch_size": 1443, "num_train": None},
            "config.batch_size=1443 exceeds the 1442 training examples of digits; lower it$",
        ),
        ({"batch_size": 0}, "config.batch_size=0 is too low"),
        ({"method": "rankin_alignment"}, "did you mean 'ranking_alignment'"),
        ({"student": "resnet9"}, "config.student='resnet9'.*resnet"),
        ({"teacher": "resnet9"}, "config.teacher='resnet9'.*resnet"),
        ({"dataset": "digit"}, "did you mean 'digits'"),
        ({"views": "stron"}, "config.views='stron' is none of"),
        ({"views": "weak+both"}, r"config.views='weak\+both' is none of .*, nor several of them with \+ between$"),
        ({"views": ""}, "config.views='' is none of"),
        ({"views": "weak+test_train:none"}, "config.views='test_train:none' cannot be imported"),
        (
            {"views": "test_train:records"},
            r"config.views='test_train:records': .* is called as view\(rng, images\)",
        ),
        ({"view_reduction": "max"}, "config.view_reduction='max' is none of"),
        (
            {"method": "mlkd", "views": "both", "view_reduction": "mean"},
            "'mean' changes nothing of config.method='mlkd'",
        ),
        ({"dtype": "float16"}, "config.dtype='float16' is none of"),
        (
            {"method": "ranking_alignment", "temperature": 2.0},
            "config.temperature=2.0 changes nothing until config.kd_weight is set; set it, too",
        ),
        ({"method": "cross_entropy", "lam": 3.0}, "config.lam=3.0 is set, but method 'cross_entropy' does not read it"),
        (
            {"teacher": ""},
            "config.teacher='' is no network, and config.method='kd' needs a teacher; .* by .*method='cross_entropy'",
        ),
        ({"teacher": "resnet20"}, "config.teacher_checkpoint=.* holds a small_network:create, not a resnet20"),
        ({"num_steps": 0}, "config.num_steps=0 is too low"),
        ({"learning_rate": -0.1}, "config.learning_rate=-0.1 is too low"),
        ({"learning_rate": float("nan")}, "config.learning_rate=nan is no number"),
        ({"momentum": -0.9}, "config.momentum=-0.9 is too low"),
        ({"momentum": 1.0}, "config.momentum=1.0 is too high; take 0.9999 or less"),
        ({"decay_factor": -0.1}, "config.decay_factor=-0.1 is too low"),
        ({"decay_factor": 10.0}, "config.decay_factor=10.0 is too high; take 1 or less"),
        ({"seed": -1}, "config.seed=-1 is too low"),
        ({"num_steps": 2**31}, "config.num_steps=2147483648 is too high; take 2147483647 or less"),
        ({"num_epochs": 2**30}, "config.num_epochs=1073741824 is too high"),
        ({"image_size": 0}, "config.image_size=0 is too low; take 1 or more"),
        ({"seed": 2**32}, "config.seed=4294967296 is too high; take 4294967295 or less"),
        ({"data_seed": 2**40}, "config.data_seed=1099511627776 is too high"),
        ({"weight_decay": -1.0}, "config.weight_decay=-1.0 is too low"),
        ({"crop_padding": -1}, "config.crop_padding=-1 is too low"),
        ({"crop_padding": 9}, "config.crop_padding=9 is too high; take 8 or less"),
        ({"rotation": -3.0}, "config.rotation=-3.0 is too low"),
        ({"learning_rate": float("inf")}, "config.learning_rate=inf is too high; take less"),
        ({"eval_epochs": 0.0}, "config.eval_epochs=0.0 is no number of epochs"),
        ({"eval_epochs": float("nan")}, "config.eval_epochs=nan is no number of epochs"),
        ({"eval_epochs": float("inf")}, "config.eval_epochs=inf is no.*config.num_epochs to test at the end alone"),
    ],
)
def test_bad_field_is_named_before_anything_is_written(tiny, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        train.train_and_evaluate(tiny(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_steps", 2.5, "config.num_steps=2.5 is no whole number"),
        ("num_train", "64", "config.num_train='64' is no whole number"),
        ("data_seed", True, "config.data_seed=True is no whole number"),
        ("stream", "False", "config.stream='False' is neither True nor False"),
        ("fold_teacher", 1, "config.fold_teacher=1 is neither True nor False"),
    ],
)
def test_record_takes_no_other_kind_of_what_it_has_unset(tiny, field, value, message):
    record = ConfigDict({**experiment.build(tiny(num_train=None, num_steps=None)).config, field: value})
    with pytest.raises(ValueError, match=message):
        experiment.build(record)


def test_misspelt_field_suggests_the_right_one(tiny):
    config = tiny()
    with pytest.raises(AttributeError, match='Did you mean "learning_rate"'):
        config.lerning_rate = 0.1
    with config.unlocked():
        config.lerning_rate = 0.1
    with pytest.raises(ValueError, match=r"config.lerning_rate is no field of .*; did you mean 'learning_rate'"):
        experiment.build(config)
    with config.unlocked():
        del config.lerning_rate
        del config.momentum
    with pytest.raises(ValueError, match="lacks the field 'momentum'"):
        experiment.build(config)


@pytest.mark.parametrize("name", ["dataset", "student", "teacher", "method", "learning_rate", "seed", "decay_epochs"])
def test_field_that_is_none_is_named(tiny, name):
    config = tiny()
    with config.unlocked(), config.ignore_type():
        config[name] = None
    with pytest.raises(ValueError, match=f"config.{name} is None; give it a value, as configs/default.py does"):
        experiment.build(config)


@pytest.mark.slow
def test_a_network_trained_in_bfloat16_has_the_accuracy_that_its_run_says(resnets, tmp_path):
    config = resnets(dtype="bfloat16", num_steps=2, method="cross_entropy")  # a network that takes a dtype
    told = train.train_and_evaluate(config, tmp_path)["last"]
    found = evaluate.evaluate(config, tmp_path / "last")
    assert [found[name] for name in ("top1", "top5", "loss")] == [told[name] for name in ("top1", "top5", "loss")]


def test_memory_that_does_not_suffice_for_the_state(tiny, tmp_path, monkeypatch):
    full = unittest.mock.Mock(side_effect=jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    monkeypatch.setattr(train.steps, "run_once", full)
    with pytest.raises(MemoryError, match=r"does not suffice \(Out of memory\); take a smaller config\.student"):
        train.train_and_evaluate(tiny(), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_the_numbers_come_from_is_told_apart(tiny, tmp_path):
    run = experiment.build(tiny())
    facts = train._computed([run], [tmp_path])
    same = experiment.build(tiny(teacher_checkpoint=run.config["teacher_checkpoint"] + "/"))
    assert facts == train._computed([same], [tmp_path])
    labels = run.splits.train.labels.copy()
    labels[3] += 1
    splits = run.splits._replace(train=run.splits.train._replace(labels=labels))
    assert run.config["data_fingerprint"] == experiment.data_fingerprint(run.splits)
    tested = run.splits._replace(test=run.splits.test._replace(images=255 - run.splits.test.images))
    assert experiment.data_fingerprint(tested) != run.config["data_fingerprint"]
    other = run._replace(config=run.config | {"data_fingerprint": experiment.data_fingerprint(splits)})
    (changed,) = (name for name, value in train._computed([other], [tmp_path]).items() if facts[name] != value)
    assert changed == "the digest of the images of config.dataset"
    both = train._computed([run, other], [tmp_path / "a", tmp_path / "b"])
    assert both["the number of runs"] == 2
    assert both[f"a: {changed}"] != both[f"b: {changed}"]


def test_teacher_that_is_not_there(tiny, tmp_path):
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "metadata.json").write_text("{}")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    mend = ".*rkd_jax.convert .*; config.compare=True trains one, too"
    for path, message in (
        ("", f" is not set{mend}"),
        (str(tmp_path / "none"), f"=.*none' holds no network{mend}"),
        (str(tmp_path / "run"), "=.*run' is a run's folder; name the network in it, .*run/best'"),
        (str(tmp_path / "begun"), "=.*begun' is the folder of a run that has no network yet"),
    ):
        with pytest.raises(FileNotFoundError, match=f"config.teacher_checkpoint{message}"):
            experiment.build(tiny(teacher_checkpoint=path))


def test_network_under_the_home_folder(small_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "teacher").symlink_to(small_teacher)
    variables, metadata = checkpoint.load_network("~/teacher")
    checkpoint.save_network("~/copy", variables, metadata)
    assert checkpoint.read_metadata(tmp_path / "copy") == metadata


def test_teacher_of_other_classes_or_shapes(tiny, small_teacher, tmp_path):
    variables, metadata = checkpoint.load_network(small_teacher)
    checkpoint.save_network(tmp_path / "classes", variables, metadata | {"num_classes": 7})
    with pytest.raises(ValueError, match=r"7 classes, config\.dataset has 10; name its data set"):
        experiment.build(tiny(teacher_checkpoint=str(tmp_path / "classes")))
    name = next(iter(variables["params"]))
    short = variables | {"params": {k: v for k, v in variables["params"].items() if k != name}}
    checkpoint.save_network(tmp_path / "short", short, metadata)
    with pytest.raises(ValueError, match=f"config.teacher_checkpoint does not fit.*{name}"):
        experiment.build(tiny(teacher_checkpoint=str(tmp_path / "short")))


def test_student_that_begins_with_given_weights(tiny, small_teacher, tmp_path, capsys):
    config = tiny(student_checkpoint=str(small_teacher), num_steps=1, learning_rate=0.0)
    train.train_and_evaluate(config, tmp_path / "run")
    assert f"| begins with {small_teacher} |" in capsys.readouterr().out
    (found, _), (given, metadata) = map(checkpoint.load_network, (tmp_path / "run" / "last", small_teacher))
    jax.tree.map(np.testing.assert_array_equal, found["params"], given["params"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found["batch_stats"], given["batch_stats"])
    assert min(jax.tree.leaves(moved)) > 0  # one step of their running averages

    checkpoint.save_network(tmp_path / "other", jax.tree.map(lambda x: 2 * x, given), metadata)
    with pytest.raises(ValueError, match=r"config\.student_fingerprint: .* \(another network to begin with\)"):
        train.train_and_evaluate(
            tiny(**config.to_dict() | {"student_checkpoint": str(tmp_path / "other")}), tmp_path / "run"
        )
    for fields, message in (
        ({"student": "resnet8"}, r"config\.student_checkpoint='.*' holds a small_network:create, not a resnet8"),
        ({"student_checkpoint": str(tmp_path / "none")}, r"config\.student_checkpoint='.*none' holds no network"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            experiment.build(tiny(**{"student_checkpoint": str(small_teacher)} | fields))


@pytest.mark.parametrize("other", [{"num_classes": 7}, SLOW({"class_names": ["none"]})])
def test_student_that_begins_with_a_network_of_other_classes(tiny, tmp_path, other, monkeypatch, capsys):
    named = data.load("digits", num_train=64, num_test=40)._replace(class_names=tuple("0123456789"))
    monkeypatch.setattr(data, "load", lambda *_: named)
    fields = {"method": "cross_entropy", "teacher": "", "num_steps": 1, "learning_rate": 0.0}
    train.train_and_evaluate(tiny(**fields), tmp_path / "alone")
    network = models.create("small_network:create", other.get("num_classes", 10))
    given = experiment.untrained(network, (8, 8, 1))
    metadata = {"network": "small_network:create", "num_classes": 10, "mean": [0.5], "std": [0.3]} | other
    checkpoint.save_network(tmp_path / "other", given, metadata)
    train.train_and_evaluate(tiny(**fields, student_checkpoint=str(tmp_path / "other")), tmp_path / "run")
    assert f"| begins with {tmp_path / 'other'}, fc new for other classes |" in capsys.readouterr().out
    (found, made), (alone, _) = (checkpoint.load_network(tmp_path / name / "last") for name in ("run", "alone"))
    assert (made["num_classes"], made["class_names"]) == (10, list("0123456789"))
    expected = given["params"] | {"fc": alone["params"]["fc"]}
    jax.tree.map(np.testing.assert_array_equal, found["params"], expected)

    with pytest.raises(ValueError, match=r"^config\.teacher_checkpoint=.*other' was trained on (7|other) classes"):
        experiment.build(tiny(teacher_checkpoint=str(tmp_path / "other")))


def network_folder(path, name, num_classes, shape=(8, 8, 1), **facts):
    variables = experiment.untrained(models.create(name, num_classes), shape)
    channels = shape[-1]
    metadata = {"network": name, "num_classes": num_classes, "mean": [0.5] * channels, "std": [0.3] * channels}
    checkpoint.save_network(path, variables | {"batch_stats": {}}, metadata | facts)  # as a run saves it
    return {"student": name, "student_checkpoint": str(path)}, variables


@pytest.mark.parametrize("num_classes", [10, SLOW(7)])
def test_student_without_batch_statistics_begins_with_given_weights(tiny, tmp_path, num_classes, capsys):
    fields, given = network_folder(tmp_path / "given", "small_network:Plain", num_classes)
    train.train_and_evaluate(tiny(**fields, num_steps=1, learning_rate=0.0), tmp_path / "run")
    found, _ = checkpoint.load_network(tmp_path / "run" / "last")
    np.testing.assert_array_equal(found["params"]["conv"]["kernel"], given["params"]["conv"]["kernel"])
    same = np.array_equal(found["params"]["head"]["kernel"], given["params"]["head"]["kernel"])
    assert same == (num_classes == 10)
    assert ("head new for other classes" in capsys.readouterr().out) == (num_classes == 7)


def test_network_to_begin_with_that_cannot_serve_here_is_told(tiny, tmp_path):
    fields, _ = network_folder(tmp_path / "a", "small_network:of_16_outputs", 7)
    message = r"config\.student_checkpoint=.* was trained on 7 classes, .*: no array of config\.student='.*' follows"
    with pytest.raises(ValueError, match=message):
        experiment.build(tiny(**fields))
    network_folder(tmp_path / "b", "small_network:create", 10, (8, 8, 3))
    for role in ("student", "teacher"):
        message = rf"config\.{role}_checkpoint=.* images of 3 channels, .* has images of 1; save these in RGB$"
        with pytest.raises(ValueError, match=message):
            experiment.build(tiny(**{f"{role}_checkpoint": str(tmp_path / "b")}))


@pytest.mark.parametrize("damage", ["cut", "flipped", "metadata"])
def test_damaged_teacher(tiny, small_teacher, tmp_path, damage):
    variables, metadata = checkpoint.load_network(small_teacher)
    path = tmp_path / "teacher"
    checkpoint.save_network(path, variables, metadata)
    largest = max((p for p in (path / "variables").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "cut":
        largest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    else:
        (path / "metadata.json").write_text('{"network": ')
    with pytest.raises(ValueError, match=r"config.teacher_checkpoint.*damaged"):
        experiment.build(tiny(teacher_checkpoint=str(path)))


def test_a_fingerprint_is_of_names_types_shapes_and_values():
    x = np.arange(6, dtype=np.float32)
    others = ({"b": x}, {"a": {"a": x}}, {"a": x.reshape(2, 3)}, {"a": x.view(np.int32)}, {"a": x[::-1]})
    assert len({checkpoint.fingerprint(tree) for tree in ({"a": x}, *others)}) == 1 + len(others)
    assert checkpoint.fingerprint({"a": jnp.asarray(x)}) == checkpoint.fingerprint({"a": x})


def test_network_saved_in_half_precision_is_read_as_float32(small_teacher, tmp_path):
    variables, metadata = checkpoint.load_network(small_teacher)
    half = jax.tree.map(lambda x: x.astype(np.float16), variables)
    checkpoint.save_network(tmp_path, half, metadata)
    found, _ = checkpoint.load_network(tmp_path)
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    assert_same(found, half)
    with pytest.raises(ValueError, match="metadata of a network lacks mean, std"):
        checkpoint.save_network(tmp_path / "bare", half, {"network": "resnet8", "num_classes": 10})


def test_traces_of_closed_loops_alone_are_hushed(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    checkpoint._hush.__wrapped__()
    for message in ("Event loop is closed", "something else"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(message)))
    assert [str(each.exc_value) for each in seen] == ["something else"]


def test_orbax_logs_no_error_that_it_raises():
    checkpoint._hush()
    folder = Path(checkpoint.ocp.__file__).parent
    for level, path, shown in (
        (std_logging.ERROR, folder / "future.py", False),
        (std_logging.WARNING, folder / "future.py", True),
        (std_logging.ERROR, Path(train.__file__), True),
    ):
        record = std_logging.LogRecord("absl", level, str(path), 1, "words", None, None)
        assert bool(logging.get_absl_logger().filter(record)) == shown


def test_a_network_is_read_while_a_run_saves_others_there(tmp_path):
    facts = {"network": "resnet8", "num_classes": 10, "mean": [0.5], "std": [0.2]}
    stop = threading.Event()

    def save():
        for i in itertools.count():
            variables = {"params": {"kernel": np.full((300, 300), float(i), np.float32)}}
            checkpoint.save_network(tmp_path / "last", variables, facts)
            first.set()
            if stop.is_set():
                return

    first, thread = threading.Event(), threading.Thread(target=save)
    thread.start()
    try:
        assert first.wait(60)
        seen = [checkpoint.load_network(tmp_path / "last")[0]["params"]["kernel"] for _ in range(25)]
    finally:
        stop.set()
        thread.join()
    assert all((kernel == kernel[0, 0]).all() for kernel in seen)
    assert len({kernel[0, 0] for kernel in seen}) > 1  # there were several


def test_a_full_disk_is_named_where_metrics_are_written():
    said = r"a/metrics.jsonl cannot be written: the disk is full; make room, and start"
    with pytest.raises(OSError, match=said), _files.writing("a/metrics.jsonl"), open("/dev/full", "w") as file:
        file.write("words")


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    states = checkpoint.Checkpoints(tmp_path / "states")
    states.save(1, {"x": np.zeros(3)}, {})
    words = ValueError('RESOURCE_EXHAUSTED: Error writing "x" in OCDBT database')
    monkeypatch.setattr(states._manager, "save", unittest.mock.Mock(side_effect=words))
    with pytest.raises(OSError, match=r"states cannot be written: the disk is full; make room, and start again"):
        states.save(2, {"x": np.ones(3)}, {})
    states.close()
    found, _ = checkpoint.Checkpoints(tmp_path / "states").restore({"x": np.zeros(3)}, 1)
    assert found["x"].tolist() == [0, 0, 0]  # the last good one


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config.method=ranking_alinment",
            "config.method='ranking_alinment' is no method; did you mean 'ranking_alig",
        ),
        SLOW("--config.lerning_rate=1", 'Did you mean "learning_rate"'),
        SLOW("--config.lam=much", "Error: --config.lam=much: "),
        SLOW("--config.lambda=3", "Error: no such field of the config: lambda. Did you mean 'lam'?"),
        SLOW("--config.num-epochs=3", "no such field of the config: num-epochs. Did you mean 'num_epochs'?"),
        SLOW("--config.num_epochs=2.5", "Error: --config.num_epochs=2.5: '2.5' is no whole number"),
        SLOW("--config=configs", "Is a directory: 'configs'; name a file of configs"),
        SLOW("--config.smoke=Foo", "Error: --config.smoke=Foo: not a boolean; write True or False"),
        SLOW("--lam=3", "Error: --lam is no flag; write --config.lam"),
        SLOW("--config.seed=1 --config=configs/digits.py", "--config was specified; put --config=FILE first"),
        SLOW("--mod=eval", "Error: Unknown command line flag 'mod'. Did you mean: mode ?"),
        SLOW("--config=configs/none.py", "configs/none.py"),
        SLOW("config.lam=1", "'config.lam=1' is no flag; write --config.FIELD=VALUE"),
        SLOW("configs/digits.py", "'configs/digits.py' is no flag; write --config=configs/digits.py"),
    ],
)
def test_main_reports_a_users_error_in_one_sentence(tmp_path, flag, message):
    command = [sys.executable, "main.py", "--workdir", str(tmp_path / "run"), *flag.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line", ['config.lam = "5"', SLOW("config.seed = 1 / 0"), SLOW("config.decay_epochs = 5"), SLOW("no_such()")]
)
def test_an_error_in_a_config_has_its_line(tmp_path, line):
    lines = ["from configs import default", "", "def get_config():", "    config = default.get_config()", f"    {line}"]
    (tmp_path / "own.py").write_text("\n".join([*lines, "    return config"]))
    command = [sys.executable, str(ROOT / "main.py"), "--config", "own.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"(in own.py, line 5: {line})" in result.stderr


OWN = """import dataclasses

from rkd_jax import methods


@dataclasses.dataclass(frozen=True)
class Method(methods.Distiller):
    strength: float = 0.1
    sharp: bool = False

    def loss(self, params, state, student, teacher, batch, context):
        return {"label": student.logits.mean()}, state, {}


@dataclasses.dataclass(frozen=True)
class Outer(methods.Distiller):
    within: methods.Distiller = Method()

    def loss(self, *args):
        return self.within.loss(*args)
"""


@pytest.mark.parametrize(
    "argv",
    [
        ["--config.method=own_fields:Method", "--config.strength=3"],
        ["--config.method", "own_fields:Method", "-config.strength", "3"],
        ["--config.method=dot", "--config.inner=own_fields:Method", "--noconfig.sharp", "--config.strength=3"],
        [
            "--noconfig.sharp",
            "--config.method=own_fields:Method",
            "--workdir",
            "runs/my-method",
            "--config.dataset=a:b",
        ],
        [
            "--config.method=no_such:Method",
            "--config.method=dkd",
            "--config.method=own_fields:Method",
            "--config.sharp",
        ],
        ["--flagfile={flags}"],
        ["--config.method=own_fields:Outer", "--config.within=own_fields:Method", "--config.strength=3"],
        ["--config.sweep=method=kd,own_fields:Method; method=own_fields:Method strength=1,2"],
        ["--config.sweep=method=own_fields:Method strength=1,2; method=kd"],
        ["--config.sweep", "strength=1,2 lam=1", "--config.method=own_fields:Method"],
    ],
)
def test_flags_set_the_fields_of_a_method_of_ones_own(tmp_path, monkeypatch, argv):
    (tmp_path / "own_fields.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flags").write_text("--config.method=own_fields:Method\n--config.strength=3\n")
    argv = [argument.format(flags=tmp_path / "flags") for argument in ("main.py", *argv)]
    config = _flags._parse_with_own_fields(lambda path: default.get_config(), argv, "own.py")
    assert (config.strength, config.sharp) == (None, None)
    assert (config.get_type("strength"), config.get_type("sharp")) == (float, bool)
    with pytest.raises(AttributeError, match='Did you mean "strength"'):
        config.strenght = 3.0


def test_a_config_that_has_what_the_flags_set_imports_no_method(monkeypatch):
    def parse(*argv):
        return _flags._parse_with_own_fields(lambda path: default.get_config(), [*argv], "own.py")

    parse("--config.method=no_such_module:Method", "--config.lam=3", "--config.sweep=eps=1,2")
    assert "strength" not in parse("--config.method=kd", "--config.strength=3")
    with pytest.raises(ValueError, match=r"^config.method='no_such_module:Method' cannot be imported"):
        parse("--config.method=no_such_module:Method", "--config.strength=3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config.method=own_fields:Method --config.strength=much", "Error: --config.strength=much: "),
        ("--config.method=own_fields:Method --config.strenght=3", 'Did you mean "strength"'),
        ("--config.method=own_fields:Other --config.strength=3", "Error: config.method='own_fields:Other' cannot be"),
    ],
)
def test_main_takes_the_fields_of_a_method_of_ones_own(tmp_path, flags, message):
    (tmp_path / "own_fields.py").write_text(OWN)
    command = [sys.executable, str(ROOT / "main.py"), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert message in result.stderr


def test_an_error_of_another_package_is_told_from_our_own():
    def is_foreign(function):
        with pytest.raises((ValueError, TypeError)) as raised:
            function()
        return _flags.foreign(raised.value)

    assert is_foreign(lambda: jnp.zeros(2) + jnp.zeros(3))  # JAX hides its frames
    assert is_foreign(lambda: jax.eval_shape(lambda x: x + jnp.zeros(3), jnp.zeros(2)))
    assert is_foreign(lambda: optax.cosine_decay_schedule(1.0, -1))
    assert not is_foreign(lambda: jax.eval_shape(lambda x: augment.view("none of them", None, x), jnp.zeros(2)))
    assert not is_foreign(lambda: _files.write_json(ROOT / "with\0in it", {}))  # by Python
    assert not is_foreign(lambda: optim.create_optimizer("none", None))


BUGGY = """from rkd_jax import losses, methods


class Method(methods.Distiller):
    def loss(self, params, state, student, teacher, batch, context):
        return {"label": self.label(student, batch)}, state, {}

    def label(self, student, batch):
        return LABEL
"""


@pytest.mark.parametrize(
    ("label", "raised"),
    [
        ("student.logit.mean()", AttributeError),
        ("(student.logits + batch['label']).mean()", ValueError),  # by jax
        ("losses.cross_entropy(student.logits, None)", TypeError),  # by this package
    ],
)
def test_an_error_in_code_of_ones_own_has_its_line(tiny, tmp_path, monkeypatch, label, raised):
    name = f"buggy_{raised.__name__}"
    (tmp_path / f"{name}.py").write_text(BUGGY.replace("LABEL", label))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(raised) as error:
        train.train_and_evaluate(tiny(method=f"{name}:Method"), tmp_path / "run")
    assert _flags.own_code(error.value) == f"{name}.py, line 9: return {label}"


def test_an_error_as_a_module_is_imported_has_its_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_module.py").write_text("import jax.numpy as jnp\n\nx = jnp.no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        table.main(["broken_module:x"])
    said, place = str(stop.value).splitlines()
    assert said.startswith(
        "Error: NAME='broken_module:x': broken_module cannot be imported, mend it there: module 'jax."
    )
    assert place == "(in broken_module.py, line 3: x = jnp.no_such_thing)"


@pytest.mark.slow
def test_main_names_the_line_in_code_of_ones_own(tmp_path):
    (tmp_path / "buggy.py").write_text(BUGGY.replace("LABEL", "student.logit.mean()"))
    flags = [f"--config.{side}=small_network:create" for side in ("student", "teacher")]
    flags += ["--config.smoke", "--config.compare=False", "--config.method=buggy:Method"]
    command = [sys.executable, ROOT / "main.py", *flags]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.endswith(
        "Error: AttributeError: 'Outputs' object has no attribute 'logit'\n"
        "(in buggy.py, line 9: return student.logit.mean(); --traceback shows the way there)\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n    return 1\n", "own.py, line 1: invalid syntax"),
        SLOW("def get_config():\n    digits.get_config()\n", "returns nothing; end it with `return config`"),
        SLOW(
            "def get_config():\n    config = digits.get_config()\n    config.metod = 'kd'\n    return config\n",
            "Key \"metod\" does not exist and cannot be added since the config is locked. Did you mean 'method'? (all",
        ),
    ],
)
def test_a_wrong_config_file_is_one_sentence(tmp_path, text, message):
    (tmp_path / "own.py").write_text("" if "(:" in text else "from configs import digits\n\n\n")
    with (tmp_path / "own.py").open("a") as file:
        file.write(text)
    command = [sys.executable, "main.py", "--workdir", str(tmp_path / "run"), "--config", str(tmp_path / "own.py")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert message in result.stderr


def test_damaged_json_of_a_run_is_named(tmp_path, monkeypatch):
    run_folder.claim(tmp_path, {"lam": 5.0})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged \(.*put it back"):
        run_folder.claim(tmp_path, {"lam": 5.0})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 2}\n{"step')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is damaged \(.*remove that line"):
        _files.read_lines(tmp_path / "metrics.jsonl")
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(ValueError, match=r"metadata\.json lacks mean, network, num_classes, std; convert or"):
        checkpoint.load_network(tmp_path)

    def cut(path, text):  # as a kill in the midst of it
        path.write_bytes(text.encode()[:4])
        raise KeyboardInterrupt

    _files.write_json(tmp_path / "sound.json", {"lam": 5.0})
    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        _files.write_json(tmp_path / "sound.json", {"lam": 6.0})
    assert _files.read_json(tmp_path / "sound.json") == {"lam": 5.0}


def test_the_default_config_is_found_from_any_folder(tmp_path):
    def run(*flags):
        command = [sys.executable, str(ROOT / "main.py"), "--workdir", "run", *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ).stderr

    assert "config.image_size=3 is read by tfds: and folder: alone" in run("--config.image_size=3")
    assert "No such file or directory: 'absent.py'; name a file of " in run("--config", "absent.py")
