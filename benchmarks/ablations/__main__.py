"""``python -m benchmarks.ablations``: the ablations as rows of a comparison, resumed like ``examples/compare.py``, whose options it takes.

--table od4    OD-LoRA Table 4 (and SDS-LoRA Table 5): capacity and G̃, each given up in turn
--table sds7   SDS-LoRA Table 7: uniform against phased refreshes
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import compare
import finetune_text
from finetune_text import METHODS, Groups, Method

import lowrank_kernels as lrk

from .variants import AnisotropicODLoRA, OrthonormalLoRA


def _method(label: str, build: Any, **options: Any) -> Method:
    def optimizer(groups: Groups, run: argparse.Namespace) -> Any:
        return build(groups, total_steps=run.steps, **options)

    return Method(label, "sds", optimizer)


VARIANTS = {
    "qbqa": _method("rsLoRA w/ optimal G̃: sQ_BQ_Aᵀ, scheduled retraction", OrthonormalLoRA, initialized=False),
    "qbqa-each": _method("sQ_BQ_Aᵀ, retraction after each step (SDS-LoRA Table 5)", OrthonormalLoRA, initialized=False, refresh_every=1),
    "od-capacity": _method("OD-LoRA w/ Cap < ∞: sQ_BQ_Aᵀ from the rounds' bases", OrthonormalLoRA),
    "od-suboptimal": _method("OD-LoRA w/ suboptimal G̃: Q diag(R)", AnisotropicODLoRA),
    **{f"uniform-{k}": _method(f"SDS-LoRA, refresh every {k} steps", lrk.SDSLoRA, refresh_every=k) for k in (1, 2, 3)},
    **{f"phased-{k}": _method(f"SDS-LoRA, {k} phases", lrk.SDSLoRA, phases=k) for k in (3, 4, 5, 6, 7)},
}

TABLES = {
    "od4": ("lora", "qbqa", "qbqa-each", "od-capacity", "od-suboptimal", "od", "sds"),
    "sds7": tuple(name for name in VARIANTS if name.startswith(("uniform", "phased"))),
}


def main(argv: list[str] | None = None) -> compare.Comparison:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--table", choices=TABLES, default="od4")
    known, rest = parser.parse_known_args(argv)
    methods = METHODS | VARIANTS
    finetune_text.METHODS.update(VARIANTS)  # where a Run looks a method up
    return compare.main(rest, methods=methods, name=f"ablation_{known.table}", compared=list(TABLES[known.table]), probed=[])


if __name__ == "__main__":
    main()
