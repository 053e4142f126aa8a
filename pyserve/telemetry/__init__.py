"""What a server reports about itself: metrics, log files, access log, spans. Records cheaply, formats elsewhere."""
