"""From directories of results to tables, charts and pages."""
