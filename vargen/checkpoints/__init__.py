"""Published files: read, recognised, verified, found."""
