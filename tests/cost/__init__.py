"""What sending and ``once`` cost, counted and not timed: statements, round trips, rows that a query reads."""
