"""The soak: everything runs as it would in production, anything is killed at any moment, and the accounts must add up."""
