"""Wiring: the edges of a run, the memory they need, and how a process opens its ends."""
