"""Several processes: which ``ranks`` there are and what each does, and the ``shards`` that FSDP2 makes of parameters."""
