"""A run: resolved from recipe and plan, driven stage by stage, in the reference driver or dry."""
