"""MiniLM with PEFT's adapters under the Transformers Trainer; our optimizer is one argument.

python examples/hf_trainer.py --steps 40 --folder output/hf              # saves every --save-every steps
python examples/hf_trainer.py --steps 40 --folder output/hf --resume     # goes on from the last checkpoint, bit for bit
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import load_classifier, load_splits
from folders import check_folder
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import lowrank_kernels as lrk


class WithLoss(nn.Module):
    """Inputs and labels to a loss, as the Trainer calls models."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(input_ids, attention_mask)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class StopAfter(TrainerCallback):
    """Ends the run early, as a machine may."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def main(arguments: list[str] | None = None) -> nn.Module:
    """Train; returns the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("examples/output/hf"), help="where checkpoints go")
    parser.add_argument("--steps", type=int, default=40, help="of the whole run")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--stop-after", type=int, help="stop after this step, as an interrupted run would")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --folder")
    args = parser.parse_args(arguments)
    check_folder(parser, args, "checkpoint-*")
    torch.manual_seed(0)
    classifier = load_classifier()
    classifier.backbone = get_peft_model(classifier.backbone, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    sentences = load_splits(max_length=32, train=320).train

    def collate(indices: list[int]) -> dict[str, Tensor]:
        inputs, labels = sentences.batch(indices, torch.device("cpu"))
        return {**inputs, "labels": labels}

    trainer = Trainer(
        model=WithLoss(classifier),
        args=TrainingArguments(
            str(args.folder),
            max_steps=args.steps,
            save_steps=args.save_every,
            per_device_train_batch_size=8,
            lr_scheduler_type="cosine",
            report_to=[],
            remove_unused_columns=False,
        ),
        train_dataset=range(len(sentences.ids)),
        data_collator=collate,
        callbacks=[StopAfter(args.stop_after)],
        optimizer_cls_and_kwargs=(lambda: lrk.AltLoRAPlus, {"lr": 1e-3}),
    )
    trainer.train(resume_from_checkpoint=args.resume)
    return trainer.model


if __name__ == "__main__":
    main()
