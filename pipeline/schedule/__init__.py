"""Schedules: what a stage does next (policies), and the modes that choose among them."""
