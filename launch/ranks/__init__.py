"""Runs of many ranks: torchrun."""
