"""MiniLM with our adapters under Lightning, automatic or (``--manual``) manual optimization.

python examples/lightning_fit.py --steps 40 --folder output/lightning              # saves the state at the end
python examples/lightning_fit.py --steps 80 --folder output/lightning --resume     # goes on from there, bit for bit
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from data import Batch, load_classifier, load_splits
from folders import check_folder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowrank_kernels as lrk


class Classification(lightning.LightningModule):
    """The classifier and its batches; which batch a step takes depends on the step alone, so that a resumed run takes the same."""

    def __init__(self, model: nn.Module, batches: list[Batch], manual: bool) -> None:
        super().__init__()
        self.model, self.batches, self.automatic_optimization = model, batches, not manual

    def train_dataloader(self) -> range:
        return range(len(self.batches))

    def training_step(self, batch: int, index: int) -> Tensor | None:
        inputs, labels = self.batches[self.global_step % len(self.batches)]
        loss = cross_entropy(self.model(**inputs), labels)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return lrk.AltLoRA(self.model, lr=1e-3)


def main(arguments: list[str] | None = None) -> nn.Module:
    """Train; returns the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("examples/output/lightning"), help="where the state goes")
    parser.add_argument("--steps", type=int, default=40, help="train up to this step")
    parser.add_argument("--manual", action="store_true", help="manual optimization in place of automatic")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --folder")
    args = parser.parse_args(arguments)
    checkpoint = args.folder / "last.ckpt"
    check_folder(parser, args, checkpoint.name)
    torch.manual_seed(0)
    model = load_classifier()
    lrk.adapt(model.backbone, rank=8, target_modules=["query", "value"])
    batches = load_splits(max_length=32, train=320).train.training_batches(40, 8, 0, torch.device("cpu"))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    clip = {} if args.manual else {"gradient_clip_val": 1.0}
    trainer = lightning.Trainer(max_steps=args.steps, max_epochs=-1, accelerator="cpu", **quiet, **clip)
    trainer.fit(Classification(model, batches, args.manual), ckpt_path=checkpoint if args.resume else None, weights_only=True)
    trainer.save_checkpoint(checkpoint)
    return model


if __name__ == "__main__":
    main()
