"""DNIs: the small networks that predict gradients at a cut, and the local losses beside them."""
