"""Further families of routes, each a translation into the requests of chat and text completions, and back."""
