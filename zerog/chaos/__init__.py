"""Chaos: jobs are submitted, processes are injured, and an independent ledger says what happened (``zerog chaos``)."""
