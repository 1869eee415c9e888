"""The figures: what they show against plain NumPy, every one written from small networks and runs, every error."""

import itertools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from rkd_jax import checkpoint, data
from rkd_jax.report import figures

FIELDS = {
    "dataset": "digits", "teacher": "resnet20", "student": "resnet8", "method": "ranking_alignment", "lam": 5.0,
    "eps": 1.0, "rank_scale": "paper", "seed": 0,
}  # fmt: skip

RANKED = ["ranked_logits", "--teacher", "{teacher}", "--students"]


def draw(tmp_path, *arguments):
    """Draws a figure, and returns its texts; PNG and SVG must be there."""
    output = tmp_path / "figure"
    figures.main([*map(str, arguments), "--output", str(output)])
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in output.with_suffix(".svg").read_bytes()


def texts(*arguments):
    """Every title, label and text of a figure."""
    args = figures.parse(list(map(str, arguments)))
    figure = figures.FIGURES[args.figure](args)
    found = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return "\n".join(text.replace("\N{NO-BREAK SPACE}", " ") for text in found if text)


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """A run's folder, whose best network is the teacher with noise."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    variables, metadata = checkpoint.load_network(teacher)
    noise = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: x + 0.02 * noise.normal(size=x.shape).astype(np.float32), variables)
    checkpoint.save_network(folder / "best", variables, metadata | {"dataset": "digits"})
    return folder


def run(folder, **fields):
    """The folder of a finished run, written by hand."""
    folder.mkdir(parents=True)
    config = FIELDS | fields
    best, last = ({"step": 20, "top1": top1, "top5": 99.0} for top1 in (90 + config["lam"], 89 + config["lam"]))
    (folder / "summary.json").write_text(json.dumps({"config": config, "best": best, "last": last}))
    lines = []
    for step in (10, 20):
        train = {"loss": 9.0 / step, "top1": 2.5 * step, "student_blocks": step / 10, "teacher_blocks": 3.0}
        lines.append({"step": step, "epoch": step / 10, "kind": "train", **train})
        lines.append({"step": step, "epoch": step / 10, "kind": "test", "top1": 95.0 - step / 10})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    return folder


def test_logit_difference_is_numpys():
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 30, 4))
    labels = generator.integers(0, 3, 30)  # class 3 has no image
    found = figures.logit_difference(student, teacher, labels)
    for label in range(3):
        for column in range(4):
            values = [abs(student[i, column] - teacher[i, column]) for i in range(30) if labels[i] == label]
            np.testing.assert_allclose(found[label, column], sum(values) / len(values), rtol=1e-12)
    assert np.isnan(found[3]).all()


def test_ranked_logits_orders_names_and_correlates(teacher, student, tmp_path):
    splits = data.load("digits")
    images = splits.test.images[7:8]
    reference, own = figures.predict([f"T={teacher}", f"S={student}"], images, data.load("digits"), "--students")
    assert (reference.label, own.label, own.embedding.shape) == ("T", "S", (1, 64))
    ranks = [np.argsort(np.argsort(each.logits[0])) for each in (reference, own)]
    rho = np.corrcoef(*ranks)[0, 1]  # no ties
    arguments = ["ranked_logits", "--teacher", f"T={teacher}", "--students", f"S={student}", "--image", 7]
    found = texts(*arguments)
    assert f"(b) S: Spearman's ρ with the teacher {rho:.2f}" in found
    assert f"test image 7, true class {splits.test.labels[7]}" in found
    first, rank = own.logits[0].argmax(), 10 - ranks[0][own.logits[0].argmax()]
    assert f"(teacher's rank)\n{first}  {own.logits[0].max():.1f}  ({rank})" in found
    draw(tmp_path, *arguments)

    args = figures.parse([str(argument) for argument in arguments])
    axes = figures.draw_ranked_logits(args).axes
    drawn = [axis.lines[0].get_ydata() for axis in axes[:2]]
    order = np.argsort(-reference.logits[0])
    np.testing.assert_array_equal(drawn, [reference.logits[0][order], own.logits[0][order]])
    true = splits.test.labels[7]
    np.testing.assert_array_equal(axes[1].lines[1].get_xydata(), [[list(order).index(true) + 1, own.logits[0][true]]])
    np.testing.assert_array_equal(axes[0].child_axes[0].images[0].get_array(), images[0, ..., 0])


@pytest.mark.slow
def test_logit_difference_figure(teacher, student, tmp_path):
    arguments = ["logit_difference", "--teacher", teacher, "--students", f"S={student}", f"T={teacher}"]
    draw(tmp_path, *arguments, "--num_images", 40)
    found = texts(*arguments, "--num_images", 40)
    assert "T: mean 0.00" in found
    assert "40 test images" in found


def test_tsne(student, tmp_path):
    arguments = ["tsne", "--networks", f"S={student}", "--classes", 1, 4, 7, "--num_images", 30]
    draw(tmp_path, *arguments)
    shown = drawn(*arguments)[0].axes[0].collections
    assert [(points.get_label(), len(points.get_offsets())) for points in shown] == [("1", 10), ("4", 10), ("7", 10)]
    assert len({(*figures._look(i).values(),) for i in range(100)}) == 100


def drawn(*arguments):
    """A figure, laid out as it is written, and what of its headline and legends lies outside of it."""
    args = figures.parse(list(map(str, arguments)))
    figure = figures.FIGURES[args.figure](args)
    figure.draw_without_rendering()
    around = [artist.get_window_extent() for artist in (figure._suptitle, *figure.legends) if artist]
    return figure, [box for box in around if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1]


@pytest.mark.slow
def test_headlines_and_legends_stay_inside(student, tmp_path):
    runs = [run(tmp_path / f"lam={lam},seed=0") for lam in range(8)]
    assert drawn("curves", "--runs", *runs)[1] == []
    named = [run(tmp_path / f"seed={seed},method=my_module:Method,strength=0.5") for seed in range(7)]
    assert drawn("curves", "--runs", *named)[1] == []
    assert drawn("tsne", "--networks", student, "--num_images", 20)[1] == []
    assert drawn("logit_difference", "--teacher", student, "--students", student)[1] == []
    long = {"dataset": "tiny_imagenet", "teacher": "ResNet18", "student": "MobileNetV2_64x64"}
    assert drawn("lambda", "--runs", run(tmp_path / "long", **long))[1] == []


def test_best_is_seen_where_it_equals_the_last(tmp_path):
    figure, _ = drawn("lambda", "--runs", run(tmp_path / "a"), run(tmp_path / "b", lam=1.0))
    best, last = figure.axes[0].lines
    assert best.get_markersize() > last.get_markersize()
    assert (best.get_linestyle(), last.get_linestyle()) == ("-", "--")


def sizes(figure):
    """The axes' widths and heights in inches."""
    return [tuple(box.size / figure.dpi) for box in (axis.get_window_extent() for axis in figure.axes)]


def outside(figure, artists):
    """Those of the texts that lie partly outside of the figure."""
    boxes = [(text.get_window_extent(), text.get_text()) for text in artists]
    return [text for box, text in boxes if min(box.x0, box.y0) < 0 or box.x1 > figure.bbox.x1]


def named_classes(monkeypatch, name):
    """Gives the digits' classes long names."""
    monkeypatch.setattr(figures, "class_names", lambda splits: [f"{i} {name}" for i in range(splits.num_classes)])


def test_tsne_has_square_panels_whatever_the_names(student, monkeypatch):
    named_classes(monkeypatch, "long name of a class, which somebody wrote out in full")
    label = "a network whose name says how it was trained and on what, from which seed"
    networks = [f"{label}={student}", f"{label}, again={student}"]
    figure, beyond = drawn("tsne", "--networks", *networks, "--num_images", 20)
    assert beyond == []
    assert all(width == pytest.approx(height) and width > 2.5 for width, height in sizes(figure))
    first, second = (axis.title.get_window_extent() for axis in figure.axes)
    assert first.x1 < second.x0
    assert figure.legends[0].get_window_extent().x0 > second.x1


def test_tsne_of_thirty_classes_keeps_its_panel(student, monkeypatch):
    named_classes(monkeypatch, "class")
    splits = data.load("digits")
    labels = np.arange(len(splits.test.labels)) % 30
    split = data.Split(splits.test.images, labels)
    made = splits._replace(test=split, num_classes=30)
    monkeypatch.setattr(figures, "load_images", lambda args: ("digits", made))
    embedding = np.random.default_rng(0).normal(size=(90, 4))
    monkeypatch.setattr(figures, "predict", lambda *_: [figures.Predicted("S", embedding, embedding)])
    figure, beyond = drawn("tsne", "--networks", student, "--num_images", 90, "--classes", *range(30))
    assert beyond == []
    assert sizes(figure)[0] == pytest.approx((3.2, 3.2), abs=0.3)


@pytest.mark.slow
def test_maps_and_lists_keep_their_size_with_long_class_names(teacher, student, monkeypatch):
    logits = ["--teacher", teacher, "--students", student]
    named_classes(monkeypatch, "long name of a class, which somebody wrote out in full")
    figure, _ = drawn("logit_difference", *logits, "--num_images", 20)
    assert min(sizes(figure)[0]) > 2
    assert outside(figure, figure.axes[0].get_xticklabels() + figure.axes[0].get_yticklabels()) == []
    figure, beyond = drawn("ranked_logits", *logits)
    assert beyond == []
    panel, text = figure.axes[0].get_window_extent(), figure.axes[0].texts[0].get_window_extent()
    assert panel.x0 < text.x0
    assert text.x1 < panel.x1


def test_a_long_name_is_cut():
    assert figures.cut("fourteen signs") == "fourteen signs"
    assert figures.cut("fifteen signs..") == "fifteen signs…"
    assert figures.cut("house finch, linnet") == "house finch…"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.61, 1.2, {"0.7", "0.8", "0.9", "1"}),
        (0.07, 1.3, {"0.1", "0.2", "0.3", "0.4", "0.6", "1"}),
        (0.012, 4, {"0.1", "1"}),
        (3, 45, {"3", "4", "6", "10", "20", "30", "40"}),
    ],
)
def test_log_axes_have_plain_numbers_with_room(low, high, expected):
    figure = figures.Figure(figsize=(3.3, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot([low, high])
    axis.set_yscale("log")
    figures._plain_numbers(axis)
    figure.draw_without_rendering()
    labels = [label for label in axis.get_yticklabels() + axis.get_yticklabels(minor=True) if label.get_text()]
    shown = {label.get_text(): label.get_window_extent() for label in labels if low <= float(label.get_text()) <= high}
    assert set(shown) == expected
    boxes = sorted(shown.values(), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))


def test_a_file_of_metrics_is_a_run(tmp_path):
    folder = run(tmp_path / "a")
    file = tmp_path / "x.jsonl"
    file.write_text((folder / "metrics.jsonl").read_text())
    assert figures.load_metrics(file, "train") == figures.load_metrics(folder, "train")
    assert figures.named(str(file)) == ("x", file)
    assert figures.named(f"RA={file}") == ("RA", file)
    assert len(drawn("curves", "--runs", file, folder)[0].axes[0].lines) == 2


def test_a_sweeps_folder_is_all_its_runs(tmp_path):
    folders = [str(run(tmp_path / "sweep" / f"lam={lam},seed=0", lam=lam)) for lam in (0.5, 5.0)]
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    alone = str(run(tmp_path / "alone", lam=1.0))
    assert figures.each_run([str(tmp_path / "sweep"), alone]) == [*folders, alone]
    (best, _) = drawn("lambda", "--runs", tmp_path / "sweep", alone)[0].axes[0].lines
    np.testing.assert_array_equal(best.get_xdata(), [0.5, 1.0, 5.0])
    by_shell = sorted((tmp_path / "sweep").iterdir())  # sweep/*
    assert len(by_shell) == 3
    for what in ([tmp_path / "sweep"], by_shell):
        names = [line.get_label() for line in drawn("curves", "--runs", *what)[0].axes[0].lines]
        assert names == ["lam=0.5,seed=0", "lam=5.0,seed=0"]
        assert len(drawn("lambda", "--runs", *what)[0].axes[0].lines[0].get_xdata()) == 2


def test_output_may_be_named_with_its_suffix(tmp_path):
    figures.main(["curves", "--runs", str(run(tmp_path / "a")), "--output", str(tmp_path / "x=0.1.png")])
    assert sorted(path.name for path in tmp_path.glob("x*")) == ["x=0.1.png", "x=0.1.svg"]


def test_images_of_a_folder_come_in_the_networks_size(teacher, tmp_path):
    for label in range(10):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (12, 12), 20 * i).save(tmp_path / "images" / str(label) / f"{i}.png")
    variables, metadata = checkpoint.load_network(teacher)
    facts = metadata | {"dataset": f"folder:{tmp_path / 'images'}", "image_size": 8}
    checkpoint.save_network(tmp_path / "network", variables, facts)
    args = figures.parse(["tsne", "--networks", str(tmp_path / "network")])
    assert figures.load_images(args)[1].test.images.shape == (10, 8, 8, 1)
    checkpoint.save_network(tmp_path / "other", variables, facts | {"image_size": 16})
    args.networks.append(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="the networks take images of 8 and 16 pixels"):
        figures.load_images(args)


def test_curves_and_the_same_figure_is_the_same_file(tmp_path):
    folders = [f"A={run(tmp_path / 'a')}", run(tmp_path / "b", lam=1.0)]
    draw(tmp_path, "curves", "--runs", *folders)
    before = [(tmp_path / f"figure.{suffix}").read_bytes() for suffix in ("png", "svg")]
    draw(tmp_path, "curves", "--runs", *folders)
    assert before == [(tmp_path / f"figure.{suffix}").read_bytes() for suffix in ("png", "svg")]


def test_curves_are_the_metrics_by_epoch_with_the_best_test_and_the_last_marked(tmp_path):
    loss, accuracy, top1 = drawn("curves", "--runs", run(tmp_path / "a"))[0].axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [[1, 0.9], [2, 0.45]])
    np.testing.assert_allclose(accuracy.lines[0].get_xydata(), [[1, 25], [2, 50]])
    np.testing.assert_allclose(top1.lines[0].get_xydata(), [[1, 94], [2, 93]])
    marks = {line.get_marker(): line.get_xydata().tolist() for line in top1.lines[1:]}
    assert marks == {"*": [[1, 94]], "o": [[2, 93]]}


def test_curves_of_many_runs_differ(tmp_path):
    folder = run(tmp_path / "a")
    loss = drawn("curves", "--runs", *(f"{i}={folder}" for i in range(30)))[0].axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in loss.lines}) == 30


def test_lambda_shows_the_paper_where_the_pair_is_the_papers(tmp_path):
    ours = [run(tmp_path / f"{lam}-{seed}", lam=lam, seed=seed) for lam in (0.0, 1.0, 5.0) for seed in (0, 1)]
    draw(tmp_path, "lambda", "--runs", *ours)
    found = texts("lambda", "--runs", *ours)
    assert "resnet20 > resnet8 by ranking_alignment, 20 steps, 2 seeds" in found
    assert "paper" not in found
    pair = {"dataset": "cifar100", "teacher": "resnet32x4", "student": "resnet8x4"}
    theirs = [run(tmp_path / f"paper-{lam}", lam=lam, **pair) / "summary.json" for lam in (0.5, 5.0)]
    assert "the paper's Table 5" in texts("lambda", "--runs", *theirs)
    points = drawn("lambda", "--runs", *theirs)[0].axes[0].lines[-1]
    np.testing.assert_array_equal(points.get_xydata()[0], [0.1, 75.59])


@pytest.mark.parametrize(
    ("values", "scale"),
    [((1.0, 2.0, 4.0), "linear"), ((0.1, 1.0), "log"), ((0.0, 0.5, 5.0), "symlog"), ((-9, 1), "linear")],
)
def test_accuracy_by_any_field(tmp_path, values, scale):
    ours = [run(tmp_path / f"{value}-{seed}", gamma=value, seed=seed) for value in values for seed in (0, 1)]
    if scale == "log":
        draw(tmp_path, "field", "gamma", "--runs", *ours)
    axis = drawn("field", "gamma", "--runs", *ours)[0].axes[0]
    assert (axis.get_xlabel(), axis.get_xscale()) == ("gamma", scale)
    np.testing.assert_array_equal(axis.lines[0].get_xdata(), values)
    assert [label.get_text().replace("\N{MINUS SIGN}", "-") for label in axis.get_xticklabels()] == [
        f"{value:g}" for value in values
    ]


def test_field_that_other_facts_follow_and_steps_that_differ(tmp_path):
    ours = [run(tmp_path / f"{n}", num_train=n, data_fingerprint=str(n), teacher="") for n in (32, 64)]
    (ours[1] / "summary.json").write_text((ours[1] / "summary.json").read_text().replace('"step": 20', '"step": 4000'))
    args = figures.parse(["field", "num_train", "--runs", *map(str, ours)])
    title = figures.draw_field(args).get_suptitle()
    assert "20 to 4,000\N{NO-BREAK SPACE}steps, 1\N{NO-BREAK SPACE}seed" in title  # within neither a line ends
    found = texts("field", "num_train", "--runs", *ours)
    assert "digits, resnet8 by ranking_alignment, 20 to 4,000 steps, 1 seed" in found


def test_accuracies_are_means_over_the_seeds_of_the_best_and_of_the_last():
    top1 = ((70.0, 60.0), (72.0, 66.0), (75.0, 74.0))
    records = [{"best": {"top1": best}, "last": {"top1": last}} for best, last in top1]
    axis = figures.Figure().subplots()
    figures._accuracies(axis, [5.0, 5.0, 1.0], records)
    best, _, last, _ = (line.get_xydata().tolist() for line in axis.lines)  # each with the points of its runs
    assert best == [[1, 75], [5, 71]]
    assert last == [[1, 74], [5, 63]]


def test_eps_shows_blocks(tmp_path):
    folders = [run(tmp_path / f"eps-{eps}", eps=eps) for eps in (1.0, 0.1)]
    draw(tmp_path, "eps", "--runs", *folders)
    args = figures.parse(["eps", "--runs", *map(str, folders)])
    lower = figures.draw_eps(args).axes[1]
    np.testing.assert_array_equal(
        [line.get_xydata() for line in lower.lines[:2]], [[[0.1, 2], [1, 2]], [[0.1, 3], [1, 3]]]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RANKED, "{student}", "--image", "355"], "--image=355 .* 0 to 354"),
        (["ranked_logits", "--teacher", "nowhere", "--students", "{student}"], "--teacher='nowhere' holds no network"),
        ([*RANKED, "{teacher}"], "--dataset is missing"),
        ([*RANKED, "{student}", "{hundred}"], "--students=.* on 100 classes, --dataset has 10"),
        (["tsne", "--networks", "{student}", "--classes", "1", "10"], "--classes: 10 is no class of digits"),
        (["tsne", "--networks", "{student}", "--num_images", "999"], "--num_images=999 exceeds the 355"),
        (["tsne", "--networks", "{student}", "--num_images", "10"], "--num_images: 10 images of 10 classes"),
        (["tsne", "--networks", "{student}", "--classes", "1", "1"], "of 1 classes; take two classes or more"),
        (["curves", "--runs", "nowhere"], "--runs: there is no nowhere/metrics.jsonl"),
        (["lambda", "--runs", "nowhere"], "--runs: there is no nowhere"),
        (["lambda", "--runs", "{teacher}/metadata.json"], "--runs: .* lacks best, config, last"),
        (["lambda", "--runs", "{a}", "{b}"], "--runs: they differ in eps, too"),
        (["eps", "--runs", "{a}", "{b}"], "--runs: they differ in lam, too"),
        (["field", "gamma", "--runs", "{a}"], "--runs: one of them is of a method without gamma; name runs of those"),
        (["field", "lamb", "--runs", "{a}"], "a method without lamb; name runs .*, or did you mean 'lam'"),
        (["field", "method", "--runs", "{a}"], "FIELD=method has the value 'ranking_alignment', which is no number"),
        (["eps", "--runs", "{empty}"], "--runs: .* has no line of kind 'train' yet"),
        (["curves", "--runs", "{a}/summary.json"], "--runs: .*summary.json is no run; name runs' folders, or copies"),
        (["field", "seed", "--runs", "{a}", "{b}"], "they differ in eps, too .*; name runs that differ in seed alone$"),
        (
            ["curves", "--runs", "{a}", "--output", "/proc/none/f"],
            "--output=/proc/none/f cannot be written .*; name an",
        ),
        (["curves", "--runs", "{a}", "--output", ""], "--output is empty or is a folder"),
        (["curves", "--runs", "{a}", "--output", "{a}"], "--output=.* is a folder; name a file in it"),
        (["curves", "--runs", "{a}", "--output", "{a}/summary.json/b/c"], "--output=.* in a folder: .*json is a file"),
        (["curves", "--runs", "{a}", "--output", "f.pdf"], "--output=f.pdf: .* written as .png and .svg; name it f$"),
    ],
)
def test_errors_name_the_flag(arguments, message, teacher, student, tmp_path):
    variables, metadata = checkpoint.load_network(teacher)
    checkpoint.save_network(tmp_path / "hundred", variables, metadata | {"num_classes": 100})
    places = {"teacher": teacher, "student": student, "hundred": tmp_path / "hundred"}
    places |= {"a": run(tmp_path / "a"), "b": run(tmp_path / "b", lam=1.0, eps=0.1), "empty": run(tmp_path / "empty")}
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match=f"Error: .*{message}"):
        figures.main([argument.format(**places) for argument in arguments])


def test_runs_whose_logs_alone_differ_are_compared(tmp_path):
    records = [figures.load_record(str(run(tmp_path / f"{i}", lam=float(i), log_every=i))) for i in (1, 2)]
    assert figures.sweep(records, "lam") == [1.0, 2.0]


def test_class_names_come_from_the_data(tmp_path):
    digits = data.load("digits")
    assert figures.class_names(digits) == [*"0123456789"]
    assert figures.class_names(digits._replace(class_names=("a_b", *"123456789")))[0] == "a b"
    assert figures.class_names(digits._replace(class_names=(), num_classes=3)) == ["0", "1", "2"]
    for name in ("train", "bus"):  # a class of that name
        (tmp_path / "vehicles" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (8, 8)).save(tmp_path / "vehicles" / name / f"{i}.png")
    assert figures.class_names(data.load(f"folder:{tmp_path / 'vehicles'}")) == ["bus", "train"]


def test_names_and_folders_may_have_an_equals_sign(tmp_path):
    folder = tmp_path / "sweep" / "lam=0.1,seed=0"
    folder.mkdir(parents=True)
    assert figures.named(str(folder)) == ("lam=0.1,seed=0", folder)
    assert figures.named(f"RA={folder}") == ("RA", folder)
    assert figures.named(f"eps=1={folder}") == ("eps=1", folder)


def test_table_5_is_that_of_the_paper():
    pair = {"dataset": "cifar100", "teacher": "resnet32x4", "student": "resnet8x4"}
    assert figures.table_5(pair) == {0.1: 75.59, 0.5: 76.74, 1: 77.17, 5: 77.97, 10: 77.71}
    pair = {"dataset": "tiny_imagenet", "teacher": "ResNet18", "student": "MobileNetV2"}
    assert figures.table_5(pair)[10] == 64.30
    assert figures.table_5(pair | {"student": "ShuffleV2"}) == {}
