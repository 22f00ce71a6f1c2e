"""The plan: what the user asks for, its check, and what follows from it alone (channels, devices, replicas)."""
