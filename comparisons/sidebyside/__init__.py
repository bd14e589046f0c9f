"""Real traffic through all three engines at once, and what each made of it."""
