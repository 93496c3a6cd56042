"""One training step: a loop as it is usually written beside ours, on two threads and as two processes of one thread.

What better code gains and what two processes gain are different things, so the arms differ in one of them at a time. A
sample is the seconds of a step of one model; where two train side by side, half of what both together took.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab import host
from attnlab.measure.clock import time_fields
from attnlab.predict.machine import Machine
from attnlab.predict.time import Prediction, training_flops
from attnlab.results import Run, row_key
from attnlab.shapes import ModelShape
from attnlab.train.loop import compiled, initial, optimise
from attnlab.train.sweeps import SIZES, recipe

SHAPES = {"quick": ("1.7m",), "full": ("0.6m", "1.1m", "1.7m")}
ARMS = ("plain", "eager", "compiled", "plain, two processes", "eager, two processes", "compiled, two processes")
BATCH, CONTEXT, ROUNDS, STEPS = 8, 256, 9, 3


class Plain(nn.Module):
    """The LLaMA of ``shape`` (MHA) as a small training script writes it: a module for each matrix, scores of all tokens
    at once."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape, dim, ffn = shape, shape.dim, shape.ffn_dim
        self.embed = nn.Embedding(shape.vocab_size, dim)
        sizes = [(dim, dim)] * 4 + [(dim, ffn), (dim, ffn), (ffn, dim)]
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [nn.Linear(*size, bias=False) for size in sizes] + [nn.RMSNorm(dim, 1e-5), nn.RMSNorm(dim, 1e-5)]
            )
            for _ in range(shape.n_layers)
        )
        self.norm = nn.RMSNorm(dim, 1e-5)
        angles = torch.outer(torch.arange(CONTEXT), 1e4 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim))
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos())
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin())

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * self.cos + torch.cat((-second, first), -1) * self.sin

        x = self.embed(tokens)
        for q, k, v, o, gate, up, down, before, after in self.layers:
            h = before(x)
            heads = [m(h).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2) for m in (q, k, v)]
            mixed = F.scaled_dot_product_attention(turned(heads[0]), turned(heads[1]), heads[2], is_causal=True)
            x = x + o(mixed.transpose(1, 2).flatten(2))
            h = after(x)
            x = x + down(F.silu(gate(h)) * up(h))
        scores = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def new_step(name: str, shape: ModelShape) -> Callable[[], object]:
    """A step of training on random tokens, ready to be timed."""
    text = torch.randint(shape.vocab_size, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = text[:, :-1], text[:, 1:]
    if name != "plain":
        how = recipe(shape, 0, 10**8, batch=BATCH, context=CONTEXT, compiled=name == "compiled")
        ours = initial(shape, 0)
        hidden, ours_optimizer = compiled(how, ours), how.optimizer(ours)
        return lambda: optimise(how, ours, hidden, ours_optimizer, inputs, targets)
    model = Plain(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> None:
        loss = model(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def beside(connection: Any, name: str, shape: ModelShape) -> None:
    """A process of one thread that takes ``STEPS`` steps whenever it is told to, until it is told not to."""
    torch.set_num_threads(1)
    step = new_step(name, shape)
    step()
    connection.send("ready")
    while connection.recv():
        for _ in range(STEPS):
            step()
        connection.send("done")


@contextlib.contextmanager
def prepared(arm: str, shape: ModelShape) -> Iterator[Callable[[], float]]:
    """What takes one sample of ``arm``."""
    name, _, two = arm.partition(", ")
    if not two:
        step = new_step(name, shape)
        step()

        def alone() -> float:
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            return (time.perf_counter() - began) / STEPS

        yield alone
        return
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(2)]
    processes = [spawn.Process(target=beside, args=(far, name, shape), daemon=True) for _, far in pipes]
    for process in processes:
        process.start()
    for near, _ in pipes:
        assert near.recv() == "ready"

    def together() -> float:
        began = time.perf_counter()
        for near, _ in pipes:
            near.send(True)
        for near, _ in pipes:
            near.recv()
        return (time.perf_counter() - began) / STEPS / len(pipes)

    yield together
    for near, _ in pipes:
        near.send(False)
    for process in processes:
        process.join()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = SHAPES[metafunc.config.option.grid]
    metafunc.parametrize(("size", "arm"), [(size, arm) for size in sizes for arm in ARMS])


def test_step(size: str, arm: str, run: Run, machine: Machine, replay: Callable[[Any], None], benchmark: Any) -> None:
    shape, benchmark.group = SIZES[size], f"a training step of {size}, {BATCH} × {CONTEXT} tokens"
    configurations = {
        each: {"kind": "training", "impl": each, "size": size, "batch": BATCH, "context": CONTEXT} for each in ARMS
    }
    if row_key(configurations[arm]) not in run:
        flops = BATCH * CONTEXT * training_flops(shape, CONTEXT)
        seconds = flops / machine.compute_roof("float32")
        prediction = Prediction(seconds, {"compute": seconds}, "compute", 0, int(flops))
        busy, load = host.wait_for_quiet(), host.Load()
        samples: dict[str, list[float]] = {each: [] for each in ARMS}
        with contextlib.ExitStack() as stack:
            takes = {each: stack.enter_context(prepared(each, shape)) for each in ARMS}
            for _ in range(ROUNDS):
                for each, take in takes.items():
                    samples[each].append(take())
        for each in ARMS:
            fields = time_fields(samples[each], prediction, load, busy)
            speed = BATCH * CONTEXT / fields["median"]
            said = {"status": "ok", "tokens_per_second": speed, "mfu": fields["predicted"] / fields["median"]}
            row = {**host.describe("cpu"), **configurations[each], "n_params": shape.n_params, **fields, **said}
            run.append(row_key(configurations[each]), row)
    replay(run[row_key(configurations[arm])])
