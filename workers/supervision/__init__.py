"""Supervision: whoever starts workers, listens to them and ends them, on this host and on others."""
