"""Real conversations, kept with their timing and played again.

`format` (and FORMAT.md) is the file. `recorder` makes one from live traffic through `keeper`, which redacts and
writes; `clients` plays its clients against a real server, `served` its servers for real clients, `player` both
ends through a proxy and checks every byte; `pcapng` exports it. `record`, `replay` and `commands` are the
commands, and `capture` made the recordings shipped here. Only TCP and UNIX stream sockets: no datagrams.
"""
