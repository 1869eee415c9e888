"""Students that train in one program, batches that stream, and several steps a call."""

import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from conftest import SLOW
from ml_collections import ConfigDict
from test_train import assert_same, network, records

from rkd_jax import experiment, feed, runs, steps, train
from rkd_jax.data import Split

pytestmark = pytest.mark.usefixtures("fast_compile")
same_bits = pytest.mark.usefixtures("same_bits")


@pytest.mark.parametrize("every", [(3, 8), (5,), ()])
def test_calls_cover_every_step_once_and_stop_where_the_loop_has_work(every):
    plan = list(feed.calls(0, 50, 8, 4, *every))
    assert [step for call in plan for step in range(call.step, call.step + call.count)] == list(range(50))
    ends = {call.step + call.count for call in plan}
    assert {step for each in (8, *every) for step in range(each, 50, each)} <= ends
    assert {call.count for call in plan} <= {1, 4}
    for i, call in enumerate(plan):  # a run that goes on makes the calls that it would have made
        assert list(feed.calls(call.step, 50, 8, 4, *every)) == plan[i:]


def test_streamed_batches_are_the_resident_ones():
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), np.uint8)
    split, rng, mesh = Split(images, np.arange(20, dtype=np.int32)), jax.random.key(3), steps.data_mesh(4)
    plan = list(feed.calls(0, 10, 5, 2))
    seen = list(feed.streamed(plan, rng, 5, split, mesh, batch_size=4))
    assert [call[:2] for call in seen] == [call[:2] for call in plan]
    for call in seen:
        order = steps.epoch_order(rng, call.step // 5, 20)
        first = call.step % 5 * 4
        index = np.asarray(order)[first : first + 4 * call.count].reshape(call.count, 4)
        np.testing.assert_array_equal(call.source.index, index)
        np.testing.assert_array_equal(call.source.labels, index)
        np.testing.assert_array_equal(call.source.images, images[index])


def test_set_that_fills_the_device_streams(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 1000}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    small, large = (Split(np.zeros((n, 1, 1, 1), np.uint8), np.zeros(n, np.int32)) for n in (500, 501))
    assert [feed.streams(None, small), feed.streams(None, large)] == [False, True]
    assert [feed.streams(True, small), feed.streams(False, large)] == [True, False]


@same_bits
def test_streamed_run_has_the_bits_of_the_resident_one(tiny, tmp_path):
    train.train_and_evaluate(tiny(), tmp_path / "resident")
    train.train_and_evaluate(tiny(stream=True), tmp_path / "streamed")
    assert records(tmp_path / "streamed") == records(tmp_path / "resident")
    assert_same(network(tmp_path / "streamed"), network(tmp_path / "resident"))


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_several_steps_a_call(tiny, tmp_path, stream, monkeypatch):
    fields = {"method": "ctkd", "learning_rate": 1e-3}
    train.train_and_evaluate(tiny(**fields), tmp_path / "one")
    fields |= {"steps_per_call": 3, "stream": stream, "checkpoint_seconds": 0.0}
    train.train_and_evaluate(tiny(**fields), tmp_path / "three")
    for one, three in zip(records(tmp_path / "one"), records(tmp_path / "three"), strict=True):
        assert one.pop("kind") == three.pop("kind")
        assert one == pytest.approx(three, rel=1e-4)
    real, calls = steps.accumulate, []

    def accumulate(totals, new):  # stops in the middle
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(totals, new)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "accumulate", accumulate)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(tiny(**fields), tmp_path / "again")
    train.train_and_evaluate(tiny(**fields), tmp_path / "again")
    assert records(tmp_path / "again") == records(tmp_path / "three")
    assert_same(network(tmp_path / "again"), network(tmp_path / "three"))


def differ(*changes, **shared):
    return lambda tiny: [tiny(**shared, **change) for change in changes]


SWEEPS = {
    "lambdas": differ(*({"lam": lam} for lam in (0.1, 0.5, 1.0, 5.0, 10.0)), method="ranking_alignment"),
    "methods": differ(
        {"method": "cross_entropy", "teacher_checkpoint": ""},
        {"method": "kd"},
        {"method": "ranking_alignment"},
        views="both",
    ),
    "seeds and rates": differ({"seed": 0}, {"seed": 1, "learning_rate": 0.02}, data_seed=0),
}


@same_bits
@pytest.mark.parametrize("name", [SLOW("lambdas"), SLOW("methods"), "seeds and rates"])
def test_students_of_one_program_end_as_runs_of_their_own(tiny, tmp_path, name):
    configs = SWEEPS[name](tiny)
    together = train.train_together([(config, tmp_path / f"together{i}") for i, config in enumerate(configs)])
    for i, config in enumerate(configs):
        alone = train.train_and_evaluate(config, tmp_path / f"alone{i}")
        assert records(tmp_path / f"together{i}") == records(tmp_path / f"alone{i}")
        assert_same(network(tmp_path / f"together{i}"), network(tmp_path / f"alone{i}"))
        for field in ("best", "last", "config", "parameters"):
            assert together[i][field] == alone[field]
        assert (together[i]["together"], alone["together"]) == (len(configs), 1)


def test_students_of_one_program_draw_by_their_own_seeds(tiny, tmp_path):
    """Their dropout, for what they begin with is the same."""
    fields = {"student": "test_steps:Drawn", "method": "cross_entropy", "num_steps": 1, "data_seed": 0}
    train.train_together([(tiny(**fields, seed=seed), tmp_path / f"{seed}") for seed in (0, 1)])
    losses = [records(tmp_path / f"{seed}")[0]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]


@same_bits
@pytest.mark.slow
def test_interrupted_at_different_steps_they_go_on(tiny, tmp_path):
    """One finished, two of which one has lost its newest state, one not begun: all end as if never stopped."""
    lams = (0.1, 1.0, 5.0, 10.0)
    folders = {lam: tmp_path / f"{lam}" for lam in lams}
    tiny = functools.partial(tiny, method="ranking_alignment")
    train.train_and_evaluate(tiny(lam=0.1), folders[0.1])
    finished = records(folders[0.1])
    assert {"ranking", "student_blocks", "teacher_blocks"} <= finished[0].keys()
    real, calls = steps.accumulate, []

    def accumulate(totals, new):
        calls.append(1)
        if len(calls) == 2 * 5:
            raise KeyboardInterrupt
        return real(totals, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "accumulate", accumulate)
        with pytest.raises(KeyboardInterrupt):
            train.train_together([(tiny(lam=lam, checkpoint_seconds=0.0), folders[lam]) for lam in (1.0, 5.0)])
    saved = {int(path.name) for path in (folders[5.0] / "checkpoints").iterdir() if path.name.isdigit()}
    assert max(saved) == 4
    shutil.rmtree(folders[1.0] / "checkpoints" / "4")
    summaries = train.train_together([(tiny(lam=lam), folders[lam]) for lam in lams])
    assert [summary["config"]["lam"] for summary in summaries] == list(lams)
    assert [summary["together"] for summary in summaries] == [1, 2, 2, 1]
    assert records(folders[0.1]) == finished
    assert not (folders[5.0] / "checkpoints" / "4").exists()  # it went back to 3, and its lines to there
    for lam in lams:
        train.train_and_evaluate(tiny(lam=lam), tmp_path / f"alone{lam}")
        assert records(folders[lam]) == records(tmp_path / f"alone{lam}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (({"batch_size": 8}, {"batch_size": 16}), r"share config.batch_size, which is 8 in .*a and 16 in .*b"),
        (({"seed": 0}, {"seed": 1}), r"the seed is 0 in .*a and 1 in .*b; set config.data_seed"),
        (({"views": "weak"}, {"views": "both"}), "share config.views"),
        (({"views": "weak"}, {"views": "test_train:cropped"}), "share config.views"),
        (({"fold_teacher": False}, {"fold_teacher": True}), "share config.fold_teacher"),
        (({"stream": False}, {"stream": True}), "share config.stream"),
        (({"checkpoint_seconds": 0.0}, {"checkpoint_seconds": 9.0}), "share config.checkpoint_seconds"),
    ],
)
def test_what_they_have_to_share_is_named(tiny, tmp_path, changes, message):
    members = [(tiny(**change), tmp_path / name) for change, name in zip(changes, "ab", strict=True)]
    with pytest.raises(ValueError, match=message):
        train.train_together(members)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_sweep_from_the_config(tiny, tmp_path, capsys):
    config = tiny(sweep="beta=0.1,5 student=resnet8,resnet14", num_steps=2)
    rows = runs.sweep(config, tmp_path / "sweep")
    names = [f"beta={beta},student={student}" for beta in ("0.1", "5") for student in ("resnet8", "resnet14")]
    assert [row["sweep"] for row in rows] == names
    assert [row["config"]["beta"] for row in rows] == [0.1, 0.1, 5.0, 5.0]
    assert len(json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == names
    assert runs.sweep(config, tmp_path / "sweep") == rows  # finished: not run again


@same_bits
def test_one_that_diverges_does_not_stop_the_others(tiny, tmp_path, capsys):
    config = tiny(sweep="learning_rate=0.01,1e30", checkpoint_seconds=0.0)
    with pytest.raises(train.Diverged, match=r"step 1 of .*learning_rate=1e30 is not finite"):
        runs.sweep(config, tmp_path / "sweep")
    text = capsys.readouterr().out
    assert "step 1 is not finite; the other students go on" in text
    assert re.search(r"learning_rate=0\.01 +[\d.]+ +[\d.]+\nlearning_rate=1e30 +diverged\n", text)
    train.train_and_evaluate(tiny(learning_rate=0.01), tmp_path / "alone")
    assert records(tmp_path / "sweep" / "learning_rate=0.01") == records(tmp_path / "alone")
    assert not records(tmp_path / "sweep" / "learning_rate=1e30")
    kept = [path.name for path in (tmp_path / "sweep" / "learning_rate=1e30" / "checkpoints").iterdir()]
    assert kept == ["1"]  # the last good one
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    assert [row.get("diverged") for row in rows] == [None, True]
    assert "last" in rows[0]


def test_sweep_of_a_runs_record(tiny):
    """Of what a record has unset it does not say the type; and it has its own method's fields alone."""
    record = ConfigDict(experiment.build(tiny()).config)
    record.sweep = "seed=0,1 data_seed=0 num_train=32,64 standardize=True"
    found = [member for _, member in runs.expand(record)]
    assert [(one.seed, one.data_seed, one.num_train, one.standardize) for one in found] == [
        (0, 0, 32, True), (0, 0, 64, True), (1, 0, 32, True), (1, 0, 64, True),
    ]  # fmt: skip
    record.sweep = "num_train=3.5"
    with pytest.raises(ValueError, match=r"num_train=3.5 is no int, which config.num_train takes"):
        runs.expand(record)
    record.sweep = "decay_epochs=3"
    with pytest.raises(ValueError, match=r"decay_epochs is a list of numbers, which a sweep cannot vary"):
        runs.expand(record)
    record.sweep = "lam=1,5"
    with pytest.raises(ValueError, match=r"'lam' is no field of .*; a run's config.json has those of its own method;"):
        runs.expand(record)
    copied = tiny().copy_and_resolve_references()
    copied.sweep = "standardize=True,False"
    assert [member.standardize for _, member in runs.expand(copied)] == [True, False]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("lambda=1,2", "'lambda' is no field of the config; did you mean 'lam'"),
        ("lr=0.1", "'lr' is no field of the config; all are in configs/default.py"),
        ("lam=", "'lam=' is not FIELD=VALUE"),
        ("lam", "'lam' is not FIELD=VALUE"),
        ("lam=1,much", "lam=much is no float, which config.lam takes"),
        ("lam=1,,2", "a value of lam is empty; write the values with a comma between them"),
        ("lam=1,1.0", "names a student twice"),
        ("lam=1 lam=2", "varies lam twice; name all its values at once"),
        ("decay_epochs=1,2", "decay_epochs is a list of numbers, which a sweep cannot vary; start a run for each"),
        ("compare=True,False", "compare is of the whole sweep; take it out, for a comparison is another"),
        ("smoke=True,False", "smoke is of the whole sweep; set config.smoke$"),
        ("method=kd,takd", "method=takd trains a chain of networks"),
        ("method=kd,dkf", "did you mean 'dk"),
        (
            f"teacher_checkpoint={240 * 'x'},y",
            r"named .teacher_checkpoint=x+. and so on, 259 letters, and file systems take 255",
        ),
    ],
)
def test_wrong_sweep_is_named(tiny, tmp_path, sweep, message):
    with pytest.raises(ValueError, match=message):
        runs.run(tiny(sweep=sweep), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_no_comparison(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"two experiments; set config.compare=False, or no sweep$"):
        runs.run(tiny(sweep="lam=1,5", compare=True), tmp_path / "run")


def test_several_sweeps_in_one(tiny):
    config = tiny(sweep="method=kd; method=ranking_alignment lam=1,5")
    found = runs.expand(config)
    assert [name for name, _ in found] == [
        "method=kd",
        "method=ranking_alignment,lam=1",
        "method=ranking_alignment,lam=5",
    ]
    assert [(member.method, member.lam) for _, member in found] == [
        ("kd", None), ("ranking_alignment", 1.0), ("ranking_alignment", 5.0),
    ]  # fmt: skip
    for sweep in ("lam=1,5;", " "):
        with pytest.raises(ValueError, match=r"' ?' is not FIELD=VALUE,VALUE"):
            runs.expand(tiny(sweep=sweep))
    assert [member.nesterov for _, member in runs.expand(tiny(sweep="nesterov=True,False"))] == [True, False]


def test_spread_over_seeds():
    def row(name, last, best):
        return {"sweep": name, "last": {"top1": last}, "best": {"top1": best}}

    rows = [row("method=kd,seed=0", 90.0, 91.0), row("method=kd,seed=1", 94.0, 95.0), row("method=dkd,seed=0", 80, 80)]
    rows += [{"sweep": "method=kd,seed=2", "diverged": True}, {"sweep": "method=dkd,seed=1", "diverged": True}]
    (found,) = runs.over_seeds(rows)
    assert (found["sweep"], found["seeds"], found["last"]["mean"], found["best"]["mean"]) == (
        "method=kd",
        2,
        92.0,
        93.0,
    )
    assert found["last"]["std"] == pytest.approx(8**0.5)
    text = runs.sweep_table(rows, [found])
    assert re.search(r"method=kd,seed=0 +90\.00 +91\.00\n", text)  # the last first
    assert re.search(r"method=kd,seed=2 +diverged\n", text)
    assert "92.00 ± 2.83  93.00 ± 2.83  (2 seeds)" in text
    (found,) = runs.over_seeds([row("seed=0", 1.0, 1.0), row("seed=1", 1.0, 1.0)])
    assert runs.sweep_table([row("seed=0", 1.0, 1.0)], [found]).splitlines()[-1].startswith("all ")
    assert runs.over_seeds([row("lam=1", 1.0, 1.0), row("lam=2", 1.0, 1.0)]) == []
    (found,) = runs.over_seeds([row(f"seed={i},data_seed={i}", 1.0, 1.0) for i in (0, 1)])
    assert found["seeds"] == 2


def test_a_swept_path_is_one_folders_name(tiny):
    config = tiny(sweep="student_checkpoint=runs/a/best,runs/b/best")
    assert [name for name, _ in runs.expand(config)] == [f"student_checkpoint=runs_{x}_best" for x in "ab"]


def test_sweep_of_what_smoke_sets_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"config\.smoke sets config\.batch_size itself"):
        runs.run(tiny(sweep="batch_size=4,8", smoke=True), tmp_path / "run")


def test_eps_1_is_the_squared_error_of_the_centred_logits(tiny, tmp_path):
    """The same training run, as long as rounding has not grown: in one block, there is no rank in the soft ranks."""
    configs = [tiny(method="ranking_alignment", lam=5.0, eps=1.0, learning_rate=1e-3), tiny(learning_rate=1e-3)]
    configs[1].method = "benchmarks.fair_ablation:CentredMSE"
    train.train_together([(config, tmp_path / f"{i}") for i, config in enumerate(configs)])
    ranks, logits = (records(tmp_path / f"{i}") for i in range(2))
    for one, other in zip(ranks, logits, strict=True):
        if one["kind"] == "train":
            assert one["student_one_block"] == one["teacher_blocks"] == 1
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
