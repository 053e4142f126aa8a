"""Who may call: keys, certificates, their renewal, what browsers may do."""
