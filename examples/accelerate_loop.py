"""MiniLM with our adapters in an Accelerate loop: accumulation, clipping, saving and resuming.

python examples/accelerate_loop.py --steps 40 --folder output/accelerate             # saves the state at the end
python examples/accelerate_loop.py --steps 80 --folder output/accelerate --resume    # goes on from there, bit for bit
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from data import load_classifier, load_splits
from folders import check_folder
from torch import nn
from torch.nn.functional import cross_entropy

import lowrank_kernels as lrk

ACCUMULATE = 2


def main(arguments: list[str] | None = None) -> nn.Module:
    """Train; returns the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("examples/output/accelerate"), help="where the state goes")
    parser.add_argument("--steps", type=int, default=40, help="train up to this step")
    parser.add_argument("--total-steps", type=int, default=1000, help="of the whole run, which SDS-LoRA's schedule is a function of")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --folder")
    args = parser.parse_args(arguments)
    check_folder(parser, args, "step")
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
    model = load_classifier()
    lrk.adapt(model.backbone, method="sds", rank=8, alpha=4, target_modules=["query", "value"])
    optimizer = lrk.SDSLoRA(model, lr=1e-3, total_steps=args.total_steps)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.total_steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    first = 0
    if args.resume:
        accelerator.load_state(str(args.folder))
        first = int((args.folder / "step").read_text())
    batches = load_splits(max_length=32, train=320).train.training_batches(ACCUMULATE * args.steps, 4, 0, accelerator.device)
    for inputs, labels in batches[ACCUMULATE * first :]:
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(**inputs), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.save_state(str(args.folder))
    (args.folder / "step").write_text(str(args.steps))
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
