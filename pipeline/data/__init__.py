"""Data: the recipe, the loader that turns it into messages, and errors from the user's code."""
