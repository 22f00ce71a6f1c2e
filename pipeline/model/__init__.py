"""The model: layers and cuts, where they compute, and what steps them."""
