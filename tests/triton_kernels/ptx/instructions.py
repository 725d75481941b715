"""A function for each opcode: what it does to a :class:`~ptx.cta.Cta` on behalf of the threads that execute it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .memory import ASYNCHRONOUS
from .parse import Instruction, Operand
from .types import TYPES, UNSIGNED, Bits, decode, encode

if TYPE_CHECKING:
    from .cta import Cta

Active = NDArray[np.bool_]
Operation = Callable[["Cta", Instruction, Active], None]
OPERATIONS: dict[str, Operation] = {}
_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
#: Of 16-bit floats and pairs of them, whose rounding these instructions leave alone.
_SIGNS = {"f16": 0x8000, "bf16": 0x8000, "f16x2": 0x8000_8000, "bf16x2": 0x8000_8000}
_LANE = np.arange(32)


def operation(*opcodes: str) -> Callable[[Operation], Operation]:
    """Enter a function in the table."""

    def enter(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(opcodes, function))
        return function

    return enter


def require(condition: bool, ins: Instruction) -> None:
    """Only a part of the instruction set is here."""
    if not condition:
        raise NotImplementedError(ins.text)


# --- arithmetic and logic ---------------------------------------------------------------------------------------------------


def elementwise(function: Callable[..., NDArray[Any]]) -> Operation:
    """An operation of values of one type."""

    def operate(cta: Cta, ins: Instruction, active: Active) -> None:
        if ins.type in _SIGNS and ins.opcode in ("abs", "neg"):
            sign, bits = _SIGNS[ins.type], cta.bits(ins.operands[1])
            cta.write(ins.operands[0], bits ^ (sign if ins.opcode == "neg" else bits & sign), "b32", active)
            return
        require(ins.type in TYPES or ins.type == "pred", ins)
        require("NaN" not in ins.modifiers and "sat" not in ins.modifiers, ins)
        values = function(*(cta.read(operand, ins.type) for operand in ins.operands[1:]))
        cta.write(ins.operands[0], values, ins.type, active)

    return operate


def divide(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Integers are divided towards zero."""
    return a / b if a.dtype.kind == "f" else (a - np.fmod(a, b)) // b


def fused(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any]) -> NDArray[Any]:
    """A multiplication and an addition without a rounding between them, but for the wider type's."""
    wide = np.float64 if a.dtype.itemsize < 8 else np.longdouble
    return a.astype(wide) * b + c


NUMPY: dict[str, Callable[..., NDArray[Any]]] = {
    "add": np.add,
    "sub": np.subtract,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "div": divide,
    "rem": np.fmod,
    "fma": fused,
    "sqrt": np.sqrt,
    "ex2": np.exp2,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
    "copysign": lambda sign, value: np.copysign(value, sign),
}
OPERATIONS.update({opcode: elementwise(function) for opcode, function in NUMPY.items()})


@operation("mul", "mad")
def multiply(cta: Cta, ins: Instruction, active: Active) -> None:
    """Of integers the low half of the product, the high half, or all of it."""
    require(ins.type in TYPES, ins)
    wide = _WIDER[ins.type] if {"wide", "hi"} & set(ins.modifiers) else ins.type
    a, b = (cta.read(operand, ins.type).astype(TYPES[wide]) for operand in ins.operands[1:3])
    product = a * b
    if "hi" in ins.modifiers:
        product, wide = product >> (8 * TYPES[ins.type].itemsize), ins.type
    if ins.opcode == "mad":
        product = product + cta.read(ins.operands[3], wide)
    cta.write(ins.operands[0], product, wide, active)


@operation("shl", "shr")
def shift(cta: Cta, ins: Instruction, active: Active) -> None:
    """NumPy too shifts everything out beyond the width."""
    values = cta.read(ins.operands[1], ins.type)
    by = cta.read(ins.operands[2], "u32").astype(values.dtype)
    cta.write(ins.operands[0], values << by if ins.opcode == "shl" else values >> by, ins.type, active)


@operation("bfe")
def bit_field(cta: Cta, ins: Instruction, active: Active) -> None:
    values, (start, length) = cta.read(ins.operands[1], ins.type), ins.operands[2:]
    width = 8 * values.dtype.itemsize
    require(isinstance(start, int) and isinstance(length, int) and start + length <= width, ins)
    cta.write(ins.operands[0], values << (width - start - length) >> (width - length), ins.type, active)


@operation("prmt")
def permute_bytes(cta: Cta, ins: Instruction, active: Active) -> None:
    require(ins.modifiers == ("b32",), ins)
    low, high, selector = (cta.read(operand, "u32").astype(np.uint64) for operand in ins.operands[1:])
    both, result = low | high << 32, np.zeros_like(low)
    for i in range(4):
        chosen = selector >> 4 * i
        byte = both >> 8 * (chosen & 7) & 255
        result |= np.where(chosen & 8, 255 * (byte >> 7), byte) << 8 * i  # 8: its sign in all bits
    cta.write(ins.operands[0], result, "b32", active)


@operation("popc")
def count_bits(cta: Cta, ins: Instruction, active: Active) -> None:
    cta.write(ins.operands[0], np.bitwise_count(cta.read(ins.operands[1], ins.type)), "u32", active)


_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "num": lambda a, b: np.ones(a.shape, dtype=bool), "nan": lambda a, b: np.zeros(a.shape, dtype=bool),
}  # fmt: skip


@operation("setp")
def compare(cta: Cta, ins: Instruction, active: Active) -> None:
    """With NaN "nan" and what ends in "u" are true, and nothing else is."""
    require(len(ins.modifiers) == 2 or ins.modifiers[1:-1] == ("ftz",), ins)
    a, b = (cta.read(operand, ins.type) for operand in ins.operands[1:])
    name = ins.modifiers[0]
    result = _COMPARISONS[name.removesuffix("u")](a, b)
    if a.dtype.kind == "f":
        result = np.where(np.isnan(a) | np.isnan(b), name == "nan" or name[2:] == "u", result)
    cta.write(ins.operands[0], result, "pred", active)


@operation("selp")
def choose(cta: Cta, ins: Instruction, active: Active) -> None:
    _, a, b, condition = ins.operands
    cta.write(ins.operands[0], np.where(cta.read(condition, "pred"), cta.bits(a), cta.bits(b)), "b64", active)


@operation("mov")
def move(cta: Cta, ins: Instruction, active: Active) -> None:
    """A register to another, or apart into several, or several into one."""
    to, source = ins.operands
    if isinstance(to, tuple):
        width = 8 * TYPES[ins.type].itemsize // len(to)
        for i, register in enumerate(to):
            cta.write(register, cta.bits(source) >> width * i, f"b{width}", active)
    elif isinstance(source, tuple):
        width = 8 * TYPES[ins.type].itemsize // len(source)
        parts = [cta.read(register, f"b{width}").astype(np.uint64) << width * i for i, register in enumerate(source)]
        cta.write(to, np.bitwise_or.reduce(parts), ins.type, active)
    else:
        cta.write(to, cta.read(source, ins.type), ins.type, active)


@operation("cvt")
def convert(cta: Cta, ins: Instruction, active: Active) -> None:
    *rounding, target, source = ins.modifiers
    to, *operands = ins.operands
    halves = target.removesuffix("x2")
    known = [kind in TYPES or kind == "bf16" for kind in (halves, source)]
    require(set(rounding) <= {"rn"} and all(known) and (source[0] not in "fb" or target[0] in "fb"), ins)
    values = [cta.read(operand, source) for operand in operands]
    if target.endswith("x2"):
        high, low = (encode(value, halves) for value in values)
        cta.write(to, high << 16 | low, "b32", active)
    else:
        cta.write(to, values[0], target, active)


# --- within a warp ----------------------------------------------------------------------------------------------------------


@operation("shfl")
def shuffle(cta: Cta, ins: Instruction, active: Active) -> None:
    cta.whole(active)
    to, value, by, clamp, _ = ins.operands
    require(ins.modifiers[1] in ("bfly", "idx") and clamp == 31, ins)
    by = cta.read(by, "u32").astype(np.int64)
    lane = (cta.threads ^ by if ins.modifiers[1] == "bfly" else by) % 32
    cta.write(to, cta.bits(value)[cta.threads // 32 * 32 + lane], "b32", active)


@operation("redux")
def reduce(cta: Cta, ins: Instruction, active: Active) -> None:
    cta.whole(active)
    values = cta.read(ins.operands[1], ins.type)
    result = NUMPY[ins.modifiers[1]].reduce(values.reshape(-1, 32), axis=1, dtype=values.dtype)  # type: ignore[attr-defined]
    cta.write(ins.operands[0], np.repeat(result, 32), ins.type, active)


@operation("fence", "bar")
def nothing(cta: Cta, ins: Instruction, active: Active) -> None:
    """Memory is in order here; ``bar.sync`` is the Cta's own."""
    require(ins.opcode == "fence" or ins.modifiers[:2] == ("warp", "sync"), ins)


# --- memory -----------------------------------------------------------------------------------------------------------------


def words(data: NDArray[np.uint8], size: int) -> list[Bits]:
    """(threads, bytes) as registers of ``size`` bytes."""
    return list(np.ascontiguousarray(data).view(UNSIGNED[size]).astype(np.uint64).T)


def joined(registers: Sequence[Bits], size: int) -> NDArray[np.uint8]:
    """The other way."""
    return np.stack(registers, axis=1).astype(UNSIGNED[size]).view(np.uint8)


def several(operand: Operand) -> tuple[str | int, ...]:
    return operand if isinstance(operand, tuple) else (operand,)  # type: ignore[return-value]


@operation("ld")
def load(cta: Cta, ins: Instruction, active: Active) -> None:
    """What is of a signed type fills the register, whatever its width."""
    to, address = ins.operands
    signed = ins.type[0] == "s"
    if ins.modifiers[0] == "param":
        cta.write(to, cta.read(address.base, ins.type), "s64" if signed else ins.type, active)  # type: ignore[union-attr]
        return
    registers, size = several(to), TYPES[ins.type].itemsize
    data = cta.load(ins.modifiers[0], cta.addresses(address), size * len(registers), active)  # type: ignore[arg-type]
    for register, bits in zip(registers, words(data, size), strict=True):
        cta.write(register, decode(bits, ins.type), "s64" if signed else ins.type, active)


@operation("st")
def store(cta: Cta, ins: Instruction, active: Active) -> None:
    address, source = ins.operands
    data = joined([cta.bits(register) for register in several(source)], TYPES[ins.type].itemsize)
    cta.store(ins.modifiers[0], cta.addresses(address), data, active)  # type: ignore[arg-type]


class Copy(NamedTuple):
    """One that is not waited for yet; its ``group`` is how many its thread had committed before."""

    addresses: NDArray[np.int64]
    data: NDArray[np.uint8]
    threads: Active
    group: NDArray[np.int64]


@operation("cp")
def copy(cta: Cta, ins: Instruction, active: Active) -> None:
    """``cp.async`` reads at once, and writes NaN at once; what it read, when its group is waited for."""
    require(ins.modifiers[0] == "async", ins)
    kind = ins.modifiers[1]
    if kind == "commit_group":
        cta.committed = cta.committed + active
    elif kind == "wait_group":
        copies, cta.copies = cta.copies, []
        for copied in copies:
            done = copied.threads & active & (copied.group < cta.committed - ins.operands[0])
            cta.store("shared", copied.addresses, copied.data, done)
            if (copied.threads & ~done).any():
                cta.copies.append(copied._replace(threads=copied.threads & ~done))
    else:
        require(ins.modifiers[2:4] == ("shared", "global"), ins)
        (to, source, size), given = ins.operands[:3], ins.operands[3:]
        count = cta.read(given[0] if given else size, "u32")
        require(bool(np.isin(count[active], (0, size)).all()), ins)
        data = cta.load("global", cta.addresses(source), size, active & (count > 0))  # type: ignore[arg-type]
        addresses = cta.addresses(to)  # type: ignore[arg-type]
        cta.store("shared", addresses, np.full_like(data, 255), active)
        cta.copies.append(Copy(addresses, data, active, cta.committed))


@operation("ldmatrix", "stmatrix")
def move_matrices(cta: Cta, ins: Instruction, active: Active) -> None:
    """8 × 8 matrices of 16 bits: lane 8 i + j has the address of row j of matrix i, lane l two elements of row l/4 in register i."""
    cta.whole(active)
    require(ins.modifiers[2] == "m8n8" and ins.type == "b16", ins)
    loads = ins.opcode == "ldmatrix"
    registers, address = ins.operands if loads else reversed(ins.operands)
    addresses = cta.addresses(address).reshape(-1, 4, 8)  # type: ignore[arg-type]
    row, column = _LANE // 4, 2 * (_LANE % 4)
    pairs = [(column + half, row) if "trans" in ins.modifiers else (row, column + half) for half in (0, 1)]
    warps = np.flatnonzero(active[::32])
    for i, register in enumerate(several(registers)):  # type: ignore[arg-type]
        access, matrices = cta.access(addresses[warps, i].ravel(), 16, np.repeat(warps, 8)), np.zeros((len(addresses), 8, 8), np.uint16)
        if loads:
            matrices[warps] = cta.spaces["shared"].read(access).view(np.uint16).reshape(-1, 8, 8)
            low, high = (matrices[:, r, c].ravel().astype(np.uint64) for r, c in pairs)
            cta.write(register, low | high << 16, "b32", active)
        else:
            for half, (r, c) in enumerate(pairs):
                matrices[:, r, c] = cta.bits(register).reshape(-1, 32) >> 16 * half & 0xFFFF
            cta.spaces["shared"].write(access, matrices[warps].reshape(-1, 8).view(np.uint8))


# --- matrix products --------------------------------------------------------------------------------------------------------


def halves(cta: Cta, registers: Sequence[Operand], kind: str) -> list[NDArray[Any]]:
    """The two 16-bit values of each register, the low one first."""
    return [decode(cta.bits(register) >> shift & 0xFFFF, kind) for register in registers for shift in (0, 16)]


def gathered(values: Sequence[NDArray[Any]], lanes: int, shape: tuple[int, int], place: Callable[..., Any]) -> NDArray[np.float64]:
    """The matrix of each group of ``lanes`` threads, whose element i of lane l is at ``place(i, l)``."""
    matrix = np.zeros((len(values[0]) // lanes, *shape))
    for i, value in enumerate(values):
        row, column = place(i, np.arange(lanes))
        matrix[:, row, column] = value.reshape(-1, lanes)
    return matrix


def in_a(i: int, lane: NDArray[np.int64]) -> tuple[Any, Any]:
    """Row and column of element i of 16-bit A, and of wgmma's accumulator, in tiles of 16 × 8 or 64 × 8 side by side."""
    return 16 * (lane // 32) + lane % 32 // 4 + 8 * (i // 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i // 4)


def in_b(i: int, lane: NDArray[np.int64]) -> tuple[Any, Any]:
    return 2 * (lane % 4) + i % 2 + 8 * (i // 2), lane // 4


def in_c(i: int, lane: NDArray[np.int64]) -> tuple[Any, Any]:
    return lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2


@operation("mma")
def multiply_matrices(cta: Cta, ins: Instruction, active: Active) -> None:
    """m16n8k16 of 16-bit operands, added to fp32, and m8n8k4 of fp64."""
    cta.whole(active)
    shape, *layouts, to_kind, a_kind, _, c_kind = ins.modifiers[2:]
    require(layouts == ["row", "col"] and to_kind == c_kind, ins)
    require((shape, a_kind, c_kind) in {("m16n8k16", "bf16", "f32"), ("m16n8k16", "f16", "f32"), ("m8n8k4", "f64", "f64")}, ins)
    to, a, b, c = (several(operand) for operand in ins.operands)
    if shape == "m8n8k4":
        left = gathered([cta.read(a[0], "f64")], 32, (8, 4), lambda i, lane: (lane // 4, lane % 4))
        right = gathered([cta.read(b[0], "f64")], 32, (4, 8), lambda i, lane: (lane % 4, lane // 4))
    else:
        left = gathered(halves(cta, a, a_kind), 32, (16, 16), in_a)
        right = gathered(halves(cta, b, a_kind), 32, (16, 8), in_b)
    result = left @ right + gathered([cta.read(register, c_kind) for register in c], 32, (left.shape[1], 8), in_c)
    for i, register in enumerate(to):
        row, column = in_c(i, _LANE)
        cta.write(register, result[:, row, column].ravel(), c_kind, active)


def described(cta: Cta, descriptor: int, rows: int, transposed: bool, kind: str) -> NDArray[Any]:
    """wgmma's operand in shared memory, (rows, 16): stored by rows, or ``transposed``, in swizzled pieces of 32, 64 or 128 bytes a row."""
    start, leading, stride = (16 * (descriptor >> shift & 0x3FFF) for shift in (0, 16, 32))
    swizzle = {1: 7, 2: 3, 3: 1}[descriptor >> 62]
    width = 16 * (swizzle + 1)
    row, k = np.mgrid[:rows, :16]
    if transposed:
        piece = width // 2
        at = start + row // piece * leading + row % piece * 2 + k % 8 * width + k // 8 * stride
    else:
        at = start + row // 8 * stride + row % 8 * width + k * 2
    at ^= (at >> 7 & swizzle) << 4
    bits = cta.spaces["shared"].read(cta.access(at.ravel(), 2, ASYNCHRONOUS)).view(np.uint16).astype(np.uint64)
    return decode(bits.ravel(), kind).reshape(rows, 16).astype(np.float64)


@operation("wgmma")
def multiply_in_groups(cta: Cta, ins: Instruction, active: Active) -> None:
    """m64nNk16 of four warps: A in registers or shared memory, B in shared memory, added to fp32 or in place of it."""
    if ins.modifiers[0] in ("fence", "commit_group", "wait_group"):
        return
    cta.whole(active, 128)
    shape, c_kind, kind, _ = ins.modifiers[3:]
    found = re.fullmatch(r"m64n(\d+)k16", shape)
    require(found is not None and c_kind == "f32" and kind in ("bf16", "f16"), ins)
    columns = int(found[1])  # type: ignore[index]
    to, a, b, add, *signs_and_layouts = ins.operands
    require(signs_and_layouts[:2] == [1, 1], ins)
    layouts = signs_and_layouts[2:]

    def operand(descriptors: Operand, rows: int, transposed: bool) -> NDArray[np.float64]:
        found = np.zeros((len(cta.threads) // 128, rows, 16))
        for group in np.flatnonzero(active[::128]):
            found[group] = described(cta, int(cta.bits(descriptors)[128 * group]), rows, transposed, kind)
        return found

    right = operand(b, columns, bool(layouts[-1]))
    left = gathered(halves(cta, a, kind), 128, (64, 16), in_a) if isinstance(a, tuple) else operand(a, 64, bool(layouts[0]))
    product = left @ right.transpose(0, 2, 1)
    old = cta.read(add, "pred")
    for i, register in enumerate(several(to)):
        row, column = in_a(i, np.arange(128))
        before = np.where(old, cta.read(register, "f32"), 0) if old.any() else 0
        cta.write(register, product[:, row, column].ravel() + before, "f32", active)
