"""An OpenAI-compatible server over one `LLM`. Needs the extra `serve`, and is imported only where it is asked for."""
