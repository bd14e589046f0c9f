"""How many descriptors this process and its children may have."""

import resource

# many idle sessions want it
WANTED = 16_384


def allow_descriptors() -> int:
    """Raises the soft limit of descriptors, which children inherit, as far as many idle sessions want it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(WANTED, hard) if hard != resource.RLIM_INFINITY else WANTED
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft if soft != resource.RLIM_INFINITY else wanted
