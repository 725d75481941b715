"""Every optimizer of the package in every training stack: the matrix.

`make test` runs almost every feature with one optimizer (another one for each feature); `make test-all` runs every cell.
"""

from __future__ import annotations

from pathlib import Path

import features_faults  # noqa: F401
import features_frameworks  # noqa: F401
import features_input  # noqa: F401
import features_loop  # noqa: F401
import features_parallel  # noqa: F401
import features_peft  # noqa: F401
import pytest
from _matrix import FEATURES, METHODS, Cell
from _ranks import Ranks

#: Features that cost seconds whatever the optimizer (new processes, four ranks): for `make test-all` only.
SLOW = {"killed", "fsdp2", "fsdp2_default_placement", "distributed_checkpoint", "flattened", "lightning_manual", "trainer_class"}
#: The optimizer of each other feature in `make test`.
QUICK = {name: list(METHODS)[index % len(METHODS)] for index, name in enumerate(FEATURES) if name not in SLOW}
CELLS = [
    pytest.param(feature, method, id=f"{feature}-{method}", marks=() if QUICK.get(feature) == method else pytest.mark.large)
    for feature in FEATURES
    for method in METHODS
]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize(("feature", "method"), CELLS)
def test_cell(feature: str, method: str, tmp_path: Path, ranks: Ranks) -> None:
    FEATURES[feature].check(Cell(method, tmp_path, ranks))
