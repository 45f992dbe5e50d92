"""One metric over the same data, for many refs: `isohub.evaluate`."""
