"""Messages: what travels between stages, and what a queue's ends promise."""
