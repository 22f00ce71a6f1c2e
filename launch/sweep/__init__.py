"""``freewheel sweep``: what is learned, over modes, delays, forms of the DNI or anything else that has an option."""
