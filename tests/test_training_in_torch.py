"""Whole training steps beside the same in PyTorch: networks, views, losses, batch statistics, SGD and its schedule."""

import jax
import numpy as np
import pytest
from conftest import ROOT, SLOW
from sklearn.isotonic import isotonic_regression
from test_configs import load
from test_steps import RNG, prepare

from rkd_jax import convert, steps

torch = pytest.importorskip("torch")
import torch_networks  # noqa: E402
from torch.nn import functional as F  # noqa: E402

N, BATCH, EPOCH, STEPS, CLASSES = 32, 8, 4, 6, 100
DECAY, WEIGHT_DECAY = 0.1, 0.01


def soft_rank(row, eps):
    """Descending soft ranks of a row [C], with a gradient; the blocks are scikit-learn's."""
    t, order = torch.sort(row / eps, descending=True)
    places = torch.arange(1, len(row) + 1, dtype=row.dtype)
    fit = isotonic_regression((t + places).detach().numpy(), increasing=False)
    blocks = torch.tensor(np.unique(-fit, return_inverse=True)[1])
    member = F.one_hot(blocks).to(row.dtype)
    means = member @ ((member.T @ (t + places)) / member.sum(0))
    return torch.zeros_like(row).index_put((order,), means - t)


def ranking(student, teacher, labels, eps):
    """Cross-entropy, and 5 times the mean over classes of the squared difference of the soft ranks."""
    ranks = [torch.stack([soft_rank(row, eps) for row in logits]) for logits in (student, teacher)]
    return F.cross_entropy(student, labels) + 5 * ((ranks[0] - ranks[1]) ** 2).mean()


def kd(student, teacher, labels):
    """Hinton's, at temperature 4 with the weights 0.1 and 0.9."""
    soft = F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean")
    return 0.1 * F.cross_entropy(student, labels) + 0.9 * 16 * soft


def train_in_torch(student, teacher, loss, images, labels, orders, rate, nesterov):
    """Losses of STEPS steps on each batch as it is and mirrored."""
    optimizer = torch.optim.SGD(student.parameters(), rate, 0.9, weight_decay=WEIGHT_DECAY, nesterov=nesterov)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [EPOCH], DECAY)
    found = []
    for step in range(STEPS):
        start = step % EPOCH * BATCH
        index = orders[step // EPOCH][start : start + BATCH]
        total = 0.0
        for batch in (images[index], images[index].flip(-1)):
            with torch.no_grad():
                target = teacher(batch)[0]
            total = total + loss(student(batch)[0], target, labels[index])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        scheduler.step()
        found.append(total.item())
    return found


@pytest.mark.usefixtures("fast_compile", "mirrored")
@pytest.mark.parametrize(
    ("loss", "fields"),
    [
        SLOW(kd, {"method": "kd", "learning_rate": 0.01, "nesterov": True}),
        (
            lambda *x: ranking(*x, eps=0.1),
            {"method": "ranking_alignment", "learning_rate": 5e-4, "lam": 5.0, "eps": 0.1},
        ),
    ],
    ids=["kd", "ranking_alignment"],
)
def test_training_equals_pytorchs(loss, fields):
    config = load(ROOT / "configs" / "cifar100_res56_res20.py").get_config()
    config.update(
        student="resnet8", teacher="resnet8", views="both", smoke=True, num_train=N, batch_size=BATCH, num_steps=STEPS,
        decay_epochs=(1,), decay_factor=DECAY, weight_decay=WEIGHT_DECAY, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    student, teacher = (torch_networks.create("resnet8", CLASSES) for _ in range(2))
    ours = convert.from_torch(student.state_dict(), "resnet8", CLASSES)
    run, state, inputs, step = prepare(config)
    state = state._replace(params=state.params | {"student": ours["params"]}, batch_stats=ours["batch_stats"])
    inputs = inputs._replace(teacher=convert.from_torch(teacher.state_dict(), "resnet8", CLASSES))
    state, inputs = steps.replicate((state, inputs), steps.data_mesh(BATCH))

    mean, std = (np.asarray(x) for x in run.recipe.student_normalization)
    assert run.recipe.teacher_normalization == run.recipe.student_normalization
    images = ((np.asarray(inputs.images) / 255 - mean) / std).transpose(0, 3, 1, 2)
    student, teacher = student.double(), teacher.double().eval()
    orders = [np.array(steps.epoch_order(RNG, epoch, N)) for epoch in range(2)]
    expected = train_in_torch(
        student, teacher, loss, torch.tensor(images), torch.tensor(np.asarray(inputs.labels, int)), orders,
        config.learning_rate, config.nesterov,
    )  # fmt: skip

    found, before = [], jax.tree.map(np.array, ours)
    for i in range(STEPS):
        state, metrics = step(state, inputs, orders[i // EPOCH])
        found.append(float(metrics["loss"]))
    assert step.compilations() == 1
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    after = {"params": state.params["student"], "batch_stats": state.batch_stats}
    reference = convert.from_torch(student.state_dict(), "resnet8", CLASSES)

    def compare(path, ours, theirs, start):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - start)  # of how far training moved it
        where = jax.tree_util.keystr(path)
        assert error < (1e-4 if "batch_stats" in where else 2e-3), (where, error)

    jax.tree_util.tree_map_with_path(compare, jax.device_get(after), reference, before)
