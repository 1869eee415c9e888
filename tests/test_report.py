"""The paper's tables: its numbers, the plan of what to run, resuming, and the Markdown."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from rkd_jax import data, methods, run_folder
from rkd_jax.report import cells, paper, run, tables

pytestmark = pytest.mark.usefixtures("fast_compile")

PAIR = "cifar100_res32x4_res8x4"
EVERY = [1, 2, 3, 4, 5]


def test_paper_is_complete():
    shapes = [(t.number, len(t.rows), len(t.pairs)) for t in paper.TABLES]
    assert shapes == [(1, 21, 6), (2, 21, 5), (3, 9, 2), (4, 6, 1), (5, 5, 1), (5, 5, 1)]
    assert all(len(row.numbers) == len(t.pairs) for t in paper.TABLES for row in t.rows)
    assert sum(x is None for t in paper.TABLES for row in t.rows for x in row.numbers) == 3
    rows = [(t, row) for t in paper.TABLES for row in t.rows]
    known = {(t.number, row.name, pair): x for t, row in rows for pair, x in zip(t.pairs, row.numbers, strict=True)}
    assert known[1, "FCFD", "cifar100_res110_res32"] is None
    assert known[1, "MLKD", PAIR] == 77.08
    assert known[2, "CRLD", "cifar100_res50_mv2"] == 71.36
    assert known[3, "KD + DOT", "tinyimagenet_res18_sv2"] == 65.75
    assert known[4, "CE + RA(Spearman)", PAIR] == 77.44
    assert known[5, "10", "tinyimagenet_res18_mv2"] == 64.30
    for t in paper.TABLES:  # the paper's method is the best of its table, but for the teacher
        for column in range(len(t.pairs)):
            ours = [row.numbers[column] for row in t.rows if row.cell == "ranking_alignment"]
            assert ours == [max(row.numbers[column] or 0 for row in t.rows if row.cell != "teacher")]


def test_paper_has_no_number_of_another_column_or_with_a_digit_wrong():
    """A network has one accuracy, as a teacher and alone, on a data set; and the sum over each table."""
    of_network = {}
    for t in paper.TABLES[:3]:
        for cell, side in (("teacher", 0), ("cross_entropy", 1)):
            (row,) = (row for row in t.rows if row.cell == cell)
            for pair, x in zip(t.pairs, row.numbers, strict=True):
                of_network.setdefault((cell, t.number == 3, paper.PAIRS[pair].split(" > ")[side]), set()).add(x)
    found = [{name: x for (_, tiny, name), (x,) in of_network.items() if tiny == which} for which in (False, True)]
    assert found[0] == {
        "resnet56": 72.34, "resnet32x4": 79.42, "wrn_40_2": 75.61, "vgg13": 74.64, "resnet110": 74.31,
        "ResNet50": 79.34, "resnet20": 69.06, "resnet8x4": 72.50, "wrn_16_2": 73.26, "wrn_40_1": 71.98,
        "vgg8": 70.36, "resnet32": 71.14, "ShuffleV2": 71.82, "MobileNetV2": 64.60, "ShuffleV1": 70.50,
    }  # fmt: skip
    assert found[1] == {"ResNet18": 62.99, "MobileNetV2": 56.28, "ShuffleV2": 60.78}
    sums = [sum(x for row in t.rows for x in row.numbers if x) for t in paper.TABLES]
    assert sums == pytest.approx([9254.48, 7530.02, 1126.34, 455.65, 385.18, 317.66], abs=0.005)


def test_columns_are_the_configs_pairs():
    for pair, name in paper.PAIRS.items():
        config = importlib.import_module(f"configs.{pair}").get_config()
        assert name == f"{config.teacher} > {config.student}"
        assert pair.startswith(config.dataset.replace("_", ""))


def test_every_cell_is_a_config_of_its_method():
    for scale in cells.SCALES:
        for cell in cells.select(EVERY, 1):
            config = cells.configure(cell, scale)
            assert config.method == ("cross_entropy" if cell.name == "teacher" else cell.method)
    for name, fields in cells.SCALES["smoke"].toy.items():
        config = cells.configure(cells.Cell(PAIR, name, 0), "smoke")
        assert {field: config[field] for field in fields} == fields
    (lam,) = (row for row in paper.TABLES[4].rows if row.name == "0.1")
    assert cells.configure(cells.Cell(PAIR, lam.cell, 2), "full").lam == 0.1
    fields = {"CE + RA(L1)": ("kind", "l1"), "CE + RA(Spearman)": ("kind", "spearman")}
    fields["CE + KD + RA(L2)"] = ("kd_weight", methods.create("kd").beta)
    for row in (row for row in paper.TABLES[3].rows if row.name in fields):
        field, value = fields.pop(row.name)
        assert cells.configure(cells.Cell(PAIR, row.cell, 0), "full")[field] == value
    assert not fields
    for t in paper.TABLES[4:]:  # the row without a lambda is the one of the default
        (row,) = (row for row in t.rows if row.cell == "ranking_alignment")
        dataset = cells.configure(cells.Cell(t.pairs[0], row.cell, 0), "full").dataset
        assert methods.resolve("ranking_alignment", {}, dataset).lam == float(row.name)


def test_full_is_the_pairs_config_and_short_a_tenth_of_it():
    pair = importlib.import_module(f"configs.{PAIR}").get_config()
    pair.update(method="dkd", seed=1)
    cell = cells.Cell(PAIR, "dkd", 1)
    assert cells.configure(cell, "full").to_dict() == pair.to_dict()
    short = cells.configure(cell, "short")
    assert (short.num_epochs, short.decay_epochs, short.warmup_epochs) == (30, (15, 18, 21), 2)
    assert short.num_train == 10_000
    teacher = cells.configure(cell._replace(name="teacher"), "full")
    assert (teacher.student, teacher.num_epochs, teacher.views) == ("resnet32x4", 240, "weak")
    alone = cells.configure(cell._replace(name="cross_entropy"), "full")  # as the distilled ones, not as the teachers
    assert (alone.student, alone.teacher, alone.num_epochs, alone.views) == ("resnet8x4", "", 300, "both")


def counts(numbers, seeds, scale="full", **where):
    chosen = cells.select(numbers, seeds, **where)
    return len(chosen), len(run.plan(chosen, scale, Path("w"), Path("none")))


def test_tiny_has_small_networks_for_every_pair():
    for pair in paper.PAIRS:
        config = cells.configure(cells.Cell(pair, "kd", 0), "tiny")
        assert {config.teacher, config.student} <= {"resnet8", "resnet14", "resnet20"}
        assert config.num_train == 320


def test_plan_shares_what_cells_have_in_common(flags, trainer, tmp_path):
    # A table's teachers and students alone are shared between its pairs; Tables 4 and 5 have cells of Table 1.
    assert counts([1], 1) == (6 * 20, 5 + 6 + 6 * 18)
    assert counts([1], 3) == (6 + 3 * 6 * 19, 5 + 3 * (6 + 6 * 18))
    assert counts([2], 1) == (5 * 20, 4 + 3 + 5 * 18)
    assert counts([3], 1) == (2 * 9, 1 + 2 + 2 * 7)
    assert counts([4], 1) == (6, 6 + 1)  # and the teacher
    assert counts([5], 1) == (10, 10 + 2)
    assert counts([1, 4, 5], 1, pairs=[PAIR]) == (20 + 3 + 4, 20 + 3 + 4)
    assert counts(EVERY, 1, "smoke") == (249, 30)
    assert counts(EVERY, 1, names=["cross_entropy"]) == (13, 11)  # no teacher is asked for
    run.main([*flags, "--table", "1", "--methods", "cross_entropy"])
    assert trainer.names == ["cross_entropy-seed0"]
    assert len(list(tmp_path.glob("r/smoke/*/cross_entropy-seed0.json"))) == 6  # its result is all pairs'


def test_plan_names_runs_and_puts_teachers_first():
    chosen = cells.select([4], 2)
    planned = run.plan(chosen, "full", Path("w"), Path("none"))
    names = [each.name for each in planned]
    place = "cifar100_resnet32x4_resnet8x4/"
    assert names[:4] == [
        "cifar100_resnet32x4/teacher-seed0",
        "cifar100_resnet8x4/cross_entropy-seed0",
        place + "kd-seed0",
        place + "ranking_alignment-kind=l1-seed0",
    ]
    assert planned[2].config.teacher_checkpoint == "w/full/cifar100_resnet32x4/teacher-seed0/best"
    assert planned[-1].config.seed == 1
    sizes = [len(group) for group in run.groups(planned, 3)]
    assert sizes == [1, 3, 3, 3, 3]  # the teacher, the first seed, the second
    planned = run.plan(cells.select([1], 1, pairs=[PAIR]), "full", Path("w"), Path("none"))
    assert ["takd" in group[0].name for group in run.groups(planned, 99)] == [False, False, True]


def test_given_teacher_is_found_and_not_trained(teacher, tmp_path):
    (tmp_path / "resnet32x4").mkdir()
    (tmp_path / "resnet32x4" / "best").symlink_to(teacher)
    planned = run.plan(cells.select([4], 1), "full", Path("w"), tmp_path)
    assert planned[0].given == tmp_path / "resnet32x4" / "best"
    assert planned[2].config.teacher_checkpoint == str(planned[0].given)
    assert all(each.given is None for each in run.plan(cells.select([4], 1), "smoke", Path("w"), tmp_path))
    (tmp_path / "resnet50").symlink_to(teacher)
    assert run.find(tmp_path, "ResNet50") == tmp_path / "resnet50"
    shipped = ROOT / "teachers"
    for folders, found in (((tmp_path, shipped), planned[0].given), ((Path("none"), shipped), shipped / "resnet32x4")):
        assert run.plan(cells.select([4], 1), "full", Path("w"), *folders)[0].given == found


def test_teachers_of_the_repository_are_found_from_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run.main(["--table", "4", "--methods", "kd", "--dry_run"])
    given = re.search(r"teacher-seed0, (.*) \(1 cell", capsys.readouterr().out)[1]
    assert Path(given).resolve() == ROOT / "teachers" / "resnet32x4"


def test_every_run_has_the_fields_that_are_given(tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(run, "execute", lambda todo, *rest: planned.extend(todo) or {})
    given = ["--dtype", "bfloat16", "--eval_batch_size", "2500", "--data_dir", "elsewhere"]
    run.main(["--table", "4", "--results", str(tmp_path), "--teachers", str(tmp_path), *given])
    assert len(planned) == 3 * 6 + 1  # a teacher, to be trained, among them
    for each in planned:
        assert (each.config.dtype, each.config.eval_batch_size, each.config.data_dir) == ("bfloat16", 2500, "elsewhere")
    monkeypatch.undo()
    with pytest.raises(SystemExit, match=r"^Error: .*--data_dir"):
        run.main(["--table", "4", "--results", str(tmp_path), "--data_dir", str(tmp_path / "nowhere")])


def result(best, last, device="toaster", teacher="f1"):
    return {
        "best": {"top1": best},
        "last": {"top1": last},
        "commit": "0123456789abcdef+",
        "versions": {"jax": "0.10.2"},
        "device": device,
        "date": "2026-01-02T03:04:05+00:00",
        "config": {"teacher_fingerprint": teacher},
    }


def put(results, scale, cell, *values, **more):
    run.write(cell, run.Run("x/y", Path("w"), None, [cell]), result(*values, **more), results, scale)


@pytest.fixture
def trainer(monkeypatch):
    """Stands in for training: lists the runs, and raises what is put beside a run's name."""

    class Trainer:
        def __init__(self):
            self.names, self.errors = [], {}

        def __call__(self, members):
            self.names.extend(folder.name for _, folder in members)
            for _, folder in members:
                if folder.name in self.errors:
                    raise self.errors[folder.name]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "summary.json").touch()
            return [result(50.0, 49.0) | {"folder": folder.name} for _, folder in members]

    stand_in = Trainer()
    monkeypatch.setattr(run, "train_members", stand_in)
    return stand_in


@pytest.fixture
def flags(tmp_path):
    return ["--scale", "smoke", "--seeds", "1", "--workdir", str(tmp_path / "w"), "--results", str(tmp_path / "r")]


@pytest.mark.slow
def test_interrupted_command_goes_on(flags, trainer, tmp_path, capsys):
    flags += ["--table", "4", "--methods", "cross_entropy", "kd"]
    trainer.errors["kd-seed0"] = SystemExit(143)
    with pytest.raises(SystemExit, match="143"):
        run.main(flags)
    there = sorted(path.name for path in tmp_path.glob("r/**/*.json"))
    assert there == ["cross_entropy-seed0.json", "teacher-seed0.json"]
    trainer.errors.clear()
    run.main(flags)
    assert trainer.names == ["teacher-seed0", "cross_entropy-seed0", "kd-seed0", "kd-seed0"]
    run.main(flags)
    assert len(trainer.names) == 4
    out = capsys.readouterr().out
    assert "3 runs for 3 cells; 0 to be run" in out
    assert f"The results are in {tmp_path / 'r' / 'smoke'}; the tables are printed by" in out
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["python", "-m", "rkd_jax.report.tables"]
    tables.main(command[3:])
    assert "(scale smoke)" in capsys.readouterr().out
    (tmp_path / "r" / "smoke" / PAIR / "kd-seed0.json").unlink()
    shutil.rmtree(tmp_path / "w")  # with the teacher's network
    run.main(flags)
    assert trainer.names[4:] == ["teacher-seed0", "kd-seed0"]


@pytest.mark.parametrize(
    "error", [FloatingPointError("the loss of step 3 is not finite"), MemoryError("the device's memory is too small")]
)
def test_failed_run_does_not_stop_the_others(error, flags, trainer, tmp_path):
    trainer.errors["kd-seed0"] = error
    with pytest.raises(SystemExit, match=rf"(?s)these runs failed.*kd-seed0: {error}"):
        run.main([*flags, "--table", "4", "--together", "3"])
    assert trainer.names[-3:] == ["cross_entropy-seed0", "kd-seed0", "ranking_alignment-kind=l1-seed0"]  # one by one
    written = list(tmp_path.glob("r/smoke/*/*.json"))
    assert len(written) == 6
    assert all(json.loads(path.read_text())["folder"] == path.stem for path in written)  # each run's in its cell


def test_students_of_a_teacher_that_failed_fail_with_it(flags, trainer):
    trainer.errors["teacher-seed0"] = FloatingPointError("step 3 is not finite")
    with pytest.raises(SystemExit) as error:
        run.main([*flags, "--table", "4", "--methods", "kd", "cross_entropy"])
    failed = re.findall(r"/([\w-]+): step 3 is not finite", str(error.value))
    assert failed == ["teacher-seed0", "kd-seed0"]
    assert trainer.names == ["teacher-seed0", "cross_entropy-seed0"]


def test_run_that_another_process_makes_is_left_to_it(flags, trainer, tmp_path, capsys):
    def left():
        run.main([*flags, "--table", "4", "--methods", "kd", "cross_entropy"])
        found = capsys.readouterr().out.partition(
            "These are left to another process, which makes them or their teacher:"
        )
        return re.findall(r"/([\w-]+)$", found[2], re.MULTILINE)

    held = run_folder.Held("another run trains there")
    trainer.errors["cross_entropy-seed0"] = held
    assert left() == ["cross_entropy-seed0"]
    assert trainer.names == ["teacher-seed0", "cross_entropy-seed0", "kd-seed0"]
    for folder in ("w", "r"):
        shutil.rmtree(tmp_path / folder)
    trainer.errors = {"teacher-seed0": held}
    assert left() == ["teacher-seed0", "kd-seed0"]
    assert trainer.names[3:] == ["teacher-seed0", "cross_entropy-seed0"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--table", "6"], r"invalid choice: '6'"),
        (["--table", "4", "--only", "cifar100_vgg13_vgg8"], "'cifar100_vgg13_vgg8' is not in the tables; they have"),
        (
            ["--table", "4", "--methods", "reviewkd"],
            "'reviewkd' is not in the tables; they have cross_entropy, kd",
        ),
        (["--seeds", "0"], "--seeds: '0' is not a whole number of 1 or more"),
        (["--together", "-1"], "--together: '-1' is not a whole number of 1 or more"),
        (["--teachers", "nowhere"], "--teachers: there is no folder 'nowhere'"),
    ],
)
def test_wrong_flags_are_named(given, message, capsys):
    with pytest.raises(SystemExit) as error:
        run.main(given)
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")


def test_absent_data_is_said_before_the_first_run(trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(data, "load", lambda name, *_: (_ for _ in ()).throw(FileNotFoundError(f"{name} is not here")))
    with pytest.raises(SystemExit, match="cifar100 is not here"):
        run.main(["--table", "4", "--workdir", str(tmp_path / "w"), "--results", str(tmp_path / "r")])
    assert trainer.names == []


EXPECTED = """
## Table 4: the loss, CIFAR-100 (scale full)

### resnet32x4 > resnet8x4

|  | paper | best | last | seeds | difference |
| --- | ---: | ---: | ---: | ---: | ---: |
| CE | 72.50 | 73.00 | 72.90 | 1 | +0.50 |
| CE + KD | 73.33 |  |  |  |  |
| CE + RA(L1) | 77.12 |  |  |  |  |
| CE + RA(Spearman) | 77.44 |  |  |  |  |
| CE + RA(L2) | 77.97 | 77.00 ± 1.41 | 76.50 ± 0.71 | 2 | -0.97 |
| CE + KD + RA(L2) | 77.29 |  |  |  |  |

Ours: 3 results on kettle, toaster, 2026-01-02, jax 0.10.2, commit 0123456789+.
"""


def test_markdown_has_ours_beside_the_papers(tmp_path):
    put(tmp_path, "full", cells.Cell(PAIR, "cross_entropy", 0), 73.0, 72.9, device="kettle")
    put(tmp_path, "full", cells.Cell(PAIR, "ranking_alignment", 0), 76.0, 76.0)
    put(tmp_path, "full", cells.Cell(PAIR, "ranking_alignment", 1), 78.0, 77.0)
    text = tables.markdown([4], "full", tables.load(tmp_path, "full"))
    assert text.endswith(EXPECTED)
    assert "*Paper*, and numbers in brackets: as the paper states them" in text
    wide = tables.markdown([1], "full", tables.load(tmp_path, "full"))
    assert "| ranking alignment | (72.39) | 77.00 ± 1.41 (77.97) | (77.13) | (75.98) | (75.84) | (75.29) |\n" in wide
    toy = tables.markdown([2], "smoke", tables.load(tmp_path, "smoke"))
    assert "a toy, not comparable with the paper" in toy
    assert "ifference" not in toy
    assert "| CRLD | (78.27) | (70.39) | (71.36) |  |  |\n" in toy
    assert "| CRLD |  |  |  |  |\n" in toy  # missing in the paper, and in ours
    assert "Ours: none yet." in toy


def test_source_names_the_arithmetic_of_training():
    results = [result(1.0, 1.0) for _ in range(3)]
    del results[0]["config"]  # a teacher that was given
    for each, dtype in zip(results[1:], ("float32", "bfloat16"), strict=True):
        each["config"]["dtype"] = dtype
    start, end = "Ours: {} results on toaster, trained in ", ", 2026-01-02, jax"
    assert tables.source(results).startswith(start.format(3) + "bfloat16, float32" + end)
    assert tables.source(results[:2]).startswith(start.format(2) + "float32" + end)
    assert tables.source(results[:1]).startswith("Ours: 1 results on toaster, 2026")
    later = result(1.0, 1.0) | {"date": "2026-03-04T00:00:00+00:00"}
    assert "on toaster, 2026-01-02 to 2026-03-04, jax" in tables.source([later, results[0]])


def test_results_of_two_teachers_do_not_mix(tmp_path):
    put(tmp_path, "full", cells.Cell(PAIR, "kd", 0), 73.0, 72.9)
    takd = cells.Cell(PAIR, "takd", 0)  # whose last teacher is its assistant
    config = {"teacher_fingerprint": "f2", "assistant": "wrn_40_2"}
    run.write(takd, run.Run("x", Path("w"), None, [takd]), result(1.0, 1.0) | {"config": config}, tmp_path, "full")
    assert len(tables.load(tmp_path, "full")) == 2
    put(tmp_path, "full", cells.Cell(PAIR, "dkd", 0), 73.0, 72.9, teacher="f2")
    with pytest.raises(ValueError, match=r"kd-seed0.json had another teacher"):
        tables.load(tmp_path, "full")


def test_damaged_and_absent_results_are_named(tmp_path, capsys):
    flags = ["--table", "4", "--results", str(tmp_path / "r")]
    with pytest.raises(SystemExit):
        tables.main(flags)
    assert f"--results: there is no folder '{tmp_path / 'r'}'" in capsys.readouterr().err
    (tmp_path / "r").mkdir()
    tables.main(flags)
    assert f"No result of scale full in {tmp_path / 'r'}" in capsys.readouterr().err
    path = cells.Cell(PAIR, "kd", 0).path(tmp_path / "r", "full")
    path.parent.mkdir(parents=True)
    for text, complaint in (('{"pair"', "is damaged"), ('{"pair": "x", "cell": "kd"}', "lacks best, commit")):
        path.write_text(text)
        with pytest.raises(SystemExit, match=rf"kd-seed0.json .*{complaint}.*report.run makes it again"):
            tables.main(flags)
        with pytest.raises(SystemExit, match=rf"kd-seed0.json .*{complaint}.*report.run makes it again"):
            run.main([*flags, "--dry_run"])  # and does not count it as there


def test_smoke_runs_train_go_on_and_make_a_table(flags, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("configs.digits.get_config", tiny)
    small = {"num_train": 64, "num_steps": 4, "eval_epochs": 0.25, "views": "weak"}
    monkeypatch.setitem(cells.SCALES, "smoke", cells.SCALES["smoke"]._replace(overrides=small))
    flags += ["--table", "1", "--only", PAIR]
    run.main([*flags, "--methods", "ranking_alignment", "--dry_run"])
    assert not (tmp_path / "w").exists()
    run.main([*flags, "--methods", "teacher"])
    capsys.readouterr()
    run.main([*flags, "--methods", "ranking_alignment"])
    assert "2 runs for 2 cells; 1 to be run" in capsys.readouterr().out
    folder = tmp_path / "r" / "smoke" / PAIR
    assert sorted(path.name for path in folder.iterdir()) == ["ranking_alignment-seed0.json", "teacher-seed0.json"]
    record = json.loads((folder / "ranking_alignment-seed0.json").read_text())
    assert [record[name] for name in ("scale", "pair", "cell", "seed")] == ["smoke", PAIR, "ranking_alignment", 0]
    assert record["steps"] == 4
    assert record["config"]["teacher_fingerprint"]
    tables.main(["--scale", "smoke", "--results", str(tmp_path / "r"), "--output", str(tmp_path / "tables.md")])
    text = (tmp_path / "tables.md").read_text()
    assert text in capsys.readouterr().out
    best, last = record["best"]["top1"], record["last"]["top1"]
    assert f"| ranking alignment | 77.97 | {best:.2f} | {last:.2f} | 1 |\n" in text


def test_given_teacher_is_evaluated(teacher, tiny, tmp_path):
    config = tiny(method="cross_entropy", teacher="", teacher_checkpoint="")
    planned = run.Run("digits_resnet8/teacher-seed0", tmp_path, config, [cells.Cell(PAIR, "teacher", 0)], teacher)
    assert run.execute([planned], tmp_path / "r", "full") == {}
    record = json.loads((tmp_path / "r" / "full" / PAIR / "teacher-seed0.json").read_text())
    assert record["given"] == str(teacher)
    assert record["best"]["top1"] == record["last"]["top1"]
    planned = planned._replace(given=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"^--teachers=.*nowhere' holds no network"):
        run.execute([planned], tmp_path / "r", "full")
