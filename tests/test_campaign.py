"""The campaign: its parts, its list, stopping and going on; and training without the optional packages."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_train import assert_same

from configs import cifar100_res32x4_res8x4, default
from rkd_jax import checkpoint, data, run_folder, train
from rkd_jax.data import _prepared
from rkd_jax.report import campaign, cells, pack, run, tables

pytestmark = pytest.mark.usefixtures("fast_compile")

TIMES = ("seconds", "images_per_second", "date", "command")


@pytest.fixture
def files(tmp_path):
    weights = np.random.default_rng(0).normal(0, 0.1, 60_000).astype(np.float32)
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "weights").write_bytes(weights.tobytes() + b"xyz")
    (tmp_path / "from" / "facts.json").write_text("{}\n")
    return {f"a/{path.name}": path for path in (tmp_path / "from").iterdir()}


def test_parts_hold_the_files_and_are_smaller(files, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "PART", 60_000)
    told = []
    size, folders = pack.pack(files, tmp_path / "state", lambda *told_: told.extend([*told_, *tmp_path.glob("state")]))
    assert told == [pack.state(tmp_path / "state")]  # before it was in place, so that no kill comes between
    parts = list((tmp_path / "state").iterdir())
    assert len(parts) == 4
    assert size < 0.9 * 240_000
    assert size - 4 * pack.HEADER - sum(folders.values()) < 1000
    assert max(part.stat().st_size for part in parts) <= 60_000
    pack.unpack(tmp_path / "state", tmp_path / "to")
    for name, path in files.items():
        assert (tmp_path / "to" / name).read_bytes() == path.read_bytes()
    monkeypatch.setattr(pack, "PART", 20_000)
    pack.pack(files, tmp_path / "state")
    assert (tmp_path / "state" / "part-10").exists()  # which is not the one after the first
    pack.unpack(tmp_path / "state", tmp_path / "to")
    monkeypatch.setattr(pack, "PART", 60_000)
    pack.pack({"other": files["a/facts.json"]}, tmp_path / "smaller")
    shutil.copytree(tmp_path / "smaller", tmp_path / "state", dirs_exist_ok=True)
    pack.unpack(tmp_path / "state", tmp_path / "to")  # the other parts are those of the copy before
    assert (tmp_path / "to" / "other").read_text() == "{}\n"
    with pytest.raises(FileNotFoundError):
        pack.pack({"gone": tmp_path / "gone"}, tmp_path / "state")
    assert {path.name for path in tmp_path.iterdir()} == {"from", "state", "smaller", "to"}


def test_bad_parts_are_named(files, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "PART", 60_000)
    pack.pack(files, tmp_path / "state")
    second = tmp_path / "state" / "part-1"
    content = second.read_bytes()
    second.write_bytes(content[:-1] + b"!")
    with pytest.raises(ValueError, match="part-1 is damaged"):
        pack.unpack(tmp_path / "state", tmp_path / "to")
    second.unlink()
    with pytest.raises(ValueError, match=r"part-2 is of another slice|one before it is lacking"):
        pack.unpack(tmp_path / "state", tmp_path / "to")
    second.write_bytes(content)
    (tmp_path / "state" / "part-3").unlink()
    with pytest.raises(ValueError, match="3 of 4 parts"):
        pack.unpack(tmp_path / "state", tmp_path / "to")
    weights = files["a/weights"]
    weights.write_bytes(weights.read_bytes()[::-1])
    pack.pack(files, tmp_path / "other")
    for name in ("part-1", "part-3"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "state")
    with pytest.raises(ValueError, match="part-1 is of another slice than"):
        pack.unpack(tmp_path / "state", tmp_path / "to")
    pack.pack({"../outside": weights}, tmp_path / "state")
    with pytest.raises(ValueError, match=r"names a file outside of .*: \.\./outside"):
        pack.unpack(tmp_path / "state", tmp_path / "to")
    assert not (tmp_path / "outside").exists()


def test_state_of_the_largest_run_fits():
    """resnet32x4's float32 state and its best as float16, at what random weights come to, in 64 MiB."""
    weights = np.random.default_rng(0).normal(0, 0.03, 1 << 20).astype(np.float32)
    deflated = [len(zlib.compress(pack._by_significance(w.tobytes()), 1)) for w in (weights, weights.astype("f2"))]
    assert 7_433_860 * (2 * deflated[0] + deflated[1]) / (1 << 20) < 63 << 20


def test_list_is_made_of_cells():
    for scale in campaign.SCALES:
        for item in campaign.items(scale):
            assert bool(item.command) != bool(item.members)
            for cell in item.members:
                config = cells.configure(cell, campaign.SCALES[scale].cells)
                assert config.method in ("cross_entropy", "kd", "ranking_alignment")
    listed = {item.name: item for item in campaign.items("full")}
    assert [cell.pair for cell in listed["teacher-wrn_40_2"].members] == [
        "cifar100_wrn40_2_wrn16_2", "cifar100_wrn40_2_wrn40_1", "cifar100_wrn40_2_sv1",
    ]  # fmt: skip
    eps = cells.configure(listed["headline-eps=0.05"].members[0], "full")
    assert (eps.eps, eps.rank_scale, eps.num_epochs, eps.views) == (0.05, "logits", 300, "both")
    (alone,) = listed["alone-resnet8x4"].members
    config = cells.configure(alone, "full")
    assert (config.student, config.num_epochs, config.views) == ("resnet8x4", 240, "weak")


@pytest.fixture
def short(monkeypatch):
    """A failing benchmark, a teacher, its two students and one whose teacher is absent; 12 steps each, no margin."""
    ranking = cells.Cell(campaign.PAIR, "ranking_alignment", 0)
    listed = [
        campaign.Item("bench", command=("benchmarks.nothing",), seconds=1),
        campaign.Item("teacher", (cells.Cell(campaign.PAIR, "teacher", 0),)),
        campaign.Item("students", (ranking, ranking._replace(name="kd"))),
        campaign.Item("given", (cells.Cell("cifar100_res56_res20", "kd", 0),)),
    ]
    monkeypatch.setattr(campaign, "items", lambda scale: listed)
    monkeypatch.setitem(campaign.SCALES, "smoke", campaign.Scale("tiny", margin=0.0, least=0.0, pack=60.0))
    size = cells.SCALES["tiny"]
    fields = {"num_train": 32, "num_test": 20, "batch_size": 8, "log_every": 2}
    monkeypatch.setitem(cells.SCALES, "tiny", size._replace(overrides=size.overrides | fields))


def go(out, *flags, minutes=9):
    campaign.main(["--out", str(out), "--scale", "smoke", "--minutes", str(minutes), *flags])


def outcome(out):
    """The networks, and the results but for times."""
    networks = {
        str(path.parent.relative_to(out)): checkpoint.load_network(path.parent)[0]
        for path in sorted(out.glob("*/**/metadata.json"))
        if path.relative_to(out).parts[0] in ("teachers", "networks")
    }
    results = {}
    for path in sorted((out / "results" / "tables").rglob("*.json")):
        result = {name: value for name, value in json.loads(path.read_text()).items() if name not in TIMES}
        for field in ("data_dir", "teacher_checkpoint"):
            result.get("config", {}).pop(field, None)
        results[path.name] = result
    for path in sorted((out / "results" / "curves").rglob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        results[path.name] = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    return networks, results


@pytest.mark.slow
def test_stopped_campaign_ends_as_one_in_one_go(short, tmp_path, monkeypatch, capsys):
    go(tmp_path / "whole")
    text = capsys.readouterr().out
    assert "failed: bench" in text
    assert "No module named" in text
    assert "skipped: given: there is no resnet20" in text
    assert text.strip().endswith("nothing is left")

    # The signal comes when a network has logged its sixth step, as from the timer.
    log = train.Student.log

    def stop(self, step, totals, speed):
        log(self, step, totals, speed)
        if step == 6 and self.run.config["method"] != "kd":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Student, "log", stop)
    go(tmp_path / "a")
    text = capsys.readouterr().out
    assert "next: teacher, about" in text
    assert "from step 7 of 12 of training\nthen: students, time unknown" in text
    assert not (tmp_path / "a" / "teachers").exists()
    for before, after in ("ab", "bc"):  # the state alone goes to another folder
        (tmp_path / after).mkdir()
        (tmp_path / before / "state").rename(tmp_path / after / "state")
        names = campaign.Campaign(tmp_path / after, "smoke", 1, "", None, 1 << 26).files()
        assert not any("/last/" in name for name in names)
        go(tmp_path / after)  # on from step 7: stopped again in the next item
    text = capsys.readouterr().out
    assert text.strip().endswith("nothing is left")

    (networks, results), (there, found) = outcome(tmp_path / "whole"), outcome(tmp_path / "c")
    assert found == results
    assert set(there) == set(networks) == {
        "teachers/resnet8", "networks/students/resnet8/kd", "networks/students/resnet8/ranking_alignment",
    }  # fmt: skip
    for name, variables in networks.items():
        assert_same(there[name], variables)
    metadata = checkpoint.read_metadata(tmp_path / "c" / "teachers" / "resnet8")
    assert (metadata["kernels"], metadata["num_classes"], 0 <= metadata["top1"] <= 100) == ("float16", 100, True)
    table = tables.markdown([4], "tiny", tables.load(tmp_path / "c" / "results" / "tables", "tiny"))
    assert "Ours: 2 results" in table


@pytest.mark.slow
def test_machine_that_vanishes_takes_no_more_than_what_followed_the_last_packing(short, tmp_path, monkeypatch, capsys):
    alone = campaign.Item("alone", (cells.Cell(campaign.PAIR, "cross_entropy", 0),))
    monkeypatch.setattr(campaign, "items", lambda scale: [alone])
    plan = campaign.Campaign.plan

    def saved_at_every_step(self, item):
        planned = plan(self, item)
        for each in planned:
            each.config.checkpoint_seconds = 0.0
        return planned

    monkeypatch.setattr(campaign.Campaign, "plan", saved_at_every_step)
    monkeypatch.setitem(campaign.SCALES, "smoke", campaign.SCALES["smoke"]._replace(pack=0.02))
    log = train.Student.log

    def carry_away(self, step, totals, speed):
        log(self, step, totals, speed)
        until = time.monotonic() + 30
        while step == 6 and not (tmp_path / "b").exists():
            assert time.monotonic() < until, "nothing was packed"
            with contextlib.suppress(OSError, ValueError):  # it is being replaced
                shutil.rmtree(tmp_path / "look", ignore_errors=True)
                shutil.copytree(tmp_path / "a" / "state", tmp_path / "look" / "state")
                pack.unpack(tmp_path / "look" / "state", tmp_path / "look")
                if any((tmp_path / "look" / "work").rglob("checkpoints/*")):
                    shutil.copytree(tmp_path / "look" / "state", tmp_path / "b" / "state")

    monkeypatch.setattr(train.Student, "log", carry_away)
    go(tmp_path / "a")
    capsys.readouterr()
    go(tmp_path / "b")
    text = capsys.readouterr().out
    assert re.search(r"resnet8 .*learns .* by cross_entropy.* goes on from step [3-6]\n", text)
    assert text.strip().endswith("nothing is left")
    (networks, results), (there, found) = outcome(tmp_path / "a"), outcome(tmp_path / "b")
    assert found == results
    assert set(there) == set(networks) == {"networks/alone/resnet8/cross_entropy"}
    for name, variables in networks.items():
        assert_same(there[name], variables)


def test_runs_of_an_item_follow_each_other(short, tmp_path, monkeypatch, capsys):
    members = tuple(cells.Cell(campaign.PAIR, name, 0) for name in ("teacher", "cross_entropy", "kd"))
    monkeypatch.setattr(campaign, "items", lambda scale: [campaign.Item("fair", members)])
    monkeypatch.setattr(campaign.Campaign, "lacking", lambda self, item: "")
    found = []

    def execute(todo, *args):
        (each,) = todo
        found.append(each.cells[0].name)
        each.folder.mkdir(parents=True, exist_ok=True)
        (each.folder / "metrics.jsonl").write_text('{"step": 6, "images_per_second": 8.0}\n')
        return {"fair": MemoryError("none")}  # so that nothing is done, and all is estimated

    monkeypatch.setattr(run, "execute", execute)
    go(tmp_path / "out")
    assert found == ["teacher", "cross_entropy", "kd"]
    seconds = 12 * 8 / 8 * 3  # of each, 12 steps of 8 images, at 8 images a second
    assert f"next: fair, about 0:00:{seconds:02.0f} from step 0 of 12 of training" in capsys.readouterr().out
    (metrics,) = (tmp_path / "out" / "work").rglob("kd*/metrics.jsonl")
    metrics.unlink()
    go(tmp_path / "out", minutes=0)
    assert "next: fair, more than 0:00:24 from step 0 of 12 of training" in capsys.readouterr().out


def test_state_is_packed_while_runs_are_under_way(begun, small_teacher, monkeypatch):
    """As it lies: a network that may be replaced at any moment is not rewritten."""
    out, _ = begun
    monkeypatch.setitem(campaign.SCALES, "smoke", campaign.SCALES["smoke"]._replace(pack=0.02))
    write, found = run.execute, []

    def execute(todo, *args):
        errors, (each,) = write(todo, *args), todo
        shutil.copytree(small_teacher, each.folder / "best")
        until = time.monotonic() + 20
        while not found and time.monotonic() < until:
            time.sleep(0.02)
            with contextlib.suppress(OSError, ValueError):  # it is being replaced
                shutil.rmtree(out.parent / "look", ignore_errors=True)
                pack.unpack(out / "state", out.parent / "look")
                found.extend((out.parent / "look").rglob("best/metadata.json"))
        return errors

    monkeypatch.setattr(run, "execute", execute)
    go(out, "--items", "teacher")
    (metadata,) = found
    assert "kernels" not in json.loads(metadata.read_text())
    assert (metadata.parents[1] / "checkpoints" / "7" / "array").read_text() == "numbers"
    assert json.loads((out.parent / "look" / "campaign.json").read_text())["dtype"] == "float32"


@pytest.fixture
def begun(short, tmp_path, monkeypatch):
    """A campaign's folder, and the errors that its runs end in; files stand in for what they would write."""
    out, errors = tmp_path / "out", {}

    def execute(group, *args):
        (path,) = (run.folder for run in group)
        (path / "checkpoints" / "7").mkdir(parents=True, exist_ok=True)
        (path / "checkpoints" / "7" / "array").write_text("numbers")
        for name, text in (("config.json", "{}"), ("metrics.jsonl", '{"step": 6}\n')):
            (path / name).write_text(text)
        return errors

    monkeypatch.setattr(run, "execute", execute)
    return out, errors


def test_run_that_found_no_memory_goes_on_in_the_next_slice(begun, capsys):
    out, errors = begun
    errors["teacher"] = MemoryError("the device's memory does not suffice")
    go(out)
    text = capsys.readouterr().out
    assert "stopped: teacher: teacher: the device's memory does not suffice" in text
    assert "next: teacher, " in text
    kept = [name for name in campaign.Campaign(out, "smoke", 1, "", None, 1 << 26).files() if "/checkpoints/7/" in name]
    assert len(kept) == 1
    go(out)  # not for the first time: the others are not held up
    text = capsys.readouterr().out
    assert "stopped: teacher: teacher: the device's memory does not suffice" in text
    assert "skipped: students: there is no resnet8" in text


def test_run_that_diverged_leaves_its_curve(begun, capsys):
    out, errors = begun
    errors["teacher"] = FloatingPointError("step 5 is not finite")
    go(out)
    text = capsys.readouterr().out
    assert "failed: teacher: teacher: step 5 is not finite" in text
    assert "skipped: students" in text
    assert not (out / "work" / "teacher").exists()
    shutil.rmtree(out / "state")
    made = campaign.Campaign(out, "smoke", 9, "", None, 1 << 26)
    made._begin(campaign.items("smoke")[1])
    assert pack.state(out / "state")  # at once, and not at the slice's end alone
    assert (out / "results" / "curves" / "teacher" / "resnet8" / "teacher.jsonl").read_text() == '{"step": 6}\n'


def test_packing_goes_on_after_what_it_cannot_do(begun, monkeypatch, capsys):
    out, _ = begun
    monkeypatch.setitem(campaign.SCALES, "smoke", campaign.SCALES["smoke"]._replace(pack=0.02))
    files, tries = campaign.Campaign.files, []

    def fail(self, halved=True):
        if not halved:
            tries.append(1)
            if len(tries) == 1:
                raise FileNotFoundError("it was replaced")
            if len(tries) < 4:
                raise MemoryError("no memory")
        return files(self, halved)

    def execute(*_):
        until = time.monotonic() + 20
        while len(tries) < 6 and time.monotonic() < until:
            time.sleep(0.02)
        assert pack.state(out / "state")
        assert _packers()
        return {}

    monkeypatch.setattr(campaign.Campaign, "files", fail)
    monkeypatch.setattr(run, "execute", execute)
    go(out, "--items", "teacher")
    assert capsys.readouterr().out.count("note: the state could not be packed: no memory\n") == 1
    assert not _packers()


def _packers():
    return [thread for thread in threading.enumerate() if thread.name == "packer"]


def test_nothing_is_packed_while_an_items_files_are_moved(begun, monkeypatch):
    found, keep = [], campaign.Campaign._keep

    def moved(self, *arguments):
        found.append(self._files_rest.locked())
        return keep(self, *arguments)

    monkeypatch.setattr(campaign.Campaign, "_keep", moved)
    go(begun[0], "--items", "teacher")
    assert found == [True]


def test_best_network_that_cannot_be_read_does_not_keep_the_state_from_being_packed(tmp_path, capsys):
    folder = tmp_path / "work" / "teacher" / "a"
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "metadata.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    campaign.Campaign(tmp_path, "smoke", 1, "", None, 1 << 26).save()
    assert re.search(rf"note: packed as it is: .*{re.escape(str(folder / 'best'))}", capsys.readouterr().out)
    pack.unpack(tmp_path / "state", tmp_path / "to")
    assert (tmp_path / "to" / "work" / "teacher" / "a" / "best" / "metadata.json").exists()


def test_benchmark_that_found_no_memory_has_another_slice(begun, monkeypatch, capsys):
    def ran(command, **_):
        return subprocess.CompletedProcess(command, 1, "(64, 100) 3 us\n", "RESOURCE_EXHAUSTED: Out of memory\n")

    monkeypatch.setattr(subprocess, "run", ran)
    states = []
    for _ in range(2):
        go(begun[0], "--items", "bench")
        assert (
            "(64, 100) 3 us\nRESOURCE_EXHAUSTED: Out of memory\nfailed: RESOURCE_EXHAUSTED" in capsys.readouterr().out
        )
        states.append(json.loads((begun[0] / "campaign.json").read_text())["items"]["bench"]["state"])
    assert states == ["stopped", "failed"]


def test_slice_that_a_signal_cuts_off_says_so(begun, monkeypatch):
    out, _ = begun
    arguments = ["--out", str(out), "--scale", "smoke", "--minutes"]
    assert campaign.main([*arguments, "0"]) is False
    monkeypatch.setattr(run, "execute", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert campaign.main([*arguments, "9"]) is True
    assert json.loads((out / "campaign.json").read_text())["items"].keys() == {"bench"}
    assert (out / "state" / "part-0").exists()


def test_slice_ends_when_its_minutes_are_over(begun, monkeypatch):
    monkeypatch.setattr(run, "execute", lambda *_, **__: time.sleep(5) or {})
    flags = ["--out", str(begun[0]), "--scale", "smoke", "--minutes", "0.01", "--items", "teacher"]
    assert campaign.main(flags) is True


def test_no_run_is_begun_that_would_compile_and_stop(begun, monkeypatch, capsys):
    """Of 84 seconds, 30 are for the end, and no run begins with less than 60."""
    monkeypatch.setitem(campaign.SCALES, "smoke", campaign.Scale("tiny", margin=30.0, least=60.0, pack=60.0))
    monkeypatch.setattr(run, "execute", lambda *_, **__: pytest.fail("it began"))
    go(begun[0], minutes=1.4)
    assert "next: teacher, time unknown" in capsys.readouterr().out
    seen = []

    def execute(group, *_):
        seen.extend(group)
        made._end -= 60 * 8  # that they took
        return {}

    monkeypatch.setattr(run, "execute", execute)
    made = campaign.Campaign(begun[0], "smoke", 9, "", None, 1 << 26)
    two = tuple(cells.Cell(campaign.PAIR, "cross_entropy", seed) for seed in range(2))  # not in one program
    assert not made._begin(campaign.Item("two", two))
    assert len(seen) == 1


def test_signal_waits_for_what_must_not_be_done_by_half():
    done = []

    def work():
        with campaign._uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("all")

    with pytest.raises(SystemExit):
        work()
    assert done == ["all"]


def test_item_whose_teacher_comes_later_is_done_then(begun, small_teacher, tmp_path):
    out, _ = begun
    flags = ["--out", str(out), "--scale", "smoke", "--minutes", "9", "--items", "given"]
    campaign.main(flags)
    assert json.loads((out / "campaign.json").read_text())["items"]["given"]["state"] == "skipped"
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "resnet20").symlink_to(small_teacher)
    campaign.main([*flags, "--teachers", str(tmp_path / "teachers")])
    assert json.loads((out / "campaign.json").read_text())["items"]["given"]["state"] == "done"


def test_benchmark_does_not_share_the_device_with_this_process(begun, monkeypatch, capsys):
    listed = campaign.items("smoke")
    monkeypatch.setattr(campaign, "items", lambda scale: [listed[1], listed[0]])  # a run, and a benchmark
    monkeypatch.setattr(campaign.Campaign, "_benchmark", lambda *_: pytest.fail("it began"))
    go(begun[0])
    assert "bench is left for the next slice: it takes the device alone" in capsys.readouterr().out


def test_state_has_the_newest_checkpoint_of_runs_under_way_and_half_of_their_best(small_teacher, tmp_path):
    folder = tmp_path / "work" / "teacher" / "a"
    for step in (7, 10):
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "array").write_text("numbers")
    (folder / "config.json").write_text("{}")
    shutil.copytree(small_teacher, folder / "best")
    made = campaign.Campaign(tmp_path, "smoke", 1, "", None, 1 << 26)
    assert [name for name in made.files() if "checkpoints" in name] == ["work/teacher/a/checkpoints/10/array"]
    assert checkpoint.read_metadata(folder / "best")["kernels"] == "float16"
    (folder / "summary.json").write_text("{}")
    assert not [name for name in made.files() if "checkpoints" in name]


@pytest.mark.parametrize("minutes", [0, 9])
def test_folder_in_which_another_slice_is_under_way_is_left_alone(minutes, tmp_path):
    with (
        run_folder.locked(tmp_path),
        pytest.raises(SystemExit, match=r"Error: --out=.*: another slice is under way there; wait for it, or stop it$"),
    ):
        go(tmp_path, minutes=minutes)
    assert not list(tmp_path.iterdir())


def test_state_that_is_too_large_is_written_and_said(begun, capsys):
    out, errors = begun
    errors["teacher"] = MemoryError("none")
    (out / "teachers").mkdir(parents=True)
    (out / "teachers" / "array").write_bytes(np.random.default_rng(0).bytes(1 << 20))
    campaign.main(["--out", str(out), "--scale", "smoke", "--minutes", "9", "--state_mib", "1"])
    assert re.search(
        r"WARNING: state: 1\.0 MiB in .* are more than --state_mib=1: teachers/array 1\.0, ", capsys.readouterr().out
    )
    again = out.with_name("again")
    again.mkdir()
    shutil.copytree(out / "state", again / "state")
    campaign.main(["--out", str(again), "--scale", "smoke", "--minutes", "0"])
    assert (again / "teachers" / "array").stat().st_size == 1 << 20
    assert len(list(again.rglob("checkpoints/7/array"))) == 1


def test_damaged_state_is_no_new_campaign(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "part-0").write_bytes(b"half")
    with pytest.raises(SystemExit, match="part-0 is damaged; copy it again"):
        go(tmp_path, minutes=0)
    (tmp_path / "state" / "part-0").rename(tmp_path / "state" / "part-1")
    with pytest.raises(SystemExit, match="part-1 is damaged; copy it again"):
        go(tmp_path, minutes=0)


def test_benchmark_runs_where_the_runs_before_it_are_skipped(short, tmp_path, monkeypatch):
    listed = campaign.items("smoke")
    monkeypatch.setattr(campaign, "items", lambda scale: [listed[2], listed[0]])  # without its teacher, and a benchmark
    monkeypatch.setattr(campaign.Campaign, "_benchmark", lambda *_: {"state": "done"})
    go(tmp_path)
    states = json.loads((tmp_path / "campaign.json").read_text())["items"]
    assert (states["students"]["state"], states["bench"]["state"]) == ("skipped", "done")


def test_trained_teacher_of_the_name_of_a_given_one_is_in_the_state(short, tmp_path, monkeypatch):
    def halve(source, target, **facts):
        if source != target:
            shutil.copytree(source, target)

    monkeypatch.setattr(campaign, "halve", halve)
    monkeypatch.setattr(campaign.evaluate, "evaluate", lambda *_: {"top1": 1.0, "top5": 2.0, "loss": 3.0})
    campaign._random_data(tmp_path / "data")
    made = campaign.Campaign(tmp_path, "smoke", 9, str(tmp_path / "data"), None, 1 << 26)
    made.given(["resnet8", "vgg8"])  # in a slice before, and not in this one
    item = campaign.items("smoke")[1]
    planned = made.plan(item)
    folder = planned[0].folder
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "metadata.json").write_text("{}")
    facts = dict.fromkeys(("images_per_second", "commit", "device", "date"), 0) | {"best": {"top1": 1.0}}
    (folder / "summary.json").write_text(json.dumps(facts))
    (folder / "metrics.jsonl").write_text('{"images_per_second": 4.0}\n{"images_per')  # killed as it wrote
    assert made.estimate(item).endswith("of training")
    made._keep(item, planned)
    assert "teachers/resnet8/metadata.json" in made.files()
    assert made.record["given"] == ["vgg8"]


def test_state_of_another_slice_than_the_folder_is_an_error(begun, capsys):
    out, errors = begun
    errors["teacher"] = MemoryError("none")
    go(out)
    old = out.with_name("old")
    shutil.copytree(out / "state", old / "state")
    go(old, minutes=0)
    go(old, minutes=0)  # its own
    (out / "teachers").mkdir()
    (out / "teachers" / "new").write_text("new")
    go(out)
    shutil.rmtree(old / "state")
    shutil.copytree(out / "state", old / "state")
    with pytest.raises(
        SystemExit, match=r"Error: --out=.*: state/ is not the state of what else it holds; put it into a"
    ):
        go(old, minutes=0)
    shutil.rmtree(old / "state")
    go(old, minutes=0)


def test_estimate_where_all_results_are_there(short, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "missing", lambda *_: [])
    made = campaign.Campaign(tmp_path, "smoke", 1, "", None, 1 << 26)
    assert made.estimate(campaign.items("smoke")[1]) == "about 0:00:00 of training"


def test_estimate_is_of_the_steps_that_are_left_at_the_last_speed(short, tmp_path):
    campaign._random_data(tmp_path / "data")
    made = campaign.Campaign(tmp_path, "smoke", 1, str(tmp_path / "data"), None, 1 << 26)
    item = campaign.items("smoke")[1]
    (planned,) = made.plan(item)
    for step in (7, 10):
        (planned.folder / "checkpoints" / str(step)).mkdir(parents=True)
    (planned.folder / "metrics.jsonl").write_text('{"images_per_second": 1.0}\n{"images_per_second": 4.0}\n')
    assert made.estimate(item) == "about 0:00:04 from step 10 of 12 of training"  # two steps of eight images


def test_benchmark_has_a_whole_slice_before_it_fails(short, tmp_path, monkeypatch, capsys):
    item = campaign.Item("slow", command=("benchmarks.slow",), seconds=300)
    monkeypatch.setattr(campaign, "items", lambda scale: [item])
    monkeypatch.setattr(campaign.Campaign, "_benchmark", lambda *_: None)  # not done within the slice

    def begin(minutes):
        made = campaign.Campaign(tmp_path, "smoke", minutes, "", None, 1 << 26)
        made._whole = made.left()
        return made

    made = begin(9)
    made._end -= 60 * 2  # another took two minutes
    assert made._begin(item)
    assert made.open_items() == [item]
    made._end -= 60 * 3
    assert made._begin(item)
    assert "slow is left for the next slice" in capsys.readouterr().out
    begin(2)._begin(item)  # shorter than it takes, and whole
    made = begin(0)
    assert made.open_items() == []
    assert made.record["items"]["slow"]["note"] == "not done within a slice; give more --minutes"


def test_campaign_of_another_scale_or_dtype_is_an_error(tmp_path):
    (tmp_path / "campaign.json").write_text(json.dumps({"scale": "full", "dtype": "bfloat16", "items": {}}))
    with pytest.raises(SystemExit, match=r"--scale=smoke.*holds a campaign of full"):
        go(tmp_path)
    with pytest.raises(SystemExit, match=r"--dtype=float32.*holds a campaign of bfloat16"):
        campaign.main(["--out", str(tmp_path), "--dtype", "float32", "--minutes", "0"])
    made = campaign.Campaign(tmp_path, "full", 1, "", None, 1 << 26)  # on a CPU, and goes on as it began
    assert {each.config.dtype for item in made.open_items() for each in made.plan(item)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--minutes", "-1"], "--minutes: '-1' is not a number of 0 or more"),
        (["--minutes", "nan"], "--minutes: 'nan' is not a number of 0 or more"),
        (["--teachers", "nowhere"], "--teachers: there is no folder 'nowhere'"),
    ],
)
def test_wrong_flags_are_named(given, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        campaign.main(["--out", str(tmp_path / "out"), *given])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_absent_data_is_said_before_the_first_benchmark(tmp_path, monkeypatch, offline):
    monkeypatch.setattr(campaign.Campaign, "_benchmark", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit, match=r"Error: --data_dir=.*holds no cifar100"):
        campaign.main(["--out", str(tmp_path / "out"), "--minutes", "9", "--data_dir", str(tmp_path)])
    assert not (tmp_path / "out").exists()


def test_nothing_done_yet(tmp_path, capsys):
    campaign.main(["--out", str(tmp_path), "--minutes", "0"])
    text = capsys.readouterr().out
    assert "0 of 20 items are done\nnext: soft_rank, about 0:03:20\n" in text
    assert "then: headline, time unknown" in text


def test_chosen_items_alone_in_the_lists_order(tmp_path, capsys):
    names = ["resnet56-resnet20", "soft_rank", "soft_rank"]
    campaign.main(["--out", str(tmp_path), "--minutes", "0", "--items", *names])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["next: soft_rank", "then: resnet56-resnet20"]
    notes = {"scale": "full", "items": {"soft_rank": {"state": "done"}}}
    (tmp_path / "campaign.json").write_text(json.dumps(notes))
    campaign.main(["--out", str(tmp_path), "--minutes", "0", "--items", "soft_rank"])
    assert capsys.readouterr().out == "1 of 20 items are done\nnothing is left of the chosen items\n"
    with pytest.raises(SystemExit, match=r"Error: --items: 'kd' is not in the list; it has soft_rank, "):
        campaign.main(["--out", str(tmp_path), "--minutes", "0", "--items", "kd"])


def test_views_of_the_weak_item(tmp_path):
    made = campaign.Campaign(tmp_path, "full", 1, "", None, 1 << 26)
    (weak,) = (item for item in campaign.items("full") if item.name == "resnet56-resnet20-weak")
    assert [each.config.views for each in made.plan(weak)][1:] == ["weak"]  # the first is its teacher's


def test_given_teachers_are_taken_once(teacher, tmp_path):
    (tmp_path / "given" / "resnet20").mkdir(parents=True)
    (tmp_path / "given" / "resnet20" / "best").symlink_to(teacher)
    campaign.main(["--out", str(tmp_path), "--scale", "smoke", "--teachers", str(tmp_path / "given"), "--minutes", "0"])
    assert run.find(tmp_path / "teachers", "resnet20") == tmp_path / "teachers" / "resnet20"
    (tmp_path / "teachers" / "trained").write_text("here")
    found = campaign.Campaign(tmp_path, "smoke", 0, "", None, 1 << 26).files()
    assert [name for name in found if name.startswith("teachers/")] == ["teachers/trained"]
    assert campaign._take_teachers(tmp_path / "given", tmp_path / "teachers", "smoke") == []  # there already


def test_headline_takes_the_teacher_of_the_repository(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(default, "TEACHERS", tmp_path)
    assert cifar100_res32x4_res8x4.get_config().teacher_checkpoint == ""
    (tmp_path / "resnet32x4").symlink_to(teacher)
    there = cifar100_res32x4_res8x4.get_config().teacher_checkpoint
    assert Path(there).resolve() == teacher.resolve()


def test_cache_is_enough_to_load_from(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    _prepared.write_cache("cifar100", tmp_path / "a", data.random("cifar100", 10, 5))
    copy = _prepared.copy_cache("cifar100", str(tmp_path / "a"), tmp_path / "b")
    assert copy == tmp_path / "b" / "cifar100" / "0.0.0.uint8"
    splits, expected = data.load("cifar100", str(tmp_path / "b")), data.random("cifar100", 10, 5)
    np.testing.assert_array_equal(splits.train.images, expected.train.images)
    np.testing.assert_array_equal(splits.test.labels, expected.test.labels)
    with pytest.raises(FileExistsError, match=r"--cache.*remove it first"):
        _prepared.copy_cache("cifar100", str(tmp_path / "a"), tmp_path / "b")


WITHOUT = """
import sys
for name in ("clu", "tqdm", "tensorboardX", "sklearn", "safetensors", "tensorflow", "tensorflow_datasets",
             "array_record", "torch"):
    sys.modules[name] = None
from configs import cifar100_res56_res20 as pair
from rkd_jax import runs, evaluate
from rkd_jax.report import campaign, run, tables
config = pair.get_config()
config.update(smoke=True, student="resnet8", teacher="resnet8")
runs.run(config, sys.argv[1])
evaluate.run(config, sys.argv[1])
"""


@pytest.mark.slow
def test_training_and_evaluation_need_few_packages(tmp_path):
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "a")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensorboardX is not installed: no event files") == 1
    assert "last: resnet8, step 4: top-1" in done.stdout
    assert not (tmp_path / "a" / "parameters.txt").exists()
    assert not (tmp_path / "a" / "tensorboard").exists()


def test_parameters_are_listed_where_clu_is(tiny, tmp_path):
    train.train_and_evaluate(tiny(num_steps=1), tmp_path / "a")
    text = (tmp_path / "a" / "parameters.txt").read_text()
    assert "Total: 1,362" in text
