"""A small recommender, dense beside deferred: the same loss to the last bit, and both times.

Users and items are rows of embedding tables; a rating is the product of two rows. Which items are
rated follows Zipf's law, so that a batch uses few of the rows. Once in NumPy, with gradients by
HIPS autograd, and once in PyTorch.
"""

import time

import autograd.numpy as anp
import numpy as np
import torch
from autograd import value_and_grad

import omniadam
import omniadam.torch

USERS, ITEMS, WIDTH, BATCH, STEPS = 20_000, 50_000, 32, 512, 30
rng = np.random.default_rng(0)
batches = [
    (
        rng.integers(0, USERS, BATCH),
        np.minimum(rng.zipf(1.2, BATCH), ITEMS) - 1,
        rng.standard_normal(BATCH).astype(np.float32),
    )
    for _ in range(STEPS)
]
tables = [(0.1 * rng.standard_normal((n, WIDTH))).astype(np.float32) for n in (USERS, ITEMS)]


def loss(u, v, ratings):
    return anp.mean((anp.sum(u * v, axis=1) - ratings) ** 2)


def train_numpy(deferred):
    users, items = (omniadam.Table(t) if deferred else t.copy() for t in tables)
    look = (lambda t, ids: t.lookup(ids)) if deferred else (lambda t, ids: t[ids])
    opt = omniadam.Adam(0.01, global_clipnorm=1.0)
    start = time.perf_counter()
    for u, v, ratings in batches:
        rows = look(users, u), look(items, v)
        value, (gu, gv) = value_and_grad(lambda rows, r=ratings: loss(*rows, r))(rows)
        opt.apply_gradients(
            [
                (omniadam.IndexedSlices(gu, u, users.shape), users),
                (omniadam.IndexedSlices(gv, v, items.shape), items),
            ]
        )
    return float(value), np.asarray(items), time.perf_counter() - start


def train_torch(deferred):
    model = torch.nn.ModuleList(
        torch.nn.Embedding.from_pretrained(torch.from_numpy(t.copy()), freeze=False, sparse=True)
        for t in tables
    )
    if deferred:
        omniadam.torch.defer(model)
    opt = omniadam.torch.Adam(model.parameters(), lr=0.01, global_clipnorm=1.0)
    start = time.perf_counter()
    for u, v, ratings in batches:
        opt.zero_grad()
        rows = model[0](torch.from_numpy(u)) * model[1](torch.from_numpy(v))
        value = (rows.sum(dim=1) - torch.from_numpy(ratings)).square().mean()
        value.backward()
        opt.step()
    return value.item(), model[1].weight.detach().numpy(), time.perf_counter() - start


for library, train in (("NumPy", train_numpy), ("PyTorch", train_torch)):
    train(False), train(True)  # which compile their kernels
    dense, deferred = train(False), train(True)
    assert dense[0] == deferred[0] and np.array_equal(dense[1], deferred[1])
    print(
        f"{library:8} loss {deferred[0]:.6f} both times; "
        f"dense {dense[2]:.2f} s, deferred {deferred[2]:.2f} s"
    )
