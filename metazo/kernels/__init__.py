"""Compiled loops over all cores, casts, and floats split into a narrow part and its rest."""
