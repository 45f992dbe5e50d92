"""isohub: torch.hub, with a worker process for each repo and commit."""
