"""Other people's proxies, and ours, as processes that a scenario can be played on.

`peer.Peer` is what is known of one, `standing.Standing` is one that is up between clients and upstreams of
ours. `known.KNOWN` are those with an adapter; `custom` makes one of a command or of an address.
"""
