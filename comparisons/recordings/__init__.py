"""Real conversations, kept with their timing and played again.

`format` is the file, `recorder` makes one from live traffic, `player` plays both ends of one through a
proxy, and `capture` made the recordings shipped here. Only TCP and UNIX stream sockets: no datagrams.
"""
