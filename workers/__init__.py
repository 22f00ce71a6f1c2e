"""One stage in one process: the loop, the channels, the supervision, the spans."""
