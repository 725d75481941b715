"""What a step asks of many tensors at once: compiled code and Python answer the same; ``Tall`` stands for its views everywhere."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lowrank_kernels import AdamW, ops
from lowrank_kernels.backends import force, lists
from lowrank_kernels.backends.lists import Tall


@pytest.fixture(params=["compiled", "python"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "python":
        monkeypatch.setattr(lists, "csrc", None)
    elif lists.csrc is None:
        pytest.skip("the extension is not built")
    yield request.param


class Subclass(Tensor):
    pass


def test_alike_and_signature(path: str) -> None:
    params = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 4))]
    grads = [torch.randn(4, 6), torch.randn(6, 4).mT.contiguous().mT]
    assert lists.alike([]) and lists.alike(params) and lists.alike(grads, params[0], 2)
    assert lists.signature(params) == lists.signature(grads) is not None
    assert lists.signature(Tall([grads[1].mT, grads[1]], 1)) == lists.signature([grads[1], grads[1]])
    sparse = torch.randn(4, 6).to_sparse()
    integers, fake = torch.ones(4, 6, dtype=torch.int64), torch.empty(4, 6, device="meta")
    for bad in (grads[0].double(), fake, grads[0].as_subclass(Subclass), sparse, integers):
        assert not lists.alike([grads[0], bad])
        assert lists.signature([bad]) != lists.signature([grads[0]])
    assert not lists.alike([torch.ones(2)], ndim=2)
    assert lists.plain(params) and not lists.plain([grads[0].as_subclass(Subclass)])


def test_states_and_columns(path: str) -> None:
    params = [nn.Parameter(torch.randn(3)) for _ in range(4)]
    state = {p: {"m": torch.full((1,), float(i)), **({"v": i} if i % 2 else {})} for i, p in enumerate(params)}
    for order in ([0, 1, 2, 3], [1, 3], [3, 2, 1, 0], [2, 2]):
        found = lists.states(state, [params[i] for i in order])
        assert [s["m"].item() for s in found] == order
        assert lists.column(found, "v") == [i for i in order if i % 2]
        values = [state[params[i]]["m"] for i in order]
        assert lists.holds(state, params, order, "m", values)
        assert not lists.holds(state, params, order, "m", [*values[:-1], values[-1].clone()])
        assert not lists.holds(state, params, order, "m", values[1:])
        assert not lists.holds(state, params, order, "w", values)
    with pytest.raises(KeyError):
        lists.states(state, [nn.Parameter(torch.randn(3))])


class Holder:
    def __init__(self, **held: int | None) -> None:
        self.held = held


def test_what_objects_hold(path: str) -> None:
    holders = [Holder(a=1, b=2), Holder(a=3, b=4)]
    references = [weakref.ref(holder) for holder in holders]
    assert [list(column) for column in lists.held(references, (("held", "b"), ("held", "a")))] == [[2, 4], [1, 3]]
    assert lists.held(references, (("held", "c"),)) is None
    with pytest.raises(AttributeError):
        lists.held(references, (("other", "a"),))
    holders[1].held["a"] = None
    assert lists.held(references, (("held", "a"),)) is None
    del holders[1]
    assert lists.held(references, (("held", "b"),)) is None


def test_factors_that_do_not_fit_are_explained(path: str) -> None:
    """By both paths, and nothing is changed."""

    def X(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.ones(5, 3), torch.ones(rows, columns, dtype=dtype)]

    with torch.no_grad():
        for xs, old, out in (
            (X(5, 3), X(4, 3), X(5, 3)),
            (X(5, 3), X(5, 3), X(5, 3, torch.float64)),
            (X(2, 3), X(2, 3), X(2, 3)),
            (X(5, 3), X(5, 3)[:1], X(5, 3)),
            (X(5, 2), X(5, 2), X(5, 2)),
        ):
            with pytest.raises((ValueError, TypeError), match="^grouped_qr: (xs|previous|out|lists)"):
                ops.grouped_qr(xs, old, out=out)
            assert all(bool((x == 1).all()) for x in out)


def test_products_of_matrices_of_one_shape_or_not(path: str) -> None:
    xs, ys = [torch.randn(9, 3), torch.randn(7, 3)], [torch.randn(9, 3), torch.randn(7, 3)]
    expected = torch.stack([x.mT.double() @ y.double() for x, y in zip(xs, ys, strict=True)])
    torch.testing.assert_close(ops.grouped_gram(xs, ys, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)
    wider = [torch.cat([y, y], dim=1) for y in ys]
    torch.testing.assert_close(ops.grouped_gram(xs, wider, dtype=torch.float64), expected.repeat(1, 1, 2), rtol=1e-12, atol=1e-12)
    for others in (ys[::-1], [y.double() for y in ys], ys[:1], [ys[0], torch.randn(7, 2)]):
        with pytest.raises((ValueError, TypeError), match="^grouped_gram: (ys|xs|lists)"):
            ops.grouped_gram(xs, others)


def test_copies_of_a_list(path: str) -> None:
    sources = [torch.randn(4, 3), torch.randn(0, 3), torch.randn(5)]
    for targets in (
        [torch.zeros(4, 3), torch.zeros(0, 3), torch.zeros(5)],
        [torch.zeros(3, 4).mT, torch.zeros(0, 3), torch.zeros(5, dtype=torch.float64)],
    ):
        lists.copy_(targets, sources)
        assert all(torch.equal(target, source.to(target.dtype)) for target, source in zip(targets, sources, strict=True))


def test_consecutive(path: str) -> None:
    stack = torch.randn(4, 2, 2)
    assert lists.consecutive(list(stack.unbind()))
    assert not lists.consecutive([stack[0], stack[2]]) and not lists.consecutive([stack[0].mT, stack[1]])


def test_tall_stands_for_its_views(path: str) -> None:
    a, b, old = torch.randn(3, 7), torch.randn(9, 3), [torch.randn(7, 3), torch.randn(9, 3)]
    tall, views = Tall([a, b], 1), [a.mT, b]
    assert len(tall) == 2 and [x.shape for x in tall] == [(7, 3), (9, 3)] == [x.shape for x in tall[:]] and tall[-2].shape == (7, 3)
    assert lists.sizes(tall, 0) == [7, 9] and lists.sizes(tall, 1) == [3, 3]
    with torch.no_grad():
        for backend in ("native", "reference") if path == "compiled" else ("reference",):
            with force(backend):
                assert torch.equal(ops.grouped_gram(tall), ops.grouped_gram(views))
                assert torch.equal(ops.grouped_gram(tall, views), ops.grouped_gram(views, tall))
                out, into = [torch.empty(3, 7), torch.empty(9, 3)], [torch.empty(7, 3), torch.empty(9, 3)]
                rs = ops.grouped_qr(tall, old, out=Tall(out, 1))[1]
                assert torch.equal(rs, ops.grouped_qr(views, old, out=into)[1])
                assert torch.equal(out[0], into[0].mT) and torch.equal(out[1], into[1])
                ops.grouped_polar(tall, out=Tall(out, 1))
                ops.grouped_polar(views, out=into)
                assert torch.equal(out[0], into[0].mT) and torch.equal(out[1], into[1])
    with pytest.raises(ValueError, match="must be tall, got"):
        ops.grouped_qr(Tall([b]))


@pytest.mark.parametrize("change", ["gradient", "data", "state", "dtype"])
def test_a_step_sees_what_was_replaced(path: str, change: str) -> None:
    """Nothing that was read of a tensor outlives the step."""
    runs = []
    for replaced in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(5, 3)) for _ in range(3)]
        optimizer = AdamW(params, lr=0.1)
        for step in range(3):
            for p in params:
                grad = torch.randn(5, 3)
                if replaced and change == "gradient":
                    p.grad = grad.mT.contiguous().mT
                elif p.grad is None:
                    p.grad = grad
                else:
                    p.grad.copy_(grad)
            if step == 1 and change == "dtype":
                for p in params:
                    p.data, p.grad = p.data.double(), None
                    p.grad = torch.randn(5, 3, dtype=torch.float64)
                    optimizer.state[p] = {key: value.double() for key, value in optimizer.state[p].items()}
            if step == 1 and replaced:
                for p in params:
                    if change == "data":
                        p.data = p.data.clone()
                    elif change == "state":
                        optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}
            if step == 2 and change == "dtype":
                for p in params:
                    p.grad = p.grad.double()
            optimizer.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_gather(path: str) -> None:
    params = [nn.Parameter(torch.randn(4, 2 + i)) for i in range(40)]
    for p in params[::2]:
        p.grad = torch.randn_like(p)
    state = {p: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)} for p in params}
    for indices in ([*range(40)], [39, 4, 2], [1, 3], []):
        found, members = lists.gather(params, indices, state), [i for i in indices if i % 2 == 0]
        assert (found.members, found.idle) == (members, [i for i in indices if i % 2])
        stepped = [params[i] for i in members]
        expected = (stepped, [p.grad for p in stepped], *([state[p][key] for p in stepped] for key in ("exp_avg", "exp_avg_sq")))
        for mine, theirs in zip((found.params, found.grads, found.exp_avgs, found.exp_avg_sqs), expected, strict=True):
            assert len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))
        assert (found.layout is None) == (path == "python" or not members)
    with pytest.raises(IndexError):
        lists.gather(params, [40], state)
    with pytest.raises(KeyError):
        lists.gather(params, [0], {})
    assert lists.gather(params, [0], {params[0]: {}}).exp_avgs == []


@pytest.mark.skipif(lists.csrc is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gather_has_a_layout_only_of_what_fits(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    like = torch.zeros(5, 3, dtype=wide)

    def layout(param: Tensor, m: Tensor | None = None, v: Tensor | None = None) -> object:
        params, state = [nn.Parameter(torch.randn(4, 6, dtype=dtype)), param], {}
        for p, moments in zip(params, ((torch.zeros(4, 6, dtype=wide), torch.zeros(4, 6, dtype=wide)), (m, v)), strict=True):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            state[p] = {key: x for key, x in zip(("exp_avg", "exp_avg_sq"), moments, strict=True) if x is not None}
        return lists.gather(params, [0, 1], state).layout

    def fresh(*shape: int) -> Tensor:
        return nn.Parameter(torch.randn(*(shape or (5, 3)), dtype=dtype))

    assert layout(fresh(), like, like.clone()) is not None
    strided = fresh()
    strided.grad = torch.randn(3, 5, dtype=dtype).mT
    assert layout(strided, like, like.clone()) is not None
    for m, v in (
        (like, None),
        (torch.zeros(5, 2, dtype=wide), like),
        (like.to(torch.float16), like),
        (like, torch.zeros(3, 5, dtype=wide).mT),
        (like, like.as_subclass(Subclass)),
        (like, like.to_sparse()),
        (torch.empty(5, 3, dtype=wide, device="meta"), like),
    ):
        assert layout(fresh(), m, v) is None
    other = torch.float32 if dtype == torch.float64 else torch.float64
    assert layout(nn.Parameter(torch.randn(5, 3, dtype=other)), like, like) is None
    channels_last = fresh(2, 3, 4, 5)
    channels_last.data = channels_last.data.to(memory_format=torch.channels_last)
    state = torch.zeros(2, 3, 4, 5, dtype=wide)
    assert layout(channels_last, state, state) is None


def test_first_sparse_gradient(path: str) -> None:
    params = [nn.Parameter(torch.randn(3, 2)) for _ in range(4)]
    params[1].grad = torch.randn(3, 2)
    assert lists.first_sparse_gradient(params, [0, 1, 2, 3]) is None
    params[3].grad = torch.randn(3, 2).to_sparse()
    assert lists.first_sparse_gradient(params, [0, 1, 2, 3]) == 3 and lists.first_sparse_gradient(params, [2, 1]) is None


@pytest.mark.skipif(not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="torch has no exchange table: the other tests ran without")
def test_torch_without_the_exchange_table() -> None:
    """Before 2.10: the extension asks by the tensors' methods."""
    script = "import sys, torch; del torch.Tensor.__dlpack_c_exchange_api__; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-p", "no:cacheprovider", "-k", "compiled", __file__]
    done = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


GRAM = torch.eye(4).repeat(2, 1, 1)
TRACED: dict[str, Callable[..., object]] = {
    "gram": lambda x, y: ops.grouped_gram([x, y], [y, x]),
    "qr": lambda x, y: ops.grouped_qr([x, y], [x, y]),
    "polar": lambda x, y: ops.grouped_polar([x, y]),
    "solve": lambda x, y: ops.grouped_solve(GRAM, [x, y], 1.0, side="right"),
    "svd_product": lambda x, y: ops.grouped_svd_product([x, y], [y, x], 2),
    "lorsum_product": lambda x, y: ops.grouped_lorsum_product([([x], [y])], [y], torch.ones(1, 1)),
}


@pytest.mark.parametrize("name", TRACED)
def test_operations_on_lists_compile_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    arguments = torch.randn(9, 4), torch.randn(9, 4)
    compiled = torch.compile(TRACED[name], fullgraph=True, backend="eager")
    with torch.no_grad():
        found, expected = map(torch.utils._pytree.tree_leaves, (compiled(*arguments), TRACED[name](*arguments)))
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("path")
class TestSharing:
    """What is written must have a place of its own, and autograd must see it written."""

    def test_which_tensors_share_memory(self) -> None:
        whole = torch.zeros(40, 8)
        other, complex_ = torch.zeros(3, 4), torch.zeros(4, 4, dtype=torch.complex64)
        for tensors, expected in (
            ([], None),
            ([whole, other], None),
            ([whole[20:], other, whole[:20]], None),
            ([other, whole, whole[3:5]], (1, 2)),
            ([whole[30:], whole.view(-1)[:8], whole[:1]], (1, 2)),
            ([whole.mT, whole[39]], (0, 1)),
            ([whole.view(4, 10, 8), whole.view(4, 10, 8)[2]], (0, 1)),
            ([whole.view(4, 10, 8).mT, whole], None),  # no matrix, and not contiguous: it is not looked at
            ([whole[:, :4], whole[:, 4:], whole[:, 2:6]], None),
            ([other, torch.zeros(1).expand(3)], (1, 1)),
            ([other, torch.zeros(3, 1).expand(3, 1), torch.zeros(1, 3).expand(1, 3)], None),
            ([torch.zeros(0, 4).expand(5, 0, 4), whole[:0], whole], None),
            ([whole.int()] * 2, None),
            ([other.to_sparse()] * 2, None),
            ([complex_.conj().imag] * 2, None),  # is refused elsewhere
            ([torch.empty(3, 4, device="meta")] * 2, None),
            ([other.as_subclass(Subclass), other], (0, 1)),
            (Tall([other, other.mT], 1), (0, 1)),
            (lists.located(Tall([other, whole, whole[2:4]], 2)), (1, 2)),
        ):
            assert lists.sharing(tensors) == expected

    def test_results_that_are_negated_lazily(self) -> None:
        xs, out = [torch.randn(4, 4)], [torch.zeros(4, 4, dtype=torch.complex64).conj().imag]
        assert lists.signature(out) is None
        for call in (ops.grouped_qr, ops.grouped_polar):
            with pytest.raises(ValueError, match=r"out\[0\] is written, but negated lazily"):
                call(xs, out=out)

    def test_shared_memory_is_refused_by_name_and_columns_of_one_matrix_are_not(self) -> None:
        whole = torch.zeros(40, 8)
        xs = [torch.randn(12, 4), torch.randn(12, 4)]
        for out, names in (
            ([whole[:12, :4].contiguous().as_strided((12, 4), (0, 1)), torch.zeros(12, 4)], r"out\[0\] is expanded"),
            ([whole.view(80, 4)[4:16], whole.view(80, 4)[12:24]], r"out\[0\] and out\[1\] share memory"),
            ([torch.zeros(4, 12).mT] * 2, r"out\[0\] and out\[1\] share memory"),
        ):
            before = [tensor.clone() for tensor in out]
            for call in (lambda out: ops.grouped_qr(xs, out=out), lambda out: ops.grouped_polar(xs, out=out)):
                with pytest.raises(ValueError, match=names):
                    call(out)
            assert all(map(torch.equal, out, before))
        interleaved = [whole[:12, :4], whole[:12, 4:]]
        ops.grouped_qr(xs, out=interleaved)
        assert torch.equal(interleaved[0], ops.grouped_qr(xs)[0][0])

    @pytest.mark.parametrize("operation", ["svd", "svd_product", "lorsum"])
    def test_pairs_of_lists(self, operation: str) -> None:
        xs, q = [torch.randn(9, 9), torch.randn(9, 9)], torch.zeros(9, 9)
        rank = 9
        call = {
            "svd": lambda out: ops.grouped_svd(xs, rank, out=out),
            "svd_product": lambda out: ops.grouped_svd_product(xs, xs[::-1], rank, out=out),
            "lorsum": lambda out: ops.grouped_lorsum((xs, xs[::-1]), [(xs, xs), xs], [1.0, 0.5], out=out),
        }[operation]
        before = [x.clone() for x in xs]
        for wrong, names in (
            (q, r"out\[0\]\[0\] and out\[1\]\[1\] share memory"),
            (torch.zeros(9, 1).expand(9, 9), r"out\[0\]\[0\] is expanded"),
            (xs[1], r"out\[0\]\[0\] is written and shares memory with (xs|lefts|targets\[.\]|terms\[.\](\[.\])?)\[.\]"),
            (torch.nn.Parameter(q.clone()), r"out\[0\]\[0\] is written, but requires a gradient"),
            (torch.nn.Parameter(torch.zeros(10, 9))[1:], r"out\[0\]\[0\] is written, but requires a gradient"),
        ):
            with pytest.raises((ValueError, RuntimeError), match=names):
                call(([wrong, q.clone()], [q.clone(), q]))
        assert not q.any() and all(map(torch.equal, xs, before))
        spare = [q.clone() for _ in range(4)]
        found, expected = (torch.utils._pytree.tree_leaves(call(out)) for out in ((spare[:2], spare[2:]), None))
        assert all(map(torch.equal, found, expected))

    def test_lists_of_results(self) -> None:
        grams, xs = 4 * torch.eye(4).repeat(2, 1, 1), [torch.randn(4, 4), torch.randn(4, 4)]
        before, stack = [x.clone() for x in xs], torch.stack(xs)
        for call, names in (
            (lambda: ops.grouped_polar(xs, out=xs), r"grouped_polar: out\[0\] is written and shares memory with xs\[0\]"),
            (lambda: ops.grouped_qr(xs, out=xs[::-1]), r"grouped_qr: out\[1\] is written and shares memory with xs\[0\]"),
            (lambda: ops.grouped_solve(grams, xs, out=xs[::-1]), r"grouped_solve: out\[1\] is written and shares memory with rhs\[0\]"),
            (lambda: ops.grouped_solve(grams, xs, out=[x.mT for x in xs]), r"out\[0\] is written and shares memory with rhs\[0\]"),
            (lambda: ops.grouped_solve(grams, xs, out=list(grams)), r"out\[0\] is written and shares memory with grams"),
            (lambda: ops.grouped_solve(grams, stack, out=grams), r"out is written and shares memory with grams"),
        ):
            with pytest.raises(ValueError, match=names):
                call()
        with torch.inference_mode():
            inferred = [torch.zeros(4, 4) for _ in range(2)]
        for call in (
            lambda: ops.grouped_qr(xs, out=inferred),
            lambda: ops.grouped_solve(grams, xs, out=inferred),
            lambda: ops.grouped_svd(xs, 4, out=([torch.zeros(4, 4) for _ in range(2)], inferred)),
        ):
            with pytest.raises(RuntimeError, match=r"out.*\[0\] is written, but an inference tensor; clone\(\) it"):
                call()
        assert all(map(torch.equal, xs, before)) and torch.equal(grams, 4 * torch.eye(4).repeat(2, 1, 1))
        ops.grouped_solve(grams, xs, out=xs)
        ops.grouped_solve(grams, stack, out=stack)
        assert all(map(torch.equal, (*xs, *stack), [x / 4 for x in (*before, *before)]))

    def test_lorsum_into_its_targets(self) -> None:
        us, vs = ([torch.randn(rows, 2) for rows in (9, 7)] for _ in range(2))
        expected = ops.grouped_lorsum((us, vs), [(us, vs)], [0.5])
        for out in ((us, vs), (list(us), list(vs))):
            start = [x.clone() for x in (*us, *vs)]
            ops.grouped_lorsum((us, vs), [(us, vs)], [0.5], out=out)
            assert all(map(torch.equal, (*us, *vs), (*expected[0], *expected[1])))
            for x, value in zip((*us, *vs), start, strict=True):
                x.copy_(value)

    @pytest.mark.parametrize(
        ("wrong", "names"),
        [
            (lambda p, maps: {"drifts": p.view(-1)[:16].view(1, 4, 4)}, r"params\[0\] and drifts share memory"),
            (lambda p, maps: {"drifts": maps}, "drifts is written and shares memory with grad_maps"),
            (lambda p, maps: {"drifts": torch.zeros(()).expand(1, 4, 4)}, "drifts is expanded"),
            (lambda p, maps: {"drifts": torch.nn.Parameter(torch.zeros(1, 4, 4))}, "drifts is written, but requires a gradient"),
        ],
    )
    def test_drifts(self, wrong: Callable[..., dict[str, Tensor]], names: str) -> None:
        p, m, v, maps = torch.ones(5, 4), torch.ones(5, 4), torch.ones(5, 4), torch.ones(1, 4, 4)
        numbers = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 1}
        given = {"grad_maps": maps, "momentum_maps": maps, "rank_dims": [1], **numbers}
        with pytest.raises((ValueError, RuntimeError), match=f"grouped_adamw_: {names}"):
            ops.grouped_adamw_([p], [torch.ones(5, 4)], [m], [v], **given, **wrong(p, maps))
        assert all(bool((t == 1).all()) for t in (p, m, v, maps))
        ops.grouped_adamw_([p], [torch.ones(5, 4)], [m], [v], **given, drifts=torch.zeros(1, 4, 4))

    def test_moment_step(self) -> None:
        p, g, m, v = (torch.ones(5) for _ in range(4))
        numbers = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 1}
        for arguments, names in (
            (([p], [g], [m], [m]), r"exp_avgs\[0\] and exp_avg_sqs\[0\] share memory"),
            (([p, p], [g, g], [m, m + 1], [v, v + 1]), r"params\[0\] and params\[1\] share memory"),
            (([p], [g], [p], [v]), r"params\[0\] and exp_avgs\[0\] share memory"),
        ):
            with pytest.raises(ValueError, match=names):
                ops.grouped_adamw_(*arguments, **numbers)
        with pytest.raises(RuntimeError, match=r"params\[0\] is written, but requires a gradient"):
            ops.grouped_adamw_([torch.nn.Parameter(p)], [g], [m], [v], **numbers)
        assert all(bool((t == 1).all()) for t in (p, m, v))
