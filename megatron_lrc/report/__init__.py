"""One self-contained HTML page about a run, from the files in its directory. No torch, no network."""
