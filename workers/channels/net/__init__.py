"""Channels over torch.distributed with gloo."""
