"""The three panels: the same service on blocking sockets, on a selector loop, on Twisted."""
