"""The same over gRPC. Nothing here is imported when gRPC is off."""
