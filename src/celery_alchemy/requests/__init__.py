"""One attempt of one task: its unit of work, body, ending, ``once``, failure, and sends."""
