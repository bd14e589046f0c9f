"""The daemons: one echo and proxy service, written for three I/O models.

`core` decides, `engines` move bytes, everything else here is one process's life: its
configuration, its sockets, its logs. Nothing in this package needs `comparisons`.
"""
