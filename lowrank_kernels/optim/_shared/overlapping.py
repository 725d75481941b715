"""What a method needs whose steps overlap with the backward pass: they begin there, layer by layer, on copies of what they change."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._checks import as_flag
from ...backends.lists import on_device
from ...backends.registry import do_nothing
from ...parallel.ranks import data_parallel_group
from .arguments import ParamsT
from .background import EarlyWork, Tensors, start
from .full_gradient import FullGradients
from .pairing import FactorPair
from .watching import WatchingOptimizer

#: How far from 1 the factor may be that was measured between the captured gradient and ``.grad``, by rounding.
UNSCALED = 1e-2


class OverlappingOptimizer(WatchingOptimizer):
    """With ``overlap=True`` the step of a layer begins as soon as its gradient has come, and ``step()`` takes the result over.

    A method says what its step of some layers changes, and takes the step on these tensors or on copies of them.
    """

    #: The hyperparameters, apart from the factors' weight decay, after whose change an early result does not count.
    early_reads: tuple[str, ...] = ()

    def __init__(self, params: ParamsT, lr: float | Tensor, *, overlap: bool, **options: Any) -> None:
        as_flag(type(self).__name__, "overlap", overlap)
        self._overlap = bool(overlap)
        self._early: dict[int, EarlyWork] = {}  # by the pair's number
        super().__init__(params, lr, **options)

    def _tensors(self, pairs: list[FactorPair]) -> Tensors:
        """What a step of these layers changes: A, B and the state."""
        raise NotImplementedError

    def _step_pairs(self, gradients: FullGradients, updates: list[int], begin_writing: Callable[[], object], tensors: Tensors) -> None:
        """One step, the ``updates``-th of each layer, of layers that agree in rank, dtype, device and groups, on tensors as
        :meth:`_tensors` has them. ``begin_writing`` is called before the first of these is written.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- in the backward pass

    def _accept_pairs(self) -> None:
        super()._accept_pairs()
        self._listen()

    def _listen(self) -> None:
        """Let the recorders say when a gradient has come."""
        if self._overlap:
            itself = weakref.ref(self)  # a recorder does not keep the optimizer alive
            for number, recorder in enumerate(self._recorders):
                recorder.notify = lambda number=number: optimizer._start(number) if (optimizer := itself()) is not None else None

    @torch.no_grad()
    def _start(self, number: int) -> None:
        """Begin the step of one layer, on copies, while the backward pass goes on; called when its gradient has come."""
        pair, recorder = self._pairs[number], self._recorders[number]
        if data_parallel_group(self._process_group) is not None:
            raise RuntimeError(f"{type(self).__name__}: overlap=True is for one process; several ranks work with overlap=False")
        if self._at(pair.b) not in self.state or self._at(pair.a) not in self.state:
            return  # the first step creates the state
        gradients = FullGradients([pair], [(self._matrix(pair.a), self._matrix(pair.b))], [recorder.gradient], [recorder.scale], None)
        gradients.coefficients = on_device([1.0 / recorder.scale], gradients.factors[0][0].device)
        (update,) = self._updates([pair])

        def change(copies: Tensors) -> None:
            self._step_pairs(gradients, [update + 1], do_nothing, copies)

        self._early[number] = start(change, self._tensors([pair]), self._made_from(pair), gradients.tensors())

    def _made_from(self, pair: FactorPair) -> list[object]:
        """What the step of a layer depends on, apart from its gradient and state."""
        group = self._group(pair)
        return [*(group[key] for key in self.early_reads), self._factor_decay(group), self._at(pair.a)._version, self._at(pair.b)._version]

    # ---------------------------------------------------------------- in the step

    def _early_results(self, gradients: list[FullGradients]) -> list[list[Tensors]]:
        """For each list of layers, what was computed early of each of them, as :meth:`_tensors` has it; nothing, if it was not for all of
        them as they and the group are now.

        Waits for it, and raises what it raised.
        """
        if self._overlap:
            self._check_unscaled(gradients)
        try:
            return [self._early_results_of(found.pairs) for found in gradients]
        except BaseException:
            self._early.clear()  # nothing has been changed: the next step() does the work itself
            raise

    def _early_results_of(self, pairs: list[FactorPair]) -> list[Tensors]:
        if not self._early:
            return []
        numbers = {id(pair): number for number, pair in enumerate(self._pairs)}
        works = [(pair, self._early.get(numbers[id(pair)])) for pair in pairs]
        results = [work.result(self._made_from(pair)) for pair, work in works if work is not None]
        found = [result for result in results if result is not None]
        return found if len(found) == len(pairs) else []

    def _take_over(self, pairs: list[FactorPair], results: list[Tensors]) -> None:
        """Take over what was computed early."""
        targets = [self._tensors([pair]) for pair in pairs]
        self._begin_writing()
        written, found = ([x for tensors in side for part in tensors for x in part] for side in (targets, results))
        torch._foreach_copy_(written, found)
        for pair, tensors in zip(pairs, targets, strict=True):
            self._write_back([pair], *tensors[:2])

    def _check_unscaled(self, gradients: list[FullGradients]) -> None:
        for found in gradients:
            for pair, c, m in zip(found.pairs, found.coefficients.tolist(), found.multipliers, strict=True):
                if abs(c * m - 1.0) > UNSCALED:
                    raise RuntimeError(
                        f"{type(self).__name__}: the gradient of {pair.name} was multiplied by {c * m:.4g} after the backward pass "
                        "(clipping, GradScaler), in which overlap=True has already used it; nothing was changed. Use overlap=False"
                    )

    # ---------------------------------------------------------------- forgetting, copying

    def _forget(self) -> None:
        for work in self._early.values():
            work.wait()
        self._early.clear()
        super()._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_overlap": self._overlap}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_overlap" in state:  # a copy
            self._early = {}
            self._listen()
