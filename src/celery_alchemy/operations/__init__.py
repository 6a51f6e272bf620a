"""What people do with a running application: look whether it is ready, count, revive, prune.

The command line is here too.
"""
