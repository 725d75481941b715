"""Trainer, Accelerate and Lightning: train, save, stop, resume, equal to the uninterrupted run."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from _matrix import Cell, assert_moved, assert_same, data, feature, models, of_peft, ours, values, with_peft
from torch import Tensor, nn
from torch.utils.data import Dataset

STEPS, STOP = 10, 6


class Rows(Dataset):
    """One sentence's worth of data a row, four rows a step."""

    def __init__(self, steps: int = STEPS) -> None:
        self.x, self.y = data(0, rows=4 * steps)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


class WithLoss(nn.Module):
    """What the Trainer calls: inputs and labels to a loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.inner(x)
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else logits.sum()
        return {"loss": loss, "logits": logits}


def trainer_run(model: nn.Module, folder: Path, resume: bool = False, stop: int | None = None, **how: Any) -> Any:
    """A Trainer run of STEPS steps (stopped after ``stop``), saving every STOP."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == stop

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STOP,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        max_grad_norm=0.5,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1000,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Stop()], **how)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}") if resume else None)
    return trainer


def assert_trainer_resumes(cell: Cell, make: Any, how: Any) -> None:
    whole = make()
    before = values(whole)
    trainer_run(whole, cell.folder / "whole", **how(whole))
    assert_moved(before, whole)
    trainer_run(stopped := make(), cell.folder / "stopped", stop=STOP, **how(stopped))
    trainer = trainer_run(resumed := make(), cell.folder / "stopped", resume=True, **how(resumed))
    assert trainer.state.global_step == STEPS
    assert_same(resumed, whole)


@feature("Transformers Trainer: optimizer_cls_and_kwargs with a factory (PEFT's layers), resume = uninterrupted", of_peft)
def trainer_factory(cell: Cell) -> None:
    assert_trainer_resumes(
        cell, lambda: WithLoss(with_peft(cell)), lambda _: {"optimizer_cls_and_kwargs": (lambda: cell.optimizer, {"lr": 1e-2})}
    )


@feature("Transformers Trainer: optimizer_cls_and_kwargs with the class (our layers; refused for PEFT's), optimizers=")
def trainer_class(cell: Cell) -> None:
    cls, kwargs = cell.method.optimizer, {"lr": 1e-2, **cell.method.options}
    assert_trainer_resumes(cell, lambda: WithLoss(ours(cell)), lambda _: {"optimizer_cls_and_kwargs": (cls, kwargs)})
    if cls.requires_pairs:
        with pytest.raises(ValueError, match="found no pair of low-rank factors|found no core lora_R"):
            trainer_run(WithLoss(with_peft(cell)), cell.folder / "no", optimizer_cls_and_kwargs=(cls, kwargs))
    if cell.name == "OPLoRA":
        model = WithLoss(with_peft(cell))
        before = values(model)
        trainer_run(model, cell.folder / "model", optimizer_cls_and_kwargs=(cls, {**kwargs, "model": model}))
        assert_moved(before, model)
    model, twin = WithLoss(ours(cell)), WithLoss(ours(cell))
    trainer_run(model, cell.folder / "a", optimizers=(cell.optimizer(model), None))
    trainer_run(twin, cell.folder / "b", optimizer_cls_and_kwargs=(lambda: cell.optimizer, {}))
    assert_same(model, twin)


@feature("Accelerate: prepare, accumulate, clip, save_state, load_state, resume = uninterrupted")
def accelerate_resume(cell: Cell) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def run(model: nn.Module, first: int, last: int, load: Path | None = None, save: Path | None = None) -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = cell.optimizer(model)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2 * STEPS)
        prepared, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        if load:
            accelerator.load_state(str(load))
        for step in range(2 * first, 2 * last):
            with accelerator.accumulate(prepared):
                x, y = data(step)
                accelerator.backward(nn.functional.cross_entropy(prepared(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if save:
            accelerator.save_state(str(save))

    for make in models(cell):
        whole, first, second = make(cell), make(cell), make(cell)
        before = values(whole)
        run(whole, 0, STEPS)
        assert_moved(before, whole)
        run(first, 0, STOP, save=cell.folder / make.__name__)
        run(second, STOP, STEPS, load=cell.folder / make.__name__)
        assert_same(second, whole)


def lightning_module(cell: Cell, model: nn.Module, manual: bool) -> Any:
    """A LightningModule around the model, with automatic or manual optimization."""
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = model, not manual

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor | None:
            # By the step: Lightning does not promise where in an epoch a resumed run goes on.
            x, y = data(self.trainer.global_step)
            loss = nn.functional.cross_entropy(self.model(x), y)
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            return None

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return cell.optimizer(self.model)

    return Module()


def lightning_resumes(cell: Cell, manual: bool) -> None:
    pl = pytest.importorskip("lightning")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

    def fit(model: nn.Module, steps: int, checkpoint: Path | None = None) -> Any:
        options = {} if manual else {"gradient_clip_val": 0.5}
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        batches = torch.utils.data.DataLoader(Rows(), batch_size=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(lightning_module(cell, model, manual), batches, ckpt_path=checkpoint, weights_only=True)
        return trainer

    for make in models(cell):
        whole, first, second = make(cell), make(cell), make(cell)
        before = values(whole)
        fit(whole, STEPS)
        assert_moved(before, whole)
        fit(first, STOP).save_checkpoint(cell.folder / "lightning.ckpt")
        fit(second, STEPS, cell.folder / "lightning.ckpt")
        assert_same(second, whole)


@feature("Lightning, automatic optimization: clip, save, resume = uninterrupted")
def lightning_automatic(cell: Cell) -> None:
    lightning_resumes(cell, manual=False)


@feature("Lightning, manual optimization: clip, save, resume = uninterrupted")
def lightning_manual(cell: Cell) -> None:
    lightning_resumes(cell, manual=True)


@feature("TRL: SFTTrainer and its relatives take what Trainer takes (a subclass of Trainer)")
def trl_takes_it(cell: Cell) -> None:
    """TRL's trainers hand ``optimizers=`` and ``optimizer_cls_and_kwargs=`` to Trainer; a subclass with its own loss stands for them."""
    from transformers import Trainer, TrainingArguments

    class Preference(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            logits = model(inputs["x"])["logits"].log_softmax(-1)
            chosen = logits.gather(1, inputs["labels"][:, None])
            rejected = logits.gather(1, (inputs["labels"][:, None] + 1) % logits.shape[1])
            loss = -nn.functional.logsigmoid(chosen - rejected).mean()
            return (loss, {"logits": logits}) if return_outputs else loss

    model = WithLoss(models(cell)[-1](cell))
    before = values(model)
    arguments = TrainingArguments(
        output_dir=str(cell.folder), max_steps=STEPS, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1000
    )
    with contextlib.redirect_stdout(io.StringIO()):
        Preference(model=model, args=arguments, train_dataset=Rows(), optimizers=(cell.optimizer(model), None)).train()
    assert_moved(before, model)
