"""OPLoRA: the step that full training would take, projected onto rank r by alternating least squares."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Unpack

import torch
from torch import Tensor

from .._checks import as_integer, as_number, check_choice
from ..backends.dtypes import compute_dtype
from ..backends.lists import on_device, partition, widened
from ..backends.moments import scalar
from ..ops import grouped_gram, grouped_lorsum_product, grouped_solve
from ..ops.lorsum import lorsum_in_step
from ..parallel.ranks import data_parallel_group
from ..parallel.shards import KEEP_WHOLE
from ._shared.arguments import LARGEST, AdamWOptions, ParamsT, refuse_adams
from ._shared.background import Tensors
from ._shared.full_gradient import FullGradients
from ._shared.held_gradient import KINDS, random_matrix
from ._shared.kfac import Kronecker, track
from ._shared.lorsum import composed_lorsum, damped
from ._shared.overlapping import OverlappingOptimizer
from ._shared.pairing import FactorPair, Position

MOMENTUM_MODES = ("lowrank", "projected", "naive")
METRICS = (None, "kfac")
#: More would take an age, and no backend counts as far as Python does.
MOST_SWEEPS = 1_000_000


class OPLoRA(OverlappingOptimizer):
    """OPLoRA (Almansoori et al. 2025, Algorithm 1), with U = B, V = Aᵀ, G the gradient of the full weight, and K sweeps::

        sUVᵀ ← LoRSum((1 - lr·weight_decay) sUVᵀ - lr (G + αM))        lr is a step length in weight space, whatever s
        M ← LoRSum(αM + G)                                              tracked at rank ``momentum_rank``

    LoRSum is :func:`~lowrank_kernels.ops.grouped_lorsum`: K times the best U for the V at hand, then the best V, each held near its start
    by λ. As K grows this is the truncated SVD of the full step (SVDLoRA).

    With ``metric="kfac"`` (Algorithm 1's scaled variant, Appendix B; experimental, as in the paper) the step is that of K-FAC, and "near"
    and "best" are meant in its metric ``‖ΔW‖² = ⟨ΔW, D_U ΔW D_V⟩``::

        D_V ← LoRSum(βD_V + (1-β) XᵀX/n)      D_U ← LoRSum(βD_U + (1-β) SᵀS/n)      n tokens, rank ``metric_rank``, damped by δI
        sUVᵀ ← LoRSum((1 - lr·weight_decay) sUVᵀ - lr D_U⁻¹(G + αM)D_V⁻¹;  D_U, D_V)

    Three choices where the paper is open or cannot be followed. Algorithm 2 prints ``V₁ᵀV`` in the product with the weight for the
    ``V₁ᵀD_V V`` of Equation 10; with that the factors would move at G = 0. The averages start at 0 and are divided by ``1 - βᵗ``, as
    Adam's: a start from 1 would hide ``SᵀS/n``, whose size is that of S², for hundreds of steps. And D is kept symmetric, see
    :func:`~lowrank_kernels.optim._shared.kfac.track`. D's own LoRSum has λ = 0: an absolute λ would hold D_U,
    of the size of S², where it is. S is what belongs to ``.grad``: unscaled and clipped.

    G is not in ``.grad``: the optimizer sees the inputs X and the output gradients S of the layers (``G = SᵀX``) in the backward
    pass, by a slot of our layers or by hooks on other libraries'. A and B keep their ordinary ``.grad``, and what was done to it between
    backward and ``step()``, unscaling and clipping by norms, is done to G: the factor is measured, layer by layer, as
    ``c = ⟨∂B, s·GAᵀ⟩ / ‖s·GAᵀ‖²`` (by A's gradient where A = 0). If more than 30 % of ∂B, as a norm, is no multiple of the captured
    ``s·GAᵀ``, or it is not finite, ``step()`` raises before it changes anything; that check is its one wait for the device. What changes
    less than that passes, and the step is c times the captured G: ``clip_grad_value_`` of a few elements, noise on ``.grad``, or a
    ``torch.autograd.grad`` through the layers between backward and ``step()``, whose gradient is captured too and not in ``.grad``.

    Convolutions (PEFT's 1-d and 2-d ones, not in groups) are linear layers of their patches: G is (d_out, d_in·k·k), A and B are matrices
    (r, d_in·k·k) and (d_out, r), and a token is a position of the output. There are many, and X holds every input k·k times: "dense" is
    the small one, as a rule. Other convolutions get AdamW, and a notice says so.

    Gradients add up over micro-batches until ``step()`` or ``zero_grad()``, which drop them. A step that ``GradScaler`` skips drops them by
    ``zero_grad()``. A layer without gradient misses the step, its momentum too. With ``gradient="factors"`` several micro-batches' X and S
    are put one below the other in ``step()``: two launches a layer, and a copy of what was kept, layer by layer; the others keep sums.

    Data parallelism: each rank holds its own X and S, G is the mean over the ranks, and what is sent are the thin products GV and
    GᵀU of each half sweep (the sketches, with ``gradient="sketch"``). Every rank takes part in every step, so
    ``step()`` raises in ``DistributedDataParallel.join()``, where a rank that is out of data does not.

    Args:
        params, lr, maximize, scale, …: see :class:`LowRankOptimizer`; parameters that are no factors get AdamW with its default betas
            and eps. Layers that are not ours need the model: as ``params``, or as ``model`` beside groups.
        momentum: α of ``M ← αM + G``; 0 keeps no state for the factors. OneCycleLR and CyclicLR cycle ``betas`` instead, which are
            those of the parameters that are no factors: pass them ``cycle_momentum=False``.
        weight_decay: decoupled, multiplied by lr; of ΔW as a whole, and of the rest. None: 0 for ΔW, AdamW's 0.01 for the rest.
        sweeps: K ≥ 1. One or two are enough in the paper.
        proximal: λ ≥ 0, absolute, in both solves of a sweep (the paper's 1e-3).
        momentum_mode: "lowrank" (above); "projected" (LoFT), ``M ← (αM + G) A⁺A`` with the A at which G was taken; "naive", which keeps
            ``M_U ← αM_U + GA⁺`` and takes ``M_U A`` for M with whatever A is by then.
        momentum_rank: rank of M with "lowrank"; None: r. A layer that is smaller has its smaller width.
        gradient: how G is held: "factors" (X and S, exact), "dense" (the sum, exact; smaller than the factors from
            d_in·d_out/(d_in + d_out) tokens on, but a weight gradient's GEMM) or "sketch" (p(d_out + 2d_in) numbers, approximate; see
            :class:`~lowrank_kernels.optim._shared.held_gradient.Sketch` for its error).
        sketch_width: p.
        metric: None or "kfac", which needs X and S: ``gradient="factors"``.
        metric_decay: β of the averages, 0 … 1, 1 excluded.
        metric_damping: δ > 0, absolute, added to both D_U and D_V, whose entries have the units of S² and X². With 1, D ≥ I: no direction
            gets a longer step than without a metric, so an lr that is stable there stays so (on the MNIST task, δ = 0.1 and less
            diverged at all but tiny lr). SᵀS/n is far below 1 for the mean of a loss: then the input's side is what is scaled.
        metric_rank: rank k of D_U and D_V; None: r. At most the layer's smaller width.
        seed: of the sketches and of the first V of M, and W of D.
        overlap: begin each layer's sweeps in the backward pass, as soon as its S is known: in a worker thread on a CPU, on a side
            stream on a GPU, layer by layer and on copies of what a step changes; ``step()`` takes the results over. For one backward pass
            a step and no clipping or scaling: these raise. The first step creates the state and is an ordinary one; so is one whose lr was
            changed after the backward pass.
        process_group: over which the gradients are averaged; None: the default group if ``torch.distributed`` is initialized; False: none.
        lr_ratio, capturable: not supported.

    State: of B ``momentum_u`` (d_out, momentum_rank), of A ``momentum_v`` (d_in, momentum_rank; not with "naive"): the factors' size, half
    of Adam's. The metrics ``D = W diag(σ) Wᵀ`` add as much: W as ``metric_basis`` (d_out, k) of B, (d_in, k) of A, and σ as
    ``metric_values`` (k,). Beside it, what ``gradient`` holds from backward to ``step()``.

    Raises:
        TypeError, ValueError: no pair of factors among ``params``, an argument of a wrong kind or out of range.
    """

    trains_convolutions = True
    moves_both_factors = True
    adamw_takes_factors = False
    numbers = (*OverlappingOptimizer.numbers, "proximal", "metric_decay", "metric_damping")
    fixed = frozenset({"momentum_mode", "momentum_rank", "gradient", "sketch_width", "metric", "metric_rank"})
    early_reads = ("lr", "momentum", "maximize", "sweeps", "proximal", "momentum_mode", "metric", "metric_decay", "metric_damping")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float | None = None,
        *,
        sweeps: int = 2,
        proximal: float = 1e-3,
        momentum_mode: str = "lowrank",
        momentum_rank: int | None = None,
        gradient: str = "factors",
        sketch_width: int = 64,
        metric: str | None = None,
        metric_decay: float = 0.95,
        metric_damping: float = 1.0,
        metric_rank: int | None = None,
        seed: int = 0,
        overlap: bool = False,
        process_group: Any = None,
        **options: Unpack[AdamWOptions],
    ) -> None:
        refuse_adams(type(self), options)
        seed = as_integer("OPLoRA", "seed", seed, -math.inf, math.inf)
        method = {
            "momentum": momentum,
            "sweeps": sweeps,
            "proximal": proximal,
            "momentum_mode": momentum_mode,
            "momentum_rank": momentum_rank,
            "gradient": gradient,
            "sketch_width": sketch_width,
            "metric": metric,
            "metric_decay": metric_decay,
            "metric_damping": metric_damping,
            "metric_rank": metric_rank,
        }
        super().__init__(
            params,
            lr,
            weight_decay=weight_decay,
            seed=seed,
            overlap=overlap,
            process_group=process_group,
            method_defaults=method,
            **options,
        )

    # ---------------------------------------------------------------- arguments

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        super()._check_hyperparameters(group)
        as_integer(name, "sweeps", group["sweeps"], 1, MOST_SWEEPS)
        as_number(name, "proximal", group["proximal"], 0.0)
        for key, allowed in (("momentum_mode", MOMENTUM_MODES), ("gradient", KINDS), ("metric", METRICS)):
            check_choice(name, key, group[key], allowed)
        for key in ("momentum_rank", "sketch_width", "metric_rank"):
            if group[key] is not None or key == "sketch_width":
                as_integer(name, key, group[key])
        if group["momentum_rank"] is not None and group["momentum_mode"] != "lowrank":
            raise ValueError(f"{name}: momentum_rank is for momentum_mode='lowrank'; {group['momentum_mode']!r} has the factors' rank")
        if not 0.0 <= group["metric_decay"] < 1.0:
            raise ValueError(f"{name}: metric_decay must be in [0, 1), got {group['metric_decay']}")
        if not group["metric_damping"] >= 1 / LARGEST:
            raise ValueError(
                f"{name}: metric_damping must be positive, and not so small that its inverse is not finite, got {group['metric_damping']}; "
                "metrics of rank k are singular without"
            )
        if group["metric"] is None and group["metric_rank"] is not None:
            raise ValueError(f"{name}: metric_rank is for metric='kfac'; without a metric there is nothing of this rank")
        if group["metric"] is not None and group["gradient"] != "factors":
            raise ValueError(
                f"{name}: metric={group['metric']!r} is made of X and S, which gradient={group['gradient']!r} does not keep; use 'factors'"
            )
        if group["lr_ratio"] != 1.0:
            raise ValueError(f"{name}: lr_ratio is not supported: lr is the length of one step of ΔW, not of A and of B")
        if group["capturable"]:
            raise ValueError(f"{name}: capturable=True is not supported: a step reads on the host whether the gradients fit and are finite")

    def _accept_sharded(self, pair: FactorPair) -> None:
        raise RuntimeError(f"{type(self).__name__}: {pair.name} is sharded (a DTensor), and a sweep needs whole factors; {KEEP_WHOLE}")

    # ---------------------------------------------------------------- state

    def _factor_state(self, group: dict[str, Any], part: Tensor, rank: int) -> dict[str, Tensor]:
        return {}  # A and B differ: see _create_state

    def _state_shapes(self, pair: FactorPair, group: dict[str, Any]) -> Iterator[tuple[Position, str, tuple[int, ...]]]:
        """The state of a pair under the hyperparameters of ``group``: of which factor, name and shape."""
        sides = ((pair.b, "u", len(self._at(pair.b))), (pair.a, "v", self._matrix(pair.a).shape[1]))
        smallest = min(height for _, _, height in sides)
        if group["momentum"]:
            lowrank = group["momentum_mode"] == "lowrank"
            rank = min(group["momentum_rank"] or self._rank(pair), smallest) if lowrank else self._rank(pair)
            for position, side, height in sides if group["momentum_mode"] != "naive" else sides[:1]:
                yield position, f"momentum_{side}", (height, rank)
        if group["metric"]:
            rank = min(group["metric_rank"] or self._rank(pair), smallest)
            for position, _, height in sides:
                yield position, "metric_basis", (height, rank)
                yield position, "metric_values", (rank,)

    def _create_state(self) -> bool:
        created = super()._create_state()
        for pair in self._pairs:
            group, of_b = self._group(pair), self.state.get(self._at(pair.b), ())
            if ("momentum_u" in of_b or not group["momentum"]) and ("metric_basis" in of_b or not group["metric"]):
                continue  # in every step but the first, with so many small layers
            for position, name, shape in self._state_shapes(pair, group):
                p = self._at(position)
                if p not in self.state or name in self.state[p]:
                    continue
                if name == "momentum_v":  # M = 0 by U = 0; zero factors would stay zero
                    self.state[p][name] = random_matrix(p, self._seed, *shape) / shape[0] ** 0.5
                elif name == "metric_basis":  # D = 0 by σ = 0
                    self.state[p][name] = torch.linalg.qr(random_matrix(p, self._seed, *shape, *position))[0]
                else:
                    self.state[p][name] = torch.zeros(shape, dtype=compute_dtype(p.dtype), device=p.device)
                created = True
        return created

    def _expected_states(self, group_index: int, group: dict[str, Any]) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        shapes: defaultdict[Position, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
        for pair in self._pairs:
            for position, name, shape in self._state_shapes(pair, group):
                shapes[position].append((name, shape))
        for position, state in super()._expected_states(group_index, group):
            for name, shape in shapes[position]:
                state[name] = torch.empty(shape, dtype=compute_dtype(self._at(position).dtype), device="meta")
            yield position, state

    def _checked_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = super()._checked_state_dict(state_dict)
        for index, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=True)):
            if saved["metric"] != group["metric"]:
                raise ValueError(
                    f"{type(self).__name__}: param_groups[{index}] of the checkpoint was saved with metric={saved['metric']!r}, here it is "
                    f"{group['metric']!r}; make the optimizer as it was"
                )
        keys = [saved["params"] for saved in state_dict["param_groups"]]
        for pair in self._pairs:
            here = {side: keys[g][index] in state_dict["state"] for side, (g, index) in (("A", pair.a), ("B", pair.b))}
            if here["A"] != here["B"]:
                which = "A" if here["A"] else "B"
                raise ValueError(
                    f"{type(self).__name__}: the checkpoint has the state of {which} of {pair.name} only, and a step needs both factors'; "
                    "it is damaged"
                )
        return state_dict

    # ---------------------------------------------------------------- the step

    def _before_update(self) -> None:
        self._refuse_switched()
        if self.state and not self._has_state():
            self._refuse_replaced_factors()  # said by its name, not as a gradient that is not what was captured
        self._gradients = self._captured_gradients()
        self._results = self._early_results(self._gradients)

    def _update(self) -> None:
        self._step_rest()
        stepped = {id(pair) for gradients in self._gradients for pair in gradients.pairs}
        for pair in self._pairs:
            if id(pair) not in stepped:
                for group_index, index in (pair.a, pair.b):
                    self._miss(self.param_groups[group_index], index)
        for gradients, results in zip(self._gradients, self._results, strict=True):
            if results:
                self._take_over(gradients.pairs, results)
            else:
                tensors = self._tensors(gradients.pairs)
                self._step_pairs(gradients, self._updates(gradients.pairs), self._begin_writing, tensors)
                self._write_back(gradients.pairs, *tensors[:2])
        self._gradients, self._results = [], []
        self._forget()

    def _tensors(self, pairs: list[FactorPair]) -> Tensors:
        """What a step of these layers changes: A, B, the factors of M, W and σ of the metrics, as far as there are any."""
        of_a, of_b = (
            [self.state[self._at(position)] for position in positions] for positions in zip(*((p.a, p.b) for p in pairs), strict=True)
        )
        return (
            [self._matrix(pair.a) for pair in pairs],
            [self._matrix(pair.b) for pair in pairs],
            [state["momentum_u"] for state in of_b if "momentum_u" in state],
            [state["momentum_v"] for state in of_a if "momentum_v" in state],
            [state["metric_basis"] for state in (*of_b, *of_a) if "metric_basis" in state],
            [state["metric_values"] for state in (*of_b, *of_a) if "metric_values" in state],
        )

    def _step_pairs(self, gradients: FullGradients, updates: list[int], begin_writing: Callable[[], object], tensors: Tensors) -> None:
        """Algorithm 1: first the metrics take X and S in, then U and V move, with M as it was, and last M."""
        a, us, mus, mvs, bases, values = tensors
        pairs, group = gradients.pairs, self._group(gradients.pairs[0])
        metrics = None
        if group["metric"]:
            settings = group["metric_decay"], group["metric_damping"], group["sweeps"]
            metrics = track(gradients, bases, values, updates, *settings, begin_writing)
        vs = [x.mT for x in a]
        rate, momentum = scalar(group["lr"]), group["momentum"]
        inverse_scales = on_device([1.0 / pair.scale for pair in pairs], us[0].device)
        steps = (rate if group["maximize"] else -rate) * inverse_scales
        kept = torch.ones_like(steps) - rate * self._factor_decay(group)
        terms, coefficients = [(us, vs)], [kept]
        if mus:  # also while α is 0, scheduled or edited: then M becomes G
            # A term has one dtype: M_U is fp32 where A is 16-bit.
            terms.append((mus, widened(vs, mus[0].dtype) if group["momentum_mode"] == "naive" else mvs))
            coefficients.append(momentum * steps)
            if group["momentum_mode"] != "lowrank":
                new_momentum = self._projected_momentum(gradients, mus, mvs, vs)
        self._lorsum((us, vs), terms, coefficients, gradients, steps, begin_writing, metrics)
        if not mus:
            return
        if group["momentum_mode"] != "lowrank":
            begin_writing()
            torch._foreach_copy_([*mus, *mvs], new_momentum)
            return
        for members in partition(range(len(mus)), lambda i: mus[i].shape[1]).values():
            some = gradients if len(members) == len(pairs) else gradients.of(members)
            target = [mus[i] for i in members], [mvs[i] for i in members]
            kept, ones = torch.full_like(some.coefficients, momentum), torch.ones_like(some.coefficients)
            self._lorsum(target, [target], [kept], some, ones, begin_writing)

    def _lorsum(
        self,
        targets: Any,
        terms: list[Any],
        coefficients: list[Tensor],
        gradients: FullGradients,
        scaled: Tensor,
        begin_writing: Callable[[], object],
        metrics: tuple[Kronecker, Kronecker] | None = None,
    ) -> None:
        """``targets ← LoRSum(Σ coefficient·term + scaled·G)``, in the metrics if there are any."""
        group = self._group(gradients.pairs[0])
        of_gradient, sweeps, proximal = scaled * gradients.coefficients, group["sweeps"], group["proximal"]
        if gradients.local and metrics is None:
            options = {"sweeps": sweeps, "proximal": proximal, "out": targets, "begin_writing": begin_writing}
            lorsum_in_step(targets, [*terms, gradients.term], [*coefficients, of_gradient], **options)
        else:
            us, vs = composed_lorsum(targets, terms, coefficients, gradients.times, of_gradient, sweeps, proximal, metrics)
            begin_writing()
            torch._foreach_copy_([*targets[0], *targets[1]], [*us, *vs])

    def _projected_momentum(self, gradients: FullGradients, mus: list[Tensor], mvs: list[Tensor], vs: list[Tensor]) -> list[Tensor]:
        """``M_U = (αM + G) V (VᵀV)⁻¹`` and ``M_V = V``; or, "naive", ``M_U = αM_U + GV (VᵀV)⁻¹`` alone; with the V of this gradient."""
        group, dtype = self._group(gradients.pairs[0]), gradients.dtype
        naive = group["momentum_mode"] == "naive"
        wide = widened(vs, dtype)
        # GV is known from the measurement of c; as a dense term it is multiplied by the identity.
        terms: list[Any] = [gradients.times_a()]
        coefficients = [gradients.coefficients]
        if not naive:
            terms.append((mus, list(grouped_gram(wide, mvs, dtype=dtype))))
            coefficients.append(torch.full_like(gradients.coefficients, group["momentum"]))
        eye = torch.eye(wide[0].shape[1], dtype=dtype, device=wide[0].device)
        products = grouped_lorsum_product(terms, [eye] * len(wide), coefficients)
        grams, _ = damped(grouped_gram(wide, dtype=torch.float64), 0.0, dtype)
        solved = grouped_solve(grams, products, side="right")
        if not naive:
            return [*solved, *torch._foreach_mul(wide, 1.0)]  # the factors are about to move
        torch._foreach_add_(solved, mus, alpha=group["momentum"])
        return solved

    # ---------------------------------------------------------------- explain()

    def _operations(self, pairs: list[FactorPair]) -> set[tuple[str, int]]:
        found, group, rank = super()._operations(pairs), self._group(pairs[0]), self._rank(pairs[0])
        widths: defaultdict[str, set[int]] = defaultdict(set)
        for pair in pairs:
            for _, name, shape in self._state_shapes(pair, group):
                widths[name].add(shape[-1])
        composed = {"grouped_gram", "grouped_lorsum_product", "grouped_solve"}
        local = data_parallel_group(self._process_group) is None or group["gradient"] == "sketch"
        lorsum = {"grouped_lorsum"} if local else composed
        found |= {*product(composed if group["metric"] else lorsum, {rank})}
        if group["momentum"]:
            lowrank = group["momentum_mode"] == "lowrank"
            found |= {*(product(lorsum, widths["momentum_u"]) if lowrank else product(composed, {rank}))}
        return found | {*product({*lorsum, "grouped_lorsum_product", "grouped_svd_product"}, widths["metric_values"])}
