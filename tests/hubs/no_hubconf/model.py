"""Not an entrypoint: there is no hubconf."""
