"""What one command runs: a network, a chain of networks, a sweep, or a student with and without its teacher."""

import difflib
import itertools
import os
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rkd_jax import _devices, _files, evaluate, experiment, methods, models, processes, provenance, run_folder, train
from rkd_jax.methods import takd

LONGEST = 255  # bytes: what file systems take of a name


def run(config: ConfigDict, workdir: str | os.PathLike, given: Collection[str] = ()) -> list[dict[str, Any]]:
    """What `python main.py` does; ValueError where the folder holds something else, a sweep where this is one run.

    given: the fields that were set by hand, of which one that does nothing is an error. Returns the runs' summaries: of
    one, of each student of a sweep, of a comparison's three.
    """
    single, several, both, links = run_folder.KINDS
    kind = several if config.get("sweep") else both if config.get("compare") else single
    experiment.check_used([member for _, member in expand(config)] if kind == several else [config], given)
    _devices.start()
    processes.meet()
    kinds = [kind]
    if kind == single and isinstance(experiment.create_method(config), takd.Method):
        kinds = [links, single]  # whose last run is where one run would be
    processes.in_lead(lambda: run_folder.check_kind(Path(workdir), *kinds))
    if kind == several:
        return sweep(config, workdir)
    if kind == both:
        return compare(config, workdir)
    summary = distil(config, workdir)
    for name in ("best", "last") if processes.leads() else ():
        result = summary[name]
        print(f"{name:4}  step {result['step']:,}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %")
    return [summary]


def distil(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """One run, and for a method that goes through assistants (takd) the runs before it, in assistants/; its summary.

    Each trained assistant is the next run's teacher. What is finished is not run again.
    """
    links = chain(config)
    if len(links) == 1:
        return train.train_and_evaluate(config, workdir)
    for link in links[1:]:
        experiment.rehearse(link)
    processes.in_lead(lambda: run_folder.check(Path(workdir), experiment.shrink(links[-1])))
    checkpoint = config.teacher_checkpoint
    for link in links:
        link.teacher_checkpoint = checkpoint
        folder = Path(workdir) if link is links[-1] else Path(workdir) / "assistants" / link.student
        summary = train.train_and_evaluate(link, folder)
        checkpoint = str(folder / "last")
    return summary


def chain(config: ConfigDict) -> list[ConfigDict]:
    """The runs that a config comes to: one, or, of a method that goes through assistants, one for each link."""
    method, links = experiment.create_method(config), []
    if not isinstance(method, takd.Method):
        return [config]
    pairs = method.links(config.teacher, config.student)
    if config.get("teacher_fingerprint") and config.teacher in (student for _, student in pairs[:-1]):
        raise ValueError(
            f"config.teacher={config.teacher!r} is an assistant, and config.teacher_fingerprint is set: this is the "
            "record of the last run of a chain; start from the config that the chain came from"
        )
    for teacher, student in pairs:
        link = config.copy_and_resolve_references()
        link.update(teacher=teacher, student=student, assistant=method.assistant)
        if student != config.student:
            models.resolve(student, field="config.assistant")
            link.student_checkpoint = ""
        if links:
            experiment.forget_teacher(link)
        links.append(link)
    return links


def sweep(config: ConfigDict, workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Trains the students that config.sweep names in one program, each in a folder of WORKDIR named after its values.

    Prints a table, writes it to WORKDIR/sweep.json, and returns its rows: each student's name as "sweep", with its
    summary; see `train.train_together`. One that diverges does not stop the others, and is an error in the end.
    """
    if config.compare:
        raise ValueError("config.sweep and config.compare are two experiments; set config.compare=False, or no sweep")
    members = expand(config)
    for name, member in members:
        if isinstance(experiment.create_method(member), takd.Method):
            raise ValueError(
                f"config.sweep: {name} trains a chain of networks; run config.method={member.method!r} alone"
            )
    workdir = Path(workdir)
    diverged = None
    try:
        summaries = train.train_together([(member, workdir / name) for name, member in members])
    except train.Diverged as error:
        diverged, summaries = error, error.summaries
    rows = [
        {"sweep": name, **(summary or {"diverged": True})}
        for (name, _), summary in zip(members, summaries, strict=True)
    ]
    if processes.leads():
        seeds = over_seeds(rows)
        _files.write_json(workdir / "sweep.json", {"rows": rows, "over_seeds": seeds, **provenance.record()})
        print("\n" + sweep_table(rows, seeds))
    if diverged:
        raise diverged
    return rows


def over_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a sweep's rows that differ in nothing but their seeds: how many, and mean and standard deviation of top-1.

    In percent, of the "last" and of the "best" epoch; rows that diverged are left out, and so is what has one seed.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        words = (word for word in row["sweep"].split(",") if word.partition("=")[0] not in ("seed", "data_seed"))
        groups.setdefault(",".join(words), []).append(row)
    found = []
    for name, members in groups.items():
        sound = [row for row in members if "diverged" not in row]
        if len(sound) > 1:
            top1 = {kind: [row[kind]["top1"] for row in sound] for kind in ("last", "best")}
            spread = {kind: {"mean": statistics.mean(x), "std": statistics.stdev(x)} for kind, x in top1.items()}
            found.append({"sweep": name, "seeds": len(sound), **spread})
    return found


def sweep_table(rows: Sequence[dict[str, Any]], seeds: Sequence[dict[str, Any]]) -> str:
    """A sweep's rows as text, and below them what `over_seeds` makes of them."""
    spread = "mean ± standard deviation"
    width = max(len(name) for name in [*(row["sweep"] for row in rows), *([spread] if seeds else [])])
    lines = [f"{'':{width}}  top-1 last %  best %"]
    for row in rows:
        cells = "    diverged" if "diverged" in row else f"{row['last']['top1']:12.2f}  {row['best']['top1']:6.2f}"
        lines.append(f"{row['sweep']:{width}}  {cells}")
    if seeds:
        lines += ["", f"{spread:{width}}  top-1 last %        best %"]
    for row in seeds:
        last, best = (f"{row[kind]['mean']:.2f} ± {row[kind]['std']:.2f}" for kind in ("last", "best"))
        lines.append(f"{row['sweep'] or 'all':{width}}  {last:>12}  {best:>12}  ({row['seeds']} seeds)")
    return "\n".join(lines)


def expand(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """The students of a sweep, with their names: "lam=0.1,1 seed=0,1" makes "lam=0.1,seed=0" and three others.

    "method=kd; method=ranking_alignment lam=1,5" makes those of two sweeps, three in all.
    """
    members: list[tuple[str, ConfigDict]] = []
    swept: list[set[str]] = []  # of each member
    kinds = experiment.kinds(config)
    for choice in itertools.chain.from_iterable(itertools.product(*axes) for axes in _axes(config)):
        member = config.copy_and_resolve_references()
        member.sweep = ""
        for field, value in choice:
            member[field] = parse(field, value, kinds[field])
        experiment.check_used([member], [field for field, _ in choice])
        if any(other.to_dict() == member.to_dict() for _, other in members):
            raise ValueError(f"config.sweep={config.sweep!r} names a student twice; name each once")
        name = ",".join(f"{field}={value}" for field, value in choice).replace(os.sep, "_")
        if (length := len(os.fsencode(name))) > LONGEST:
            raise ValueError(
                f"config.sweep: a student's folder would be named {name[:60]!r} and so on, {length} letters, and file "
                f"systems take {LONGEST}; vary less, or name files by shorter paths"
            )
        members.append((name, member))
        swept.append({field for field, _ in choice})
    if (small := set().union(*swept) & {*experiment.SMOKE}) and config.smoke:
        raise ValueError(
            f"config.smoke sets config.{min(small)} itself, which config.sweep varies; leave one of them out"
        )
    configs = [config.copy_and_resolve_references(), *(member for _, member in members)]
    experiment.drop_foreign(configs, [set(), *swept])
    return members


def _axes(config: ConfigDict) -> list[list[list[tuple[str, str]]]]:
    """The sweeps of config.sweep: of each its words, and of each word the field with each value."""
    sweeps = []
    for text in config.sweep.split(";"):
        axes = []
        for word in text.split() or [text]:
            field, equals, values = word.partition("=")
            if equals and field not in config:
                near = difflib.get_close_matches(field, config, 1)
                mend = f"did you mean {near[0]!r}?" if near else "all are in configs/default.py"
                if field in methods.fields():
                    mend = "a run's config.json has those of its own method; start from a config that has all"
                raise ValueError(f"config.sweep={config.sweep!r}: {field!r} is no field of the config; {mend}")
            if not equals or not values or field == "sweep":
                raise ValueError(
                    f"config.sweep={config.sweep!r}: {word!r} is not FIELD=VALUE,VALUE,... of a field of the config; "
                    'write, say, --config.sweep="lam=0.1,1,5 seed=0,1"'
                )
            if field in ("compare", "smoke"):
                mend = "set config.smoke" if field == "smoke" else "take it out, for a comparison is another experiment"
                raise ValueError(f"config.sweep={config.sweep!r}: {field} is of the whole sweep; {mend}")
            if any(field == other for axis in axes for other, _ in axis):
                raise ValueError(f"config.sweep={config.sweep!r} varies {field} twice; name all its values at once")
            axes.append([(field, value) for value in values.split(",")])
        sweeps.append(axes)
    return sweeps


def parse(field: str, value: str, kind: type) -> Any:
    """A field's value from a word; ValueError where it is none of that kind, or a list."""
    if kind in (tuple, list):
        raise ValueError(f"config.sweep: {field} is a list of numbers, which a sweep cannot vary; start a run for each")
    if kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        if kind in (int, float, str):
            return kind(value)
    except ValueError:
        pass
    if not value:
        raise ValueError(f"config.sweep: a value of {field} is empty; write the values with a comma between them")
    raise ValueError(f"config.sweep: {field}={value} is no {kind.__name__}, which config.{field} takes")


def compare(config: ConfigDict, workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Trains a student's teacher, the student alone and the student distilled, prints a table, returns its rows.

    Under `workdir`: teacher/ (unless the config names a checkpoint), alone/ (cross-entropy on the same views, epochs
    and seed) and distilled/. Each is a run of its own, and goes on where it was interrupted. The rows are in
    comparison.json, too.
    """
    workdir, rows = Path(workdir), []
    config = config.copy_and_resolve_references()
    config.compare = False
    method = experiment.create_method(config)
    if not method.needs_teacher:
        raise ValueError(
            f"config.compare trains a student with and without its teacher, and config.method={config.method!r} has "
            "none; set config.compare=False"
        )
    models.resolve(config.student)
    models.resolve(config.teacher, field="config.teacher")
    for link in chain(config):  # what is wrong about the last run is said before the first
        experiment.rehearse(link)
    if config.teacher_checkpoint:
        if not isinstance(method, takd.Method):
            experiment.build(config)
        result = evaluate.evaluate(config, config.teacher_checkpoint, "config.teacher_checkpoint")
        rows.append({"role": "teacher", "network": result["network"], "method": "as given", "last": result, **result})
    else:
        teacher = experiment.alone(config, config.teacher)
        teacher.student_checkpoint = ""
        summary = train.train_and_evaluate(teacher, workdir / "teacher")
        rows.append({"role": "teacher", "network": config.teacher, "method": "cross_entropy", **summary})
        config.teacher_checkpoint = str(workdir / "teacher" / "last")
        experiment.forget_teacher(config)
    summary = train.train_and_evaluate(experiment.alone(config, config.student), workdir / "alone")
    rows.append({"role": "student alone", "network": config.student, "method": "cross_entropy", **summary})
    summary = distil(config, workdir / "distilled")
    rows.append({"role": "student distilled", "network": config.student, "method": config.method, **summary})
    if processes.leads():
        _files.write_json(workdir / "comparison.json", {"rows": rows, **provenance.record()})
        print("\n" + table(rows))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `compare` as text: accuracies of the last and of the best epoch, parameters, seconds of training."""
    cells = [["", "network", "trained by", "parameters", "top-1 last %", "best %", "seconds"]]
    for row in rows:
        best, seconds = row.get("best"), row.get("seconds")
        cells.append([
            row["role"], row["network"], row["method"], f"{row['parameters']:,}", f"{row['last']['top1']:.2f}",
            f"{best['top1']:.2f}" if best else "", f"{seconds:.0f}" if seconds is not None else "",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])
