"""Every method as plain PyTorch, one layer at a time, the way its authors would ship it.

These files are the page to read first (they follow the papers' algorithm boxes line by line), the oracle of the tests
(run them in fp64) and the baseline of the benchmarks. They import nothing of ``lowrank_kernels``.

==================  ================================================================================
``adamw``           AdamW (Loshchilov & Hutter)
``sds_lora``        SDS-LoRA: warm-up, re-parametrization, refreshes of the bases
``od_lora``         OD-LoRA: rounds from a start without adapters, then SDS-LoRA's main run
``preconditioned``  AltLoRA and AltLoRA+, ScaledGD and ScaledAdamW, LoRA-Pro, LoRA-RITE
``oplora``          OPLoRA and its LoRSum; SVDLoRA, which it follows; K-FAC's metrics
``lora_sb``         LoRA-SB: its start, its core's gradient and step
==================  ================================================================================
"""
