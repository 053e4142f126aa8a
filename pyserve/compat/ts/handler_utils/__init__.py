"""What handlers call while they handle."""
