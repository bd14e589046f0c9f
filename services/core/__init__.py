"""Policy, written once, without I/O: what a session does next, for every engine alike.

No module here imports socket, select, selectors, ssl, time, threading or twisted
(`tests/test_shape.py` holds it to that). Time arrives as an argument, bytes as counts.
"""
