"""Setup: from a recipe and a plan to a run that can start."""
