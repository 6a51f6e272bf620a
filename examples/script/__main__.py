"""A worker and the script with one command: ``python -m script``."""

from script.count_words import main
from without_servers import worker

with worker("script.tasks"):
    main()
