"""DeepSpeed's engine, where it is installed: stage 0 is data parallelism as ever; ZeRO's flat partitions are refused."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import test_matrix  # noqa: F401 (registers the features, in the order of the page)
from _matrix import METHODS, Cell, data, ours, train
from _ranks import Ranks
from features_parallel import arrays, assert_close
from torch import Tensor, nn

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
STEPS = 8


class WithLoss(nn.Module):
    """What the engine calls: a batch to a loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.inner(x), y)


def engine_of(cell: Cell, stage: int) -> tuple[nn.Module, Any]:
    """The adapted model in DeepSpeed's engine, with the optimizer handed over."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    model = ours(cell)
    settings = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    engine, *_ = deepspeed.initialize(model=WithLoss(model), optimizer=cell.optimizer(model), config=settings)
    return model, engine


def steps_of(engine: Any, rank: int, world: int, first: int, last: int) -> None:
    for step in range(first, last):
        x, y = data(step)
        engine.backward(engine(x[rank::world], y[rank::world]))
        engine.step()


def run(rank: int, world: int, name: str, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stage 0: train, save, go on; resume and go on. Stages 1 and 2: the refusal."""
    cell = Cell(name, Path(), None)
    for stage in (1, 2):
        _, engine = engine_of(cell, stage)
        with pytest.raises(RuntimeError, match="DeepSpeed ZeRO flatten"):
            steps_of(engine, rank, world, 0, 1)
    model, engine = engine_of(cell, 0)
    steps_of(engine, rank, world, 0, STEPS // 2)
    engine.save_checkpoint(folder)
    steps_of(engine, rank, world, STEPS // 2, STEPS)
    again, engine = engine_of(cell, 0)
    engine.load_checkpoint(folder)
    steps_of(engine, rank, world, STEPS // 2, STEPS)
    return arrays(model), arrays(again)


@pytest.mark.parametrize("name", METHODS)
def test_stage_0_trains_and_resumes_and_zero_is_refused(name: str, tmp_path: Path, ranks: Ranks) -> None:
    (first, resumed), (second, _) = ranks(run, name, str(tmp_path))
    assert_close(first, second, 0.0)
    assert_close(first, resumed, 0.0)
    model = ours(cell := Cell(name, tmp_path, ranks))
    train(model, cell.optimizer(model), 0, STEPS)
    assert_close(first, arrays(model), 1e-2)  # fp32, and DeepSpeed adds in another order
