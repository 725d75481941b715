"""Shapes of the adapted layers of well-known models: tables, no weights needed."""

from __future__ import annotations

from dataclasses import dataclass

#: (d_out, d_in) of one linear layer.
Shape = tuple[int, int]


@dataclass(frozen=True)
class Model:
    """A stack of equal blocks.

    Attributes:
        blocks: how many.
        linears: the linear layers of one block; "q" and "v" are the projections that small-budget LoRA adapts.
    """

    blocks: int
    linears: dict[str, Shape]


def _bert(blocks: int, hidden: int, inner: int) -> Model:
    square = {name: (hidden, hidden) for name in ("q", "k", "v", "o")}
    return Model(blocks, square | {"up": (inner, hidden), "down": (hidden, inner)})


def _gated(blocks: int, hidden: int, query: int, key_value: int, inner: int) -> Model:
    attention = {"q": (query, hidden), "k": (key_value, hidden), "v": (key_value, hidden), "o": (hidden, query)}
    return Model(blocks, attention | {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)})


MODELS = {
    "minilm": _bert(6, 384, 1536),  # all-MiniLM-L6-v2
    "roberta-base": _bert(12, 768, 3072),
    "gemma-2b": _gated(18, 2048, query=2048, key_value=256, inner=16384),
    "llama-1b": _gated(16, 2048, query=2048, key_value=512, inner=8192),  # Llama 3.2 1B
    "llama3-8b": _gated(32, 4096, query=4096, key_value=1024, inner=14336),
}
#: Layers so small that a step on them costs little but host time.
SMALL = {count: f"small-{count}" for count in (6, 60, 200, 600)}
MODELS |= {name: Model(count, {"linear": (32, 32)}) for count, name in SMALL.items()}
#: One block that costs next to nothing, to ask a suite what it has.
TINY = "tiny"
MODELS[TINY] = _bert(1, 64, 128)

#: Which layers are adapted.
CHOICES: dict[str, tuple[str, ...] | None] = {"all": None, "qv": ("q", "v")}
#: Layers of a block that share an input.
SHARED = ("q", "k", "v")


def names(model: str, choice: str = "all") -> list[str]:
    """The names of the adapted layers of one block."""
    wanted = CHOICES[choice]
    return [name for name in MODELS[model].linears if wanted is None or name in wanted]


def layers(model: str, choice: str = "all") -> list[Shape]:
    """(d_out, d_in) of every adapted layer of ``model``: of all linear layers of its blocks ("all"), or of q and v ("qv")."""
    return [MODELS[model].linears[name] for name in names(model, choice)] * MODELS[model].blocks
