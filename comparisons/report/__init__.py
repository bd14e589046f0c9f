"""The results for readers: a table on the terminal, one page for a browser."""
