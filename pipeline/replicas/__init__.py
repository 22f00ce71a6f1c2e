"""Replicas: the averages over the copies of a stage."""
