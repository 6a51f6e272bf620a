"""What mypy and pyright tell users; `make lint` checks these files, nothing runs them."""
