"""The first commit at which something changed: `isohub.bisect`."""
