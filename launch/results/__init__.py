"""Results: the folder of a run and what is read from it."""
