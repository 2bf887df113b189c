"""Programs that run other engines, each by whichever Python has the engine. They import nothing of this package."""
