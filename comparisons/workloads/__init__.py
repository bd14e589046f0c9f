"""What is done to every subject, and what its log can say about why it went as it did.

`table.py` lists the workloads, `signals.py` the figures of a log that tell engines apart.
"""
