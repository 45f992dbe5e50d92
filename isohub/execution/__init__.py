"""Where evaluations, comparisons and bisections do their work: lanes of this machine, or of others."""
