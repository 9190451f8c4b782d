"""Training of the registration networks, and the data for it."""
