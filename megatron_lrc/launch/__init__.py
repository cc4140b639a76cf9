"""How the processes of a run find each other and end together."""
