"""A stage: its layers, when and from what it updates, and what watches over it."""
