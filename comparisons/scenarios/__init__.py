"""Scripted clients and upstreams as plain functions: what a correct echo and proxy does, as facts.

A scenario takes a `Subject` (how to reach a service and, for a proxy, the sockets that it dials),
plays one script on it over raw sockets and returns an `Observation`: what each end heard, how it
ended and what was counted. It knows neither a test runner nor anybody's log, so the same function
measures Triptych, HAProxy or any other TCP proxy. `rules.RULES` says which rule of the behaviour
table each one shows and what must have been observed.

Every wait is bounded. A script sleeps only where time itself is the script. A script that cannot
be played (nothing accepts, nothing is dialled) raises OSError, and that is a result too; `Inconclusive` is
none: the machine stood in the way.
"""
