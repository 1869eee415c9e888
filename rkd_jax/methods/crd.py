"""Contrastive representation distillation (Tian et al., ICLR 2020, arXiv:1910.10699).

L = CE(s, y) + beta * [NCE(e_s, bank of e_t) + NCE(e_t, bank of e_s)], NCE(e, bank) = -log h(e . own) - sum over
negatives of log(1 - h(e . other)), h(x) = p / (p + K / N), p = exp(x / temperature) / Z, N = training examples

e is a linear map of a network's embedding to `embedding_dim` numbers of norm 1, one map for each side, trained beside
the student. The banks hold such an e for every training example, a running average with weight `bank_momentum` of the
old. Z is set by the first batch, so that p is 1 / N on average, and stays. The negatives of an example are K =
`num_negatives` examples of other classes. The released code draws K for each example and gathers as many rows of the
banks; here each of the other classes' examples takes part with probability K / their number: the sum has the same mean,
and all products are one matrix product. Where there are fewer than K, all take part, and K is their number. The class
of a bank's entry is known once its example has been visited; until then the entry is noise, and counts as another's.

The released code has one view. With two, the second finds the entries that the first left, its own example's among
them, and an entry's old value has the weight of `bank_momentum` twice; Z is set by the first view.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax import losses
from rkd_jax.methods import _maps, base
from rkd_jax.models.layers import torch_default, torch_default_bias

EPSILON = 1e-7  # of the released code, beside K / N


@dataclasses.dataclass(frozen=True)
class Method(base.Distiller):
    beta: float = base.non_negative(0.8)  # weight of the contrasts
    embedding_dim: int = base.positive(128)  # numbers of a bank's entry
    temperature: float = base.positive(0.07)  # of the similarities
    bank_momentum: float = base.fraction(0.5)  # weight of the old value of a bank's entry
    num_negatives: int = base.positive(16384)  # K, of other classes, for each example

    def init(self, rng, student, teacher, num_examples):
        keys, bound = jax.random.split(rng, 4), (3 / self.embedding_dim) ** 0.5
        ours, theirs = _maps.both("crd", student, teacher, "embedding")
        sides = {"student": ours, "teacher": theirs}
        params, state = {}, {"label": jnp.full(num_examples, -1, jnp.int32)}
        for (side, embedding), key, bank_key in zip(sides.items(), keys[:2], keys[2:], strict=True):
            params[side] = _maps.init(Projection(self.embedding_dim), key, embedding)
            entries = jax.random.uniform(bank_key, (num_examples, self.embedding_dim), jnp.float32, -bound, bound)
            state[side] = {"bank": entries, "log_partition": jnp.float32(-jnp.inf)}
        return params, state

    def loss(self, params, state, student, teacher, batch, context):
        index, y = batch["index"], batch["label"]
        entries = {
            side: _maps.apply(Projection(self.embedding_dim), params[side], outputs.embedding)
            for side, outputs in (("student", student), ("teacher", teacher))
        }
        known = state["label"].at[index].set(y, unique_indices=True)
        own, others = jnp.arange(len(known)) == index[:, None], known != y[:, None]
        count = others.sum(axis=-1, keepdims=True)
        chosen = others & (jax.random.uniform(context.rng, others.shape) < self.num_negatives / jnp.maximum(count, 1))
        expected = jnp.minimum(count, self.num_negatives)

        terms = {"label": losses.cross_entropy(student.logits, y).mean()}
        new = {"label": known}
        for side, other in (("student", "teacher"), ("teacher", "student")):
            scores = jnp.matmul(entries[side], state[other]["bank"].T, precision="highest") / self.temperature
            contrast, log_partition = nce(scores, own, chosen, expected, state[side]["log_partition"])
            terms[f"{side}_contrast"] = self.beta * contrast.mean()
            old = state[side]["bank"][index]
            entry = self.bank_momentum * old + (1 - self.bank_momentum) * jax.lax.stop_gradient(entries[side])
            bank = state[side]["bank"].at[index].set(_maps.unit(entry).astype(old.dtype), unique_indices=True)
            new[side] = {"bank": bank, "log_partition": log_partition}
        return terms, new, {"negatives": chosen.sum(axis=-1).mean()}


def nce(scores, own, chosen, expected, log_partition):
    """Each example's contrast, [B], and log Z, from the scores of all of the bank, [B, N]; log Z -inf: not set yet."""
    num_examples, counted = scores.shape[-1], own | chosen
    first = jax.nn.logsumexp(scores, where=counted) - jnp.log(counted.sum(dtype=scores.dtype) / num_examples)
    log_partition = jax.lax.stop_gradient(jnp.where(jnp.isneginf(log_partition), first, log_partition))
    log_p, noise = scores - log_partition, (expected / num_examples).astype(scores.dtype)
    log_sum = jnp.logaddexp(log_p, jnp.log(noise + EPSILON))
    positive = jnp.sum(log_p - log_sum, axis=-1, where=own)
    negative = jnp.sum(jnp.log(jnp.maximum(noise, EPSILON)) - log_sum, axis=-1, where=chosen)
    return -(positive + negative), log_partition


class Projection(nn.Module):
    """A linear map to a point of the unit sphere."""

    dim: int

    @nn.compact
    def __call__(self, x):
        """[B, D] -> [B, dim]."""
        bias_init = torch_default_bias(x.shape[-1])
        return _maps.unit(nn.Dense(self.dim, kernel_init=torch_default, bias_init=bias_init)(x))
