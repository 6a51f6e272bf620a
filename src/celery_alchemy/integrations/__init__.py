"""What hands the events of celery-alchemy to other packages, each an optional extra.

At the edge: nothing of the package imports them. Each has ``instrument(alchemy)``.
"""
