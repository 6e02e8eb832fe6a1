"""The report of a comparison: tables, statistics, figures, and one HTML page."""
