"""The load: processes of their own that drive a subject and check every byte it returns.

`python -m comparisons.load` runs one job and ends; `python -m comparisons.load.upstream` is
the server behind a proxy. Both are single epoll loops in plain Python, closed loop: a
client sends its next request when the last one is answered.
"""
