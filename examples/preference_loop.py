"""A TRL-style loop on MiniLM: several clipped policy steps on each batch, held near the model as it started (the adapters switched off).

python examples/preference_loop.py --rounds 10 --folder output/preference             # saves the state at the end
python examples/preference_loop.py --rounds 20 --folder output/preference --resume    # goes on from there, bit for bit
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import load_classifier, load_splits
from folders import check_folder
from peft import LoraConfig, get_peft_model
from torch import nn

import lowrank_kernels as lrk


def main(arguments: list[str] | None = None) -> nn.Module:
    """Train; returns the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("examples/output/preference"), help="where the state goes")
    parser.add_argument("--rounds", type=int, default=10, help="train up to this batch")
    parser.add_argument("--epochs", type=int, default=3, help="steps on each batch")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --folder")
    args = parser.parse_args(arguments)
    state = args.folder / "state.pt"
    check_folder(parser, args, state.name)
    torch.manual_seed(0)
    model = load_classifier()
    model.backbone = get_peft_model(model.backbone, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    optimizer, first = lrk.ScaledAdamW(model, lr=1e-3, nonfinite_grads="skip"), 0
    if args.resume:
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["rounds"]
    batches = load_splits(max_length=32, train=320).train.training_batches(args.rounds, 8, 0, torch.device("cpu"))
    for inputs, labels in batches[first:]:
        with torch.no_grad():
            old = model(**inputs).log_softmax(-1)
            with model.backbone.disable_adapter():
                anchor = model(**inputs).log_softmax(-1)
        advantage = torch.where(old.argmax(-1) == labels, 1.0, -1.0)
        action = old.argmax(-1, keepdim=True)
        for _ in range(args.epochs):
            now = model(**inputs).log_softmax(-1)
            ratio = (now - old).gather(1, action).squeeze(1).exp()
            gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
            loss = 0.1 * (now.exp() * (now - anchor)).sum(-1).mean() - gain
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rounds": args.rounds}, state)
    return model


if __name__ == "__main__":
    main()
