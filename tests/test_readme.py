"""What the README and the docs say: their Python runs, their commands and numbers are those of the project."""

import importlib
import json
import re
import statistics
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from scipy import stats

from rkd_jax import checkpoint, evaluate, runs
from rkd_jax.report import paper

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "arm64"])
def test_every_requirement_has_one_version(machine):
    """On every Python that the README names, its commands install the versions of constraints.txt, all of them."""

    def names(path):
        lines = (line.partition("#")[0].strip() for line in (ROOT / path).read_text().splitlines())
        found = [Requirement(line) for line in lines if line and not line.startswith("-r")]
        return [canonicalize_name(each.name) for each in found if not each.marker or each.marker.evaluate(environment)]

    first, last = map(int, re.search(r"With Python 3\.(\d+) to 3\.(\d+)", README).groups())
    for minor in range(first, last + 1):
        environment = {"python_version": f"3.{minor}", "platform_machine": machine}
        pinned, required = names("constraints.txt"), names("requirements.txt") + names("requirements-test.txt")
        assert len(set(pinned)) == len(pinned), environment
        assert not {*required} - {*pinned}, environment
        assert sum(name in ("tensorflow", "tensorflow-cpu") for name in required) == 1, environment


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("block", BLOCKS, ids=["distil", "rank"])
def test_python_of_the_readme_runs(block):
    result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stdout.splitlines() if line.startswith("1 - rho")]
    assert len(told) == block.count("1 - rho:")
    assert all(line in README for line in told)
    losses = [float(value) for value in re.findall(r"^loss ([\d.]+)$", result.stdout, re.MULTILINE)]
    assert bool(losses) == ('print(f"loss ' in block)
    # "from about 110 to below 10"
    assert not losses or (105 < losses[0] < 115 and losses == sorted(losses, reverse=True) and losses[-1] < 10)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!http)([^)\s#]+)[^)]*\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"(configs/[\w/]+\.py)", text):
        assert (ROOT / path).exists(), path


def test_teachers_of_the_docs_are_those_of_the_paper():
    page = (ROOT / "docs" / "teachers.md").read_text()
    rows = re.findall(r"^\| (\w+) \| \[configs/teachers/(\w+)\.py\].* \| ([\d.]+) \|$", page, re.MULTILINE)
    published = {}
    for table in paper.TABLES[:2]:
        (numbers,) = (row.numbers for row in table.rows if row.cell == "teacher")
        teachers = (paper.PAIRS[pair].split(" > ")[0] for pair in table.pairs)
        published |= dict(zip(teachers, numbers, strict=True))
    assert {name: float(number) for name, _, number in rows} == published
    for name, config, _ in rows:
        assert importlib.import_module(f"configs.teachers.{config}").get_config().student == name


def test_two_teachers_of_the_docs_are_one(teacher, tmp_path, monkeypatch):
    variables, metadata = checkpoint.load_network(teacher)
    (block,) = re.findall(r"```python\n(import flax.*?)```", (ROOT / "docs" / "teachers.md").read_text(), re.DOTALL)
    (tmp_path / "ensemble.py").write_text(re.sub(r"resnet\d+", metadata["network"], block))
    monkeypatch.syspath_prepend(tmp_path)
    ensemble = importlib.import_module("ensemble")
    checkpoint.save_network(tmp_path / "other", jax.tree.map(lambda x: 0.9 * x, variables), metadata)
    ensemble.join(teacher, tmp_path / "other", tmp_path / "both")
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, len(metadata["mean"])), np.uint8)
    both, first, second = (
        evaluate.restore(path, images.shape[1:])(images).logits
        for path in (tmp_path / "both", teacher, tmp_path / "other")
    )
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_allclose(both, (first + second) / 2, atol=1e-6)


def test_numbers_of_the_readme_are_those_of_results():
    teacher = json.loads((ROOT / "results" / "resnet56_cifar100.json").read_text())["results"][0]
    assert f"| {teacher['top1']:.2f} % ([results]" in README
    for name, there in (("soft_rank_cpu", "| {:.1f} times"), ("soft_rank_cpu_avx2", "; {:.1f} with AVX2")):
        rows = json.loads((ROOT / "results" / f"{name}.json").read_text())["rows"]
        for eps in (1.0, 0.1):
            (row,) = (r for r in rows if r["classes"] == 200 and r["eps"] == eps and r["pass"] == "forward+backward")
            assert there.format(row["ratio"]["torchsort"]) in README


def test_digits_table_of_the_readme_is_that_of_results():
    assert runs.table(json.loads((ROOT / "results" / "digits.json").read_text())["rows"]) in README


def test_speeds_of_the_docs_are_those_of_results():
    page = (ROOT / "docs" / "soft_ranking.md").read_text()
    cpus = (
        json.loads((ROOT / "results" / f"soft_rank_{name}.json").read_text())["rows"] for name in ("cpu", "cpu_avx2")
    )
    for row in (row for rows in cpus for row in rows if row["pass"] == "forward+backward"):
        ratios = " | ".join(f"{row['ratio'][peer]:.1f}" for peer in ("torchsort", "softjax", "while_loop"))
        time = f"{row['microseconds']['rkd_jax']:.0f}"
        assert f"| ({row['batch']}, {row['classes']}) | {row['eps']:g} | {time} | {ratios} |" in page
    rows = json.loads((ROOT / "results" / "soft_rank_gpu.json").read_text())["rows"]
    for row in (row for row in rows if row["pass"] == "forward+backward"):
        shape = f"| ({row['batch']}, {row['classes']}) | {row['eps']:g} "
        assert f"{shape}| {row['microseconds']['rkd_jax']:.0f} | {row['ratio']['while_loop']:.1f} |" in page


def test_gpu_speeds_of_the_docs_are_those_of_results():
    from benchmarks import gpu_flags

    page, results = (ROOT / "docs" / "speed.md").read_text(), ROOT / "results"
    h100, h200 = (json.loads((results / f"{name}.json").read_text()) for name in ("gpu_flags", "gpu_flags_h200"))
    assert gpu_flags.table(h100) in page
    assert gpu_flags.table(h200) in page
    ratios, tried = [], []
    for pair, name in ((gpu_flags.SMALL, "the step as one"), (gpu_flags.LARGE, "the step compiled and as one")):
        ours, later = (
            next(row["milliseconds"][1] for row in rows if (row["pair"], row["methods"]) == (pair, gpu_flags.RANKING))
            for rows in (h200["rows"], h200["tried"]["rows"])
        )
        theirs = min(row["milliseconds"][1] for row in h200["peers"] if row["pair"] == pair)
        assert f"| {64e3 / ours:,.0f} | {64e3 / theirs:,.0f}, PyTorch, {name} CUDA graph |" in README
        ratios.append(f"{theirs / ours:.1f}")
        tried.append(f"{later:.2f}")
    assert f"is {' and '.join(ratios)} times as fast" in page
    assert f"nothing: {' and '.join(tried)} ms" in page


@pytest.mark.parametrize(
    ("pair", "curve", "paper"),
    [
        ("cifar100_res32x4_res8x4", "resnet32x4-resnet8x4", 77.97),
        ("cifar100_res56_res20", "resnet56-resnet20", 72.39),
    ],
)
def test_students_of_the_docs_are_those_of_results(pair, curve, paper):
    found = json.loads((ROOT / "results" / "tables" / "full" / pair / "ranking_alignment-seed0.json").read_text())
    best, last = f"{found['best']['top1']:.2f}", f"{found['last']['top1']:.2f}"
    (row,) = (line for line in README.splitlines() if f"full/{pair}/" in line)
    assert row.endswith(f"| {best} %, best epoch; {last} %, last | {paper} %, the paper's |")
    tests = _tests(ROOT / "results" / "curves" / f"{curve}.jsonl")
    assert [tests[-1][key] for key in ("step", "top1")] == [found["last"][key] for key in ("step", "top1")]
    assert max(tests, key=lambda line: line["top1"])["step"] == found["best"]["step"]
    mean = statistics.mean(line["top1"] for line in tests[-20:])
    epoch = found["best"]["step"] // 781
    page = (ROOT / "docs" / "findings.md").read_text()
    assert f"| {best}, best epoch ({epoch}); {last}, last; {mean:.2f}, mean of the last twenty |" in page
    metadata = json.loads((ROOT / "results" / "networks" / pair / "metadata.json").read_text())
    assert (metadata["top1"], metadata["step"]) == (found["best"]["top1"], found["best"]["step"])


def test_ablation_that_has_begun_is_in_the_docs_as_in_results():
    found = json.loads((ROOT / "results" / "headline_fair_begun.json").read_text())
    means = []
    for name in ("cross_entropy", "kd", "ranking_alignment"):
        row = found["rows"][name]
        tests = _tests(ROOT / row["curve"])[: found["steps"] // 781]
        assert tests[-1]["step"] == found["steps"]
        assert max(line["top1"] for line in tests) == row["best"]
        assert round(statistics.mean(line["top1"] for line in tests[-10:]), 2) == row["mean_of_epochs_49_to_58"]
        means.append(f"{row['mean_of_epochs_49_to_58']:.2f}")
    longer = json.loads((ROOT / "results" / "headline_kd_begun.json").read_text())
    ours, kd = (
        {line["step"] // 781: line["top1"] for line in _tests(ROOT / curve)}
        for curve in (found["rows"]["ranking_alignment"]["curve"], longer["curve"])
    )
    assert list(kd) == [*range(1, 129), 173, 185]
    assert max(kd) * 781 == longer["steps"]
    mean = {(a, b): [f"{statistics.mean(side[i] for i in range(a, b + 1)):.2f}" for side in (kd, ours)]
            for a, b in ((49, 58), (99, 128))}  # fmt: skip
    means.insert(2, mean[49, 58][0])
    page = " ".join((ROOT / "docs" / "findings.md").read_text().split())
    assert f"| full rate, mean of epochs 49 to 58 | {' | '.join(means)} |" in page
    assert f"| full rate, mean of epochs 99 to 128 | | | {' | '.join(mean[99, 128])} |" in page
    for when, epoch in (("after the first fall of the rate,", 173), ("after the second,", 185)):
        assert f"| {when} epoch {epoch} | | | {kd[epoch]:.2f} | {ours[epoch]:.2f} |" in page
    after, last = [ours[i] for i in range(181, 191)], [ours[i] for i in range(281, 301)]
    assert f"a standard deviation of {statistics.stdev(after):.2f}" in page
    assert f"{statistics.mean(after):.2f} % is its mean of those ten epochs, and {statistics.mean(last):.2f} of" in page
    readme = " ".join(README.split())
    assert f"kd was at {kd[185]:.2f} % after 185 epochs, and ranking_alignment at {ours[185]:.2f}" in readme


def _tests(curve):
    return [line for line in map(json.loads, curve.open()) if line["kind"] == "test"]


def test_measured_row_of_the_readme_is_that_of_results():
    rows = json.loads((ROOT / "results" / "gpu_flags.json").read_text())["rows"]
    like, best = (
        f"{64e3 / row['milliseconds'][1]:,.0f}"
        for row in (next(row for row in rows if row["dtype"] == "float32"), next(row for row in rows if row["flags"]))
    )
    assert f"| {like} in TF32; {best} in bfloat16 with the XLA_FLAGS" in README
    rows = json.loads((ROOT / "results" / "soft_rank_gpu.json").read_text())["rows"]
    (row,) = (r for r in rows if (r["classes"], r["eps"], r["pass"]) == (200, 0.1, "forward+backward"))
    assert f"| {row['ratio']['while_loop']:.1f} times ([results](results/soft_rank_gpu.json))" in README


def test_teacher_of_the_docs_is_the_one_that_is_there():
    results = ROOT / "results"
    run = json.loads((results / "teacher_resnet32x4.json").read_text())
    cell = json.loads((results / "tables" / "full" / "cifar100_res32x4_res8x4" / "teacher-seed0.json").read_text())
    metadata = json.loads((ROOT / "teachers" / "resnet32x4" / "metadata.json").read_text())
    best, last = f"{run['best']['top1']:.2f}", f"{run['last']['top1']:.2f}"
    assert {f"{top1:.2f}" for top1 in (metadata["top1"], metadata["trained"]["top1"], cell["best"]["top1"])} == {best}
    assert f"| {best} %, best epoch; {last} %, last | 79.42 %" in README
    page = (ROOT / "docs" / "findings.md").read_text()
    mean = run["mean_of_the_last_20_tests"]
    assert f"{best}, best epoch (218); {last}, last (225); {mean:.2f}, mean of the last twenty" in page
    tests = _tests(results / "curves" / "teacher-resnet32x4.jsonl")
    assert max(tests, key=lambda line: line["top1"])["step"] == run["best"]["step"] == metadata["step"] == 218 * 781
    assert round(statistics.mean(line["top1"] for line in tests[-20:]), 3) == mean
    assert (tests[-1]["top1"], tests[-1]["epoch"]) == (run["last"]["top1"], 225)


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("on_views*.json")), ids=lambda path: path.stem)
def test_views_of_the_docs_are_those_of_results(path):
    from benchmarks import on_views

    start, end = f"<!-- {path.stem} -->\n", f"<!-- /{path.stem} -->"
    table = on_views.table(json.loads(path.read_text())["rows"])
    assert f"{start}{table}\n{end}" in (ROOT / "docs" / "findings.md").read_text()


def test_methods_table_of_the_docs_is_that_of_results():
    from benchmarks import methods_digits

    record = json.loads((ROOT / "results" / "methods_digits.json").read_text())
    assert methods_digits.table(record) in (ROOT / "docs" / "methods.md").read_text()


def test_speeds_of_the_training_step_are_those_of_results():
    pytest.importorskip("torch")
    from benchmarks import train_step

    found = json.loads((ROOT / "results" / "train_step_cpu.json").read_text())
    page = (ROOT / "docs" / "speed.md").read_text()
    assert train_step.table(found) in page
    assert train_step.table(json.loads((ROOT / "results" / "train_step_cpu_avx2.json").read_text())) in page
    for value in found["resnet56-resnet20"]["extras"]["ratio"].values():
        assert f"{value:.2f}" in page
    for pair in ("resnet56-resnet20", "resnet32x4-resnet8x4"):
        assert f"| {found[pair]['whole']['ratio']['whole step / PyTorch as used']:.2f} times |" in README


def test_kernels_of_the_docs_are_those_of_results():
    from benchmarks import gpu_program

    found = json.loads((ROOT / "results" / "gpu_program.json").read_text())
    assert gpu_program.table(found["steps"]) in (ROOT / "docs" / "speed.md").read_text()


def test_table_of_a_tpus_program_is_that_of_results():
    from benchmarks import tpu_program

    found = json.loads((ROOT / "results" / "tpu_program.json").read_text())
    assert tpu_program.table(found["steps"]) in (ROOT / "docs" / "speed.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("fair_ablation_*.json")), ids=lambda path: path.stem)
def test_ablation_of_the_docs_is_that_of_results(path):
    from benchmarks import fair_ablation

    start, end = fair_ablation.marks(path)
    table = fair_ablation.table(fair_ablation.records(path))
    assert start + table + end in (ROOT / "docs" / "findings.md").read_text()


def test_means_over_the_ablations_seeds_are_those_of_results():
    from benchmarks import fair_ablation

    found = fair_ablation.records(ROOT / "results" / "fair_ablation_resnet20.json")
    losses = {"cross_entropy": "cross_entropy", "kd": "kd", "ranking_alignment, eps 1": "ranking_alignment"}
    last = {name: fair_ablation.by_seed(found, loss, "last") for loss, name in losses.items()}
    readme, page = (" ".join(path.read_text().split()) for path in (ROOT / "README.md", ROOT / "docs" / "findings.md"))
    for name, values in last.items():
        assert f"{statistics.mean(values.values()):.2f} % by {name}" in readme
    kd, ours = last["kd"], last["ranking_alignment"]
    assert kd.keys() == ours.keys()
    ahead = [ours[seed] - kd[seed] for seed in sorted(kd)]
    each = ", ".join(f"{lead:.2f}" for lead in ahead[:-1]) + f" and {ahead[-1]:.2f} points"
    mean, error = statistics.mean(ahead), statistics.stdev(ahead) / len(ahead) ** 0.5
    assert f"by {each}, {mean:.2f} in the mean with a standard error of {error:.2f}" in page
    assert f"{mean:.2f} ahead (standard error {error:.2f})" in readme
    p = stats.ttest_rel(*([values[seed] for seed in sorted(kd)] for values in (kd, ours))).pvalue
    assert f"(paired t-test, p = {p:.3f})" in page
    alone = last["cross_entropy"]
    each = {name: [last[name][seed] - alone[seed] for seed in sorted(alone)] for name in ("kd", "ranking_alignment")}
    assert "kd is {:.2f} and {:.2f} points ahead of cross_entropy on the same views".format(*each["kd"]) in page
    assert "at eps 1 is {:.2f} and {:.2f} (two seeds)".format(*each["ranking_alignment"]) in page
    weak = fair_ablation.records(ROOT / "results" / "fair_ablation_resnet20_weak.json")
    on_weak = {name: fair_ablation.by_seed(weak, loss, "last") for loss, name in losses.items()}
    seeds = sorted(on_weak["kd"])
    ahead, both = (
        [values["ranking_alignment"][seed] - values["kd"][seed] for seed in seeds] for values in (on_weak, last)
    )
    lead, error = statistics.mean(ahead), statistics.stdev(ahead) / len(ahead) ** 0.5
    assert "is {:.2f}, {:.2f} and {:.2f} ahead of kd,".format(*ahead) in page
    assert f"ahead of kd, {lead:.2f} in the mean of three seeds (standard error {error:.2f}):" in page
    assert "with the same seeds on both views it was {:.2f}, {:.2f} and {:.2f}, over".format(*both) in page
    assert f"over four seeds {mean:.2f}. A lead" in page
    more = {
        name: statistics.mean(last[name][seed] - value for seed, value in values.items())
        for name, values in on_weak.items()
    }
    kinds = (f"{more['cross_entropy']:.1f} points for cross_entropy", f"{more['kd']:.1f} for kd")
    assert f"by {', '.join(kinds)} and {more['ranking_alignment']:.1f} for ranking_alignment" in page
    found = fair_ablation.records(ROOT / "results" / "fair_ablation_resnet20_mean.json")
    averaged = {losses[loss]: fair_ablation.by_seed(found, loss, "last") for record in found for loss in record["rows"]}
    ((seed,),) = {tuple(values) for values in averaged.values()}
    averaged, summed, one_view = (
        [values[name][seed] for name in ("kd", "ranking_alignment")] for values in (averaged, last, on_weak)
    )
    alone = f"With this seed, {seed}, the sum has {summed[1]:.2f} and weak views alone {one_view[1]:.2f}"
    assert f"{alone} by ranking_alignment." in page
    assert f"kd has {summed[0]:.2f} and {one_view[0]:.2f}:" in page
    for mean_top1, sum_top1, weak_top1 in zip(averaged, summed, one_view, strict=True):
        parts = mean_top1 - weak_top1, sum_top1 - weak_top1, sum_top1 - mean_top1
        assert "{:.2f} of these {:.2f} points are there without the larger step, and {:.2f} come".format(*parts) in page
    assert f"their mean ends {parts[2]:.2f} points lower, below)" in page
    leads = (f"{values[1] - values[0]:.2f}" for values in (averaged, one_view, summed))
    assert "is {} ahead of kd on both views and {} on weak ones, with the sum {}.".format(*leads) in page
    alone = on_weak["cross_entropy"]
    each = {name: [on_weak[name][seed] - alone[seed] for seed in sorted(alone)] for name in on_weak}
    assert "kd is {:.2f} and {:.2f} ahead of cross_entropy on weak views,".format(*each["kd"]) in page
    assert "views, ranking_alignment {:.2f} and {:.2f}.".format(*each["ranking_alignment"]) in page
    kd, ours, alone = (
        f"{statistics.mean(on_weak[name].values()):.2f}" for name in ("kd", "ranking_alignment", "cross_entropy")
    )
    assert f"On weak views alone (three seeds; cross_entropy two), they end at {kd}, {ours} and {alone}:" in readme
    on_both = statistics.mean(both)
    assert f"by {lead + more['ranking_alignment']:.2f} points in the mean of seeds 0 to 2." in page
    assert f"{lead:.2f} of them are the loss's and {more['ranking_alignment']:.2f} those of" in page
    assert f"if the views are, {on_both:.2f} and {more['kd']:.2f}." in page
