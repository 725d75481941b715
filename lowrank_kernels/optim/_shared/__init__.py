"""What the methods share.

* What a step is: ``base``, entered by ``step_entry``, put back by ``undo``; ``nonfinite`` gradients, ``notices`` to the user,
  ``explain_calls`` for ``explain()``.
* What an optimizer holds: ``param_groups``, its ``arguments``, the ``pairing`` of its parameters, which ``search`` finds (``unpaired``:
  why not). What it saves and loads: ``stateful``; what ``state`` must be.
* Decoupled layers: ``decoupled_layers`` knows where their factors and bases lie; ``idle_halves`` of factors are not trained.
* The full gradient: ``capture`` sees it, ``full_gradient`` holds it; ``watching`` and ``overlapping`` are the optimizers that step by it,
  the latter in the ``background`` of the backward pass. OPLoRA's equations: ``lorsum`` (6 and 10), ``kfac`` (the metrics).
"""
