"""The report of a comparison: tables, statistics, figures, and one page for everyone."""
