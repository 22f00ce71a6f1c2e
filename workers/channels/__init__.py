"""Channels: what both ends promise, and what every kind of channel is made of."""
