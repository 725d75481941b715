"""The papers' ablations: what is lost without full representational capacity, without an optimal G̃, with other refresh schedules.

``python -m benchmarks.ablations`` trains them on MiniLM (``--task smollm2`` on the language model) beside the methods themselves:
Table 4 of OD-LoRA, Tables 5 and 7 of SDS-LoRA. :mod:`.variants` holds the update rules.
"""
