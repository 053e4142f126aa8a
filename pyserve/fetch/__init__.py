"""Archives from elsewhere, from hosts that may be hostile: addresses, transfers, limits."""
