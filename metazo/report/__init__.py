"""What runs and comparisons look like: curves of one run, and the report of many."""

from metazo.plots.curves import plot_curves, plot_run

__all__ = ["plot_curves", "plot_run"]
