"""What the logs say: the daemons' JSON lines read back, counted and explained."""
