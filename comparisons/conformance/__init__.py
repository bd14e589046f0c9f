"""`triptych conform`: the behaviour table, played on any proxy and judged."""
