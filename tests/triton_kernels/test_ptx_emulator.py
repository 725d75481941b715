"""The emulator on kernels of a few lines."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from ptx.memory import Violation
from ptx.plugin import launch

#: Thread i has 4 i in %r1, &data[i] in %rd2.
HEAD = """
.visible .entry kernel(.param .u64 .ptr .global .align 1 data)
.reqntid 64
{
    ld.param.b64 %rd1, [data];
    mov.u32 %r0, %tid.x;
    shl.b32 %r1, %r0, 2;
    cvt.u64.u32 %rd3, %r1;
    add.s64 %rd2, %rd1, %rd3;
"""
TAIL = """
    ret;
$L__func_end0:
}
"""


def run(data: torch.Tensor, body: str, programs: int = 1) -> list[int]:
    launch(HEAD + body + TAIL, 1024, (programs,), [data.data_ptr()], "")
    return data.tolist()


def test_branches_part_and_meet() -> None:
    """Of a loop each thread leaves in its own turn; a shuffle after it finds the whole warp."""
    body = """
    mov.b32 %r2, 0;
$L__again:
    add.s32 %r2, %r2, 1;
    setp.le.u32 %p1, %r2, %r0;
    @%p1 bra $L__again;
    shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
    st.global.b32 [%rd2], %r3;"""
    assert run(torch.zeros(64, dtype=torch.int32), body) == [(i ^ 1) + 1 for i in range(64)]


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_warps_meet_in_shared_memory_behind_barriers_only(barrier: str) -> None:
    body = f"""
    st.shared.b32 [%r1], %r0;
    {barrier}
    xor.b32 %r2, %r1, 128;
    ld.shared.b32 %r3, [%r2];
    st.global.b32 [%rd2], %r3;"""
    if barrier:
        assert run(torch.zeros(64, dtype=torch.int32), body) == [i ^ 32 for i in range(64)]
    else:
        with pytest.raises(Violation, match=r"ld.shared.b32 %r3, \[%r2\]: race"):
            run(torch.zeros(64, dtype=torch.int32), body)


def test_copies_arrive_when_they_are_waited_for() -> None:
    body = """
    cp.async.ca.shared.global [%r1], [%rd2], 0x4;
    cp.async.commit_group;
    WAIT
    ld.shared.b32 %r2, [%r1];
    st.global.b32 [%rd2], %r2;"""
    assert run(torch.arange(64, dtype=torch.int32), body.replace("WAIT", "cp.async.wait_group 0;")) == list(range(64))
    assert run(torch.arange(64, dtype=torch.int32), body.replace("WAIT", "cp.async.wait_group 1;")) == [-1] * 64


def test_programs_must_not_meet() -> None:
    body = """
    mov.u32 %r2, %ctaid.x;
    ld.global.b32 %r3, [%rd2];
    st.global.b32 [%rd2], %r2;"""
    assert run(torch.ones(64, dtype=torch.int32), body) == [0] * 64
    with pytest.raises(Violation, match="race"):
        run(torch.ones(64, dtype=torch.int32), body, programs=2)


@pytest.mark.parametrize(
    "body, message",
    [
        ("ld.global.b32 %r2, [%rd2+4];", r"ld.global.b32 %r2, \[%rd2\+4\]: out of bounds"),
        ("ld.global.b32 %r2, [%rd1+2];", "misaligned"),
        ("st.shared.b32 [%r1+1000], %r0;", "out of bounds"),
        ("setp.eq.b32 %p1, %r0, 3; @%p1 bra $L__end; shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1; $L__end:", "part of a warp"),
    ],
)
def test_violations_name_the_instruction(body: str, message: str) -> None:
    with pytest.raises(Violation, match=message):
        run(torch.zeros(64, dtype=torch.int32), body)


def test_unknown_instructions_are_named() -> None:
    with pytest.raises(NotImplementedError, match="sin.approx.f32 %r2, %r0"):
        run(torch.zeros(64, dtype=torch.int32), "sin.approx.f32 %r2, %r0;")
