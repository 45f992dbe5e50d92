"""The command line: parses, asks `isohub.hub`, prints. It decides nothing. Side: caller."""
