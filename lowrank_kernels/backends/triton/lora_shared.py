"""``lora_down`` and ``lora_up``: the kernels of ``lora_linear``, for the stacked factors of all layers that share an input.

Floor, with b bytes an element and t tokens: down ``b·t·d_in`` for all layers together, up ``2·b·t·d_out`` for each; backward ``b·t·d_out``
for ∂H and ∂B of each layer, ``b·t·d_in`` for ∂A and ``2·b·t·d_in`` for ∂x of all of them.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..registry import Verdict, implements
from ._launch import on_device
from .lora_linear import call_verdict, expand, output_grads, project, token_sum


def verify_down(x: Tensor, a: Tensor, q: Tensor | None) -> Verdict:
    """Refuses stacks of more than 128 rows, mixed dtypes, and other devices than a GPU."""
    return call_verdict(x, (a, q), a.shape[0])


@implements("lora_down", "triton", verify_down)
def lora_down(x: Tensor, a: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One launch."""
    with on_device(x):
        return project(x, None, 1.0, a.mT, None if q is None else q.mT, True)


def verify_down_backward(
    grad_x: Tensor | None, on_a: Tensor | None, on_q: Tensor | None, x: Tensor | None, a: Tensor | None, q: Tensor | None
) -> Verdict:
    """Refuses stacks of more than 128 rows, mixed dtypes, and other devices than a GPU."""
    some = on_q if on_a is None else on_a
    assert some is not None
    return call_verdict(some, (grad_x, x, a, q), some.shape[1])


@implements("lora_down_backward", "triton", verify_down_backward)
def lora_down_backward(
    grad_x: Tensor | None, on_a: Tensor | None, on_q: Tensor | None, x: Tensor | None, a: Tensor | None, q: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """One launch for ∂x, and one or two for ∂A."""
    of_x = of_a = None
    parts = [(on, factor.mT) for on, factor in ((on_a, a), (on_q, q)) if on is not None and factor is not None]
    with on_device(parts[0][0] if parts else on_a):  # type: ignore[arg-type]
        if parts:
            first, (second_h, second) = parts[0], parts[1] if len(parts) > 1 else (None, None)
            of_x = first[0].new_empty(first[0].shape[0], first[1].shape[0])
            expand(of_x, grad_x, None, 1.0, *first, second_h, second, True)
        if x is not None and on_a is not None:
            rank, d_in = on_a.shape[1], x.shape[1]
            of_a = token_sum(on_a, x, None, 1.0, x.new_empty(rank, d_in), 1, d_in)
    return of_x, of_a


def verify_up(x: Tensor | None, weight: Tensor | None, bias: Tensor | None, hidden: Tensor, b: Tensor, hidden_q: Tensor | None,
              q_b: Tensor | None, scale: float) -> Verdict:  # fmt: skip
    """Refuses ranks above 128, mixed dtypes, and other devices than a GPU."""
    return call_verdict(hidden, (x, weight, bias, b, hidden_q, q_b), b.shape[1])


@implements("lora_up", "triton", verify_up)
def lora_up(x: Tensor | None, weight: Tensor | None, bias: Tensor | None, hidden: Tensor, b: Tensor, hidden_q: Tensor | None,
            q_b: Tensor | None, scale: float) -> Tensor:  # fmt: skip
    """One cuBLAS GEMM, and one launch that adds to what it wrote."""
    with on_device(hidden):
        base = None if x is None or weight is None else F.linear(x, weight, bias).contiguous()
        y = hidden.new_empty(hidden.shape[0], b.shape[0]) if base is None else base
        if hidden_q is None or q_b is None:
            expand(y, base, None, scale, hidden, b, None, None, False)
        else:
            expand(y, base, None, scale, hidden, q_b, hidden_q, b, False)
    return y


def verify_up_backward(
    grad: Tensor, weight: Tensor | None, hidden: Tensor | None, b: Tensor, q_b: Tensor | None, scale: float, needs: list[bool]
) -> Verdict:
    """Refuses ranks above 128, mixed dtypes, and other devices than a GPU."""
    return call_verdict(grad, (weight, hidden, b, q_b), b.shape[1])


@implements("lora_up_backward", "triton", verify_up_backward)
def lora_up_backward(
    grad: Tensor, weight: Tensor | None, hidden: Tensor | None, b: Tensor, q_b: Tensor | None, scale: float, needs: list[bool]
) -> list[Tensor]:
    """One cuBLAS GEMM for ∂x, and one read of ∂y for all that has the width of the rank."""
    need_x, need_hidden, need_b, need_q = needs
    first = b if q_b is None or not need_hidden else q_b
    second = b if need_hidden and need_q else None
    through: tuple[Tensor | None, Tensor | None] = (None, None)
    grad_b = None
    with on_device(grad):
        of_x = grad @ weight if need_x and weight is not None else None
        if need_b and (need_hidden or need_q):
            assert hidden is not None
            *through, grad_b = output_grads(grad, hidden, first, second, scale, scale)  # type: ignore[assignment]
        elif need_b:
            assert hidden is not None
            grad_b = token_sum(hidden, grad, None, scale, grad.new_empty(b.shape), b.shape[1], 1)
        elif need_hidden or need_q:
            through = project(grad, None, scale, first, second, False)
    on_hidden, on_q = through if need_hidden else (None, through[0])
    return [found for found, needed in zip((of_x, on_hidden, grad_b, on_q), needs, strict=True) if needed and found is not None]
