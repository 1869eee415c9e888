"""Several devices and several processes: the losses of one, and files that only the first process writes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import FAST_FLAGS, ROOT, SLOW

from rkd_jax import processes, runs, train

pytestmark = pytest.mark.usefixtures("fast_compile")

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from ml_collections import ConfigDict
from rkd_jax import processes, runs
if {where!r}:
    processes.initialize({where!r})
{first}
runs.run(ConfigDict({config!r}), {workdir!r})
"""

SLOW_DISK = """
import time
from rkd_jax import train
save = train.save_network
train.save_network = lambda *args: [time.sleep(2.0), save(*args)]
"""


@pytest.fixture
def slow(tiny):
    """Runs whose rounding does not grow from step to step: 20 steps at a low rate."""
    return lambda **fields: tiny(**{"num_steps": 20, "log_every": 1, "learning_rate": 1e-4, "batch_size": 16, **fields})


def start(config, workdir, devices=1, where="", first=""):
    script = SCRIPT.format(root=str(ROOT), where=where, first=first, config=config.to_dict(), workdir=str(workdir))
    flags = f"{FAST_FLAGS} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
    )  # fmt: skip


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_two(config, workdir, first=""):
    port = free_port()
    return [start(config, workdir, where=f"localhost:{port},{index},2", first=first) for index in range(2)]


def finish(*started):
    outputs = [process.communicate(timeout=300) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(slow, tmp_path):
    runs.distil(slow(), tmp_path / "one")
    outputs = finish(*start_two(slow(), tmp_path / "processes"))
    assert "on 2 x cpu" in outputs[0]
    assert "top-1" not in outputs[1]  # one of them speaks
    assert len(losses(tmp_path / "one")) == 20
    np.testing.assert_allclose(losses(tmp_path / "processes"), losses(tmp_path / "one"), rtol=1e-5)
    assert (tmp_path / "processes" / "last" / "metadata.json").exists()
    finish(*start_two(slow(stream=True), tmp_path / "streamed"))  # each process reads its rows
    np.testing.assert_array_equal(losses(tmp_path / "streamed"), losses(tmp_path / "processes"))


ARRAYS = """
import sys
sys.path.insert(0, {root!r})
from rkd_jax import processes
processes.initialize({where!r})
import jax, ml_dtypes
import numpy as np
numbers = [-0.0, np.nan, np.inf, 1e-40, 1e-45, 3.4e38]
tree = {{"x": np.array(numbers, np.float32), "half": np.array(numbers, ml_dtypes.bfloat16), "none": np.zeros((0, 3))}}
tree |= {{"step": np.int32(-7), "on": np.array([True, False]), "most": np.array([[2**32 - 1]], np.uint32)}}
found = processes.agree_arrays(tree if processes.leads() else jax.tree.map(np.zeros_like, tree))
for name, value in tree.items():
    assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
    assert found[name].tobytes() == value.tobytes(), name
"""


@pytest.mark.slow
def test_arrays_of_the_first_of_two_processes_come_to_the_bit():
    port = free_port()
    scripts = [ARRAYS.format(root=str(ROOT), where=f"localhost:{port},{index},2") for index in range(2)]
    command = [sys.executable, "-c"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    finish(*(subprocess.Popen([*command, script], **pipes) for script in scripts))


@pytest.mark.slow
def test_chain_in_two_processes_is_taught_by_what_the_first_wrote(slow, tmp_path):
    config = slow(method="takd", assistant="small_network:two_stages", num_steps=2)
    finish(*start_two(config, tmp_path, SLOW_DISK))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assistant = json.loads((tmp_path / "assistants/small_network:two_stages/last/metadata.json").read_text())
    assert summary["config"]["teacher_fingerprint"] == assistant["fingerprint"]


@pytest.mark.slow
def test_the_first_of_two_processes_evaluates(slow, tmp_path):
    told = train.train_and_evaluate(slow(num_steps=2), tmp_path)["last"]
    outputs = finish(*start_two(slow(), tmp_path, "from rkd_jax import evaluate\nruns.run = evaluate.run"))
    assert [output.count("top-1") for output in outputs] == [2, 0]
    (_, last) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert {name: last[name] for name in told} == told


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        SLOW({"teacher_checkpoint": ""}, "config.teacher_checkpoint is not set"),
        ({"seed": 1}, "config.seed is 1 here and 0 in process 0; give all processes the same"),
        SLOW({"sweep": "seed=0,1"}, "the number of runs is 2 here and 1 in process 0; give all processes the"),
        SLOW({"student": "raising_network:create"}, "KeyError: 'no such layer'"),
    ],
)
def test_processes_that_would_train_apart_are_told(slow, tmp_path, monkeypatch, fields, error):
    (tmp_path / "raising_network.py").write_text("def create(num_classes):\n    raise KeyError('no such layer')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    where = f"localhost:{free_port()},{{}},2"
    started = [start(slow(**fields) if i else slow(), tmp_path / "run", where=where.format(i)) for i in range(2)]
    first, second = (process.communicate(timeout=300)[1] for process in started)
    assert (
        f"ValueError: process 1 (from 0): {error.removeprefix('ValueError: ').removeprefix('FileNotFoundError: ')}"
        in first
    )
    assert error in second
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_diverge_end_together(slow, tmp_path):
    """Though one saves after every call, and looks at the losses then, and the other does not."""
    where = f"localhost:{free_port()},{{}},2"
    fields = {"method": "cross_entropy", "learning_rate": 1e12, "log_every": 4, "num_steps": 8}
    configs = [slow(**fields, checkpoint_seconds=seconds) for seconds in (0.0, 1000.0)]
    started = [start(config, tmp_path / "run", where=where.format(i)) for i, config in enumerate(configs)]
    errors = [process.communicate(timeout=300)[1] for process in started]
    for process, error in zip(started, errors, strict=True):
        assert process.returncode == 1, error
        assert "is not finite. Lower config.learning_rate" in error


@pytest.mark.slow
def test_processes_stop_between_two_logs(slow, tmp_path):
    config = slow(num_steps=2000, log_every=100, eval_epochs=1000.0)
    started = start_two(config, tmp_path, "from rkd_jax import train\ntrain.ASK_EVERY = 3")
    for line in started[0].stdout:
        if line.startswith("train step 100/"):
            for process in started:
                process.send_signal(signal.SIGTERM)
            break
    saved = [int(re.search(r"saved at step (\d+)", started[0].communicate(timeout=300)[0]).group(1))]
    assert started[1].wait(timeout=300) == started[0].returncode == 128 + signal.SIGTERM
    assert 100 < saved[0] < 200


@pytest.mark.slow
def test_batch_that_does_not_divide_among_the_devices(slow, tmp_path):
    process = start(slow(batch_size=9), tmp_path / "odd", devices=2)
    assert "config.batch_size=9 does not divide among 2 devices; take a multiple of 2" in process.communicate()[1]
    assert not (tmp_path / "odd").exists()


SHARED = """
import sys
sys.path.insert(0, {root!r})
import jax
from ml_collections import ConfigDict
from rkd_jax import experiment, steps
run = experiment.build(ConfigDict({config!r}))
mesh, split = steps.data_mesh(16), run.splits.train
state = steps.run_once(run.create_state, jax.random.key(0))
step = steps.make_train_step([run.learner], run.teacher, run.recipe, mesh)
inputs = steps.Inputs(jax.random.key(0), (jax.random.key(0),), *split, run.teacher_variables)
print(step.lower((state,), inputs, steps.epoch_order(jax.random.key(0), 0, 64), 1).compile().as_text())
print("EVALUATION")
test = steps.make_eval_step(run.student, run.recipe.student_normalization, mesh)
variables = {{"params": state.params["student"], "batch_stats": state.batch_stats}}
print(test.lower(variables, split.images[:33], split.labels[:33]).compile().as_text())
"""


@pytest.mark.slow
def test_devices_keep_their_images_and_maps(two_stages):
    config = two_stages(method="at", views="both", batch_size=16)
    script = SHARED.format(root=str(ROOT), config=config.to_dict())
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": f"{FAST_FLAGS} --xla_force_host_platform_device_count=2"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    train_step, evaluation = ran.stdout.split("EVALUATION")
    exchanged = set(re.findall(r" (all-[a-z]+|collective-permute|reduce-scatter)(?:-start)?\(", train_step))
    assert exchanged == {"all-reduce"}  # of gradients, statistics and metrics
    assert "[17,8,8,8]" in evaluation  # 33 images, padded to 34
    assert "[34,8,8,8]" not in evaluation


@pytest.mark.slow
def test_checkpoint_goes_on_with_other_devices(slow, tmp_path):
    """And two devices give the losses of one."""
    runs.distil(slow(eval_batch_size=33), tmp_path / "whole")
    process = start(slow(eval_batch_size=33, checkpoint_seconds=0.0), tmp_path / "run")
    for line in process.stdout:
        if re.match(r"train step 7/", line):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    (output,) = finish(start(slow(eval_batch_size=33), tmp_path / "run", devices=2))
    assert re.search(r"on 2 x cpu \| goes on from step (7|8|9|1\d)\b", output)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=1e-5)
    tested = [json.loads((tmp_path / name / "summary.json").read_text())["last"] for name in ("run", "whole")]
    assert tested[0]["top1"] == tested[1]["top1"]  # batches of 33 images, 7 in the last, by one device and by two
    assert tested[0]["loss"] == pytest.approx(tested[1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_signal_to_one_process_stops_all_and_they_go_on_together(slow, tmp_path):
    config = slow(num_steps=40, eval_epochs=100.0, stream=True)  # each process reads its own rows
    runs.distil(config, tmp_path / "one")
    started = start_two(config, tmp_path / "run")
    for line in started[0].stdout:
        if re.match(r"train step 5/", line):
            started[1].send_signal(signal.SIGTERM)  # not the one that writes
            break
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [128 + signal.SIGTERM] * 2
    saved = int(re.search(r"saved at step (\d+)", outputs[0]).group(1))
    outputs = finish(*start_two(config, tmp_path / "run"))
    assert f"goes on from step {saved}" in outputs[0]
    assert len(losses(tmp_path / "run")) == 40
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
def test_process_whose_other_is_killed_says_so(tmp_path):
    port, fields = free_port(), {"compare": False, "method": "cross_entropy", "num_steps": 10**6, "log_every": 1}
    command = [sys.executable, "main.py", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    one, other = (subprocess.Popen([*command, f"--distributed=localhost:{port},{i},2"], **pipes) for i in range(2))
    try:
        assert any("train step" in line for line in one.stdout), one.stderr.read()
        other.kill()
        told = one.communicate(timeout=30)[1].splitlines()[-1]  # and no trace after it
    finally:
        for process in (one, other):
            process.kill()
            process.communicate()
    assert one.returncode == 1
    assert re.match(r"Error: another process of this run is gone \(.*Gloo.*\); start all of them again", told)


@pytest.mark.slow
def test_error_of_the_first_process_is_everyones(slow, tmp_path):
    runs.distil(slow(num_steps=2), tmp_path / "run")
    started = start_two(slow(num_steps=3), tmp_path / "run")
    for process in started:
        assert "config.num_steps: 2 there, 3 here" in process.communicate(timeout=300)[1]


@pytest.mark.parametrize("where", ["here", "localhost,0,2", "localhost:1,2,2", "localhost:1,0", "localhost:1,a,2"])
def test_wrong_address_is_named(where):
    with pytest.raises(ValueError, match="--distributed="):
        processes.initialize(where)


def test_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        where = f"localhost:{taken.getsockname()[1]},0,2"
        ran = subprocess.run(
            [sys.executable, "main.py", f"--distributed={where}"], cwd=ROOT, capture_output=True, text=True
        )
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert last.startswith(f"Error: --distributed={where}: nothing can listen at PORT")
    assert last.endswith("; take a free one")


@pytest.mark.parametrize("index", [0, SLOW(1)])
def test_process_whose_others_do_not_come(index):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]},{index},2"
    script = f"from rkd_jax import processes; processes.WAIT = 1.0; processes.initialize({where!r})"
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    said = [line for line in ran.stderr.splitlines() if "localhost" in line]
    assert said[0].endswith("waits for the others")
    assert said[1].startswith(f"Error: --distributed={where}: process {index} of 2 (from 0) at localhost:")
    assert "did not find all the others within 1 s" in said[1]
    assert "Traceback" not in ran.stderr
