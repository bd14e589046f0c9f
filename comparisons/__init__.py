"""Everything that drives, measures and explains the services."""
