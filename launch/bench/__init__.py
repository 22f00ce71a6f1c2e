"""The benchmark: rows, rounds, verdict, ledger."""
