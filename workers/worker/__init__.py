"""A worker: one stage in one process."""
