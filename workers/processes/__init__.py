"""Processes: how they are made, what they inherit, and how they end."""
