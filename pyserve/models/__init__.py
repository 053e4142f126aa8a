"""A served version's life: choose handler and lane, load, convert, register, remember."""
