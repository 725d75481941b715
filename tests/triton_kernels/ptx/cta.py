"""The threads of one program (CTA) in vectors: registers, divergence, barriers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .instructions import OPERATIONS, Copy
from .memory import STAMPS, Access, Memory, Violation
from .parse import Address, Instruction, Operand, Program
from .types import Bits, decode, encode

WARP = 32
_Threads = NDArray[np.bool_]
#: More steps than any kernel here takes.
_STEPS = 10_000_000


class Cta:
    """One program of a launch. A register is an array of 64 bits for each thread, of which an instruction uses what its type says."""

    def __init__(
        self,
        program: Program,
        position: tuple[int, int, int],
        parameters: Mapping[str, int],
        memory: Memory,
        shared: int,
        epoch: int,
    ) -> None:
        self.program, self.position, self.epoch, self._first_epoch = program, position, epoch, epoch
        self.threads = np.arange(program.threads)
        self.everyone = np.ones(program.threads, dtype=bool)
        self.spaces = {"global": memory, "shared": Memory({0: np.full(max(shared, 1), 255, dtype=np.uint8)})}
        known = {**{f"%ctaid.{axis}": at for axis, at in zip("xyz", position, strict=True)}, "global_smem": 0, **parameters}
        self._registers = {name: self.bits(value) for name, value in known.items()} | {"%tid.x": self.threads.astype(np.uint64)}
        self.copies: list[Copy] = []
        self.committed = np.zeros(program.threads, dtype=np.int64)

    # --- operands -----------------------------------------------------------------------------------------------------------

    def bits(self, operand: Operand) -> Bits:
        """A register or a literal, 64 bits of each thread."""
        if isinstance(operand, int):
            return np.full(len(self.threads), operand & 0xFFFF_FFFF_FFFF_FFFF, dtype=np.uint64)
        return self._registers[operand]

    def read(self, operand: Operand, kind: str) -> NDArray[Any]:
        """A register or a literal as values of a PTX type."""
        return decode(self.bits(operand), kind)

    def write(self, register: Operand, values: NDArray[Any], kind: str, active: _Threads) -> None:
        """Set a register of the ``active`` threads."""
        bits = encode(values, kind)
        if active is not self.everyone:
            bits = np.where(active, bits, self._registers.get(register, 0xFFFF_FFFF_FFFF_FFFF))
        self._registers[register] = bits

    def addresses(self, address: Address) -> NDArray[np.int64]:
        """What ``[base + offset]`` is for each thread."""
        return self.bits(address.base).view(np.int64) + address.offset

    def access(self, addresses: NDArray[np.int64], size: int, warps: NDArray[np.int64] | int) -> Access:
        """``size`` bytes at each of the addresses, by these warps, now."""
        now = self.epoch * STAMPS
        return Access(addresses, size, np.broadcast_to(now + warps, addresses.shape), now, self._first_epoch * STAMPS)

    def load(self, space: str, addresses: NDArray[np.int64], size: int, active: _Threads) -> NDArray[np.uint8]:
        """``size`` bytes for each thread, (threads, size); of those that are not ``active`` zeros."""
        values = np.zeros((len(self.threads), size), dtype=np.uint8)
        values[active] = self.spaces[space].read(self.access(addresses[active], size, self.threads[active] // WARP))
        return values

    def store(self, space: str, addresses: NDArray[np.int64], values: NDArray[np.uint8], active: _Threads) -> None:
        """Write (threads, size) bytes of the ``active`` threads."""
        access = self.access(addresses[active], values.shape[1], self.threads[active] // WARP)
        self.spaces[space].write(access, values[active])

    def whole(self, active: _Threads, group: int = WARP) -> None:
        """Refuse what all threads of a warp (or four of them) must execute together, and do not."""
        together = active.reshape(-1, group)
        if (together.any(1) != together.all(1)).any():
            raise Violation("part of a warp executes what all of it must")

    # --- control ------------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run to the end; returns the next program's epoch.

        Threads that stand at one instruction execute it together; those that are furthest behind go first, so that branches meet again.
        """
        ready: dict[int, _Threads] = {0: self.everyone}
        waiting: dict[int, _Threads] = {}
        for _ in range(_STEPS):
            if not ready:
                if not waiting:
                    return self.epoch + 1
                ready, waiting, self.epoch = waiting, {}, self.epoch + 1
            position = min(ready)
            active = ready.pop(position)
            instruction = self.program.instructions[position]
            taken = active
            if instruction.guard is not None:
                taken = active & (self.read(instruction.guard, "pred") ^ instruction.negated)
                taken = self.everyone if taken.all() else taken
            if instruction.opcode == "bra":
                self._arrive(ready, self.program.labels[str(instruction.operands[0])], taken)
                self._arrive(ready, position + 1, active & ~taken)
            elif instruction.opcode == "ret":
                self._arrive(ready, position + 1, active & ~taken)
            elif instruction.opcode == "bar" and instruction.modifiers == ("sync",):
                self._arrive(waiting, position + 1, taken)
            else:
                self._execute(instruction, taken)
                self._arrive(ready, position + 1, active)
        raise Violation(f"{self.program.name} does not end")

    def _arrive(self, places: dict[int, _Threads], position: int, threads: _Threads) -> None:
        if position in places:
            threads = threads | places[position]
            threads = self.everyone if threads.all() else threads
        if threads is self.everyone or threads.any():
            places[position] = threads

    def _execute(self, instruction: Instruction, active: _Threads) -> None:
        operation = OPERATIONS.get(instruction.opcode)
        if operation is None:
            raise NotImplementedError(instruction.text)
        try:
            operation(self, instruction, active)
        except Violation as error:
            raise Violation(f"{self.program.name}, program {self.position}: {instruction.text}: {error}") from None
